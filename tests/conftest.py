"""One thread for NumPy's and PyTorch's own matrix products: the tests multiply small matrices, and
two thread pools on two cores spend their time waiting for each other (20x slower, measured)."""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
