"""`python -m arriero` is `arriero`."""

import sys

from arriero.cli import main

sys.exit(main())
