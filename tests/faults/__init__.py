"""Runs disturbed on purpose: `harness` for one of them, `matrix` for all, `soak` at random for as long as you like."""

import sys
from pathlib import Path

# pytest knows where the supporting modules are; `python -m tests.faults.soak` learns it here.
_SUPPORT = str(Path(__file__).parents[1] / "support")
if _SUPPORT not in sys.path:
    sys.path.append(_SUPPORT)
