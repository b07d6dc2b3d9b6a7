"""`python -m dpdist_launch` is `dpdist`, and so is `python -m launch` where nothing else has that name."""

import sys

from dpdist_launch.cli import main

sys.exit(main())
