"""The nearest of the names that would have been right, for errors about one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, names: Iterable[str]) -> str | None:
    """The one of `names` most like `word`, or None where none is like it; case does not matter."""
    by_lower_case = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(word).lower(), by_lower_case, n=1)
    return by_lower_case[found[0]] if found else None


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """`did you mean NAME? ` with the nearest of `names`, to stand before the list of them; empty where none is near."""
    found = nearest(word, names)
    return f"did you mean {found}? " if found is not None else ""
