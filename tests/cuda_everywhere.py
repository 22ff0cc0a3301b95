"""A plugin of pytest: policies of the tests run on the emulated GPU, unless they name a backend.

TSAD_CUDA_LIBRARY=$PWD/emulated.so TSAD_CPU=cuda python -m pytest -p cuda_everywhere tests/...
"""

import os

from tsad import _core

_core._load_backend(os.environ["TSAD_CUDA_LIBRARY"])
