"""A package, because a dependency installs one called `tests` too: `python -m tests.faults.soak` must mean this one."""
