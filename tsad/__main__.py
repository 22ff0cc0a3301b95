"""`python -m tsad`: the command line."""

import sys

from tsad.cli import main

sys.exit(main())
