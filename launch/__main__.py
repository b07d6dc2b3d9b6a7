"""`python -m launch` is `dpdist`."""

import sys

from dpdist_launch.cli import main

sys.exit(main())
