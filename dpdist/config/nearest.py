"""The nearest of the names that would have been right, for errors about one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, names: Iterable[str]) -> str | None:
    """The one of `names` most like `word`, or whose initials it is, as `lr`; None where there is none such."""
    text, by_lower_case = str(word).lower(), {name.lower(): name for name in names}
    found = difflib.get_close_matches(text, by_lower_case, n=1)
    found += [name for name in by_lower_case if "_" in name and "".join(part[:1] for part in name.split("_")) == text]
    return by_lower_case[found[0]] if found else None


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """`did you mean NAME? ` with the nearest of `names`, to stand before the list of them; empty where none is near."""
    found = nearest(word, names)
    return f"did you mean {found}? " if found is not None else ""
