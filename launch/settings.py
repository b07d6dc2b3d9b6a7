"""`dpdist settings`: every key of a config, and what a change of it does to a run that has begun.

`docs/settings.md` is this table too: `dpdist settings --markdown > docs/settings.md` writes it again.
"""

from __future__ import annotations

import fnmatch
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpdist.config import SECTIONS, setting_names
from dpdist.config.nearest import nearest
from dpdist.config.section import fields_of, meanings
from dpdist.errors import InputError
from dpdist.run.step_settings import step_settings

KEPT, NEW, REFUSED = "kept", "new incarnation", "refused"

#: What no statement about the whole run could cover if it changed; `dpdist.run.resume` refuses it.
FIXED = (
    "privacy.enabled",
    "privacy.delta",
    "privacy.insecure_seed",
    "data.split_seed",
    "data.test_fraction",
    "data.unit",
)
#: What has an effect beside that of being changed.
_MORE = {
    "checkpoint.resume_step": (NEW, "it begins at that step"),
    "cluster.platform": (KEPT, "a new incarnation where the run then trains on another platform"),
    "data.source": (NEW, "refused where the test examples are then others"),
    "data.path": (KEPT, "a new incarnation where the examples there are others, refused where the test examples are"),
    "data.columns": (NEW, "refused where the test examples are then others"),
    "data.options": (NEW, "refused where the test examples are then others"),
    "model.name": (NEW, "refused where the parameters then have other names or shapes"),
    "model.options": (NEW, "refused where the parameters then have other names or shapes"),
    "model.classes": (NEW, "refused where the parameters then have other shapes"),
    "model.trainable": (NEW, "refused where the optimizer's state then has another shape"),
    "model.lora": (NEW, "refused where the parameters then have other names or shapes"),
    "model.frozen_dtype": (NEW, "refused where parameters are then of another dtype"),
    "optimizer.name": (NEW, "refused where its state then has another shape"),
    "optimizer.options": (NEW, "refused where its state then has another shape"),
    "optimizer.momentum": (NEW, "refused from 0 to more, or back, since its state then has another shape"),
    "optimizer.average_decay": (NEW, "refused from 0 to more, or back"),
    "privacy.insecure_seed": (REFUSED, "where it was not set, or is not any more; another seed is a new incarnation"),
    "run.dir": (KEPT, "it names the run: another directory holds another one"),
    "run.registry": (KEPT, "refused for a run that is charged to another one"),
    "run.registry_dataset": (KEPT, "refused for a run that is charged to another"),
    "run.trial": (KEPT, "but a trial stays one, by its ledger"),
}

_HEAD = """\
# Settings

Every key of a config, as `dpdist settings` prints it. A config is a YAML file of sections (see `configs/`); on the
command line `section.key=value` overrides it, and of two overrides of one setting the later one counts. In a file a
section or key that stands twice is an error. A `~` at the start of a path is your home directory.

*On change* says what happens to a run that has begun when it is resumed with another value:

- **kept**: it goes on as the same incarnation, taking what was lost again with the same samples and noise;
- **new incarnation**: it goes on with fresh samples and noise, and what it has spent stays charged;
- **refused**: it is not resumed; name a new `run.dir`.

"""
_TAIL = "This page is made by `dpdist settings --markdown > docs/settings.md`.\n"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of a config."""

    #: Dotted name, such as `privacy.clip_norm`.
    name: str
    #: The type, and what a value must be.
    type: str
    default: Any
    meaning: str
    #: What a change does to a run that has begun: `kept`, `new incarnation` or `refused`.
    on_change: str
    #: What else is to be said of that; may be empty.
    on_change_note: str


def settings(pattern: str | None = None) -> list[Setting]:
    """The settings in the order of a config.

    Args:
        pattern: a part of the name, or with `*`, `?` or `[` a pattern for all of it; case does not matter. None is all.

    Raises:
        InputError: it matches none.
    """
    if pattern is None:
        return [_setting(name) for name in setting_names()]
    glob = pattern.lower() if any(sign in pattern for sign in "*?[") else f"*{pattern.lower()}*"
    names = [name for name in setting_names() if fnmatch.fnmatchcase(name, glob)]
    if not names:
        raise InputError("PATTERN", pattern, f"matches no setting; {_meant_by(pattern)}`dpdist settings` lists all.")
    return [_setting(name) for name in names]


def as_text(found: Sequence[Setting]) -> str:
    """For people: a line of aligned columns for each setting, and what it means below."""
    rows = [(each.name, each.type, f"default {_yaml(each.default)}", each.on_change) for each in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row, each in zip(rows, found, strict=True):
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
        said = each.meaning + (f" On change: {each.on_change_note}." if each.on_change_note else "")
        lines += textwrap.wrap(said, width=100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_json(found: Sequence[Setting]) -> str:
    """For programs: one JSON object, setting by name."""
    return json.dumps({each.name: {k: v for k, v in asdict(each).items() if k != "name"} for each in found})


def as_markdown() -> str:
    """The whole of `docs/settings.md`."""
    parts = [_HEAD]
    for section, kind in SECTIONS.items():
        rows = [
            f"| `{each.name.partition('.')[2]}` | {each.type} | `{_yaml(each.default)}` | {_escaped(each.meaning)} "
            f"| {each.on_change}{'; ' * bool(each.on_change_note)}{each.on_change_note} |"
            for each in settings(f"{section}.*")
        ]
        parts.append(
            f"## {section}\n\n{kind.__doc__}\n\n| key | type | default | meaning | on change |\n"
            "| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n"
        )
    return "".join([*parts, _TAIL])


def _setting(name: str) -> Setting:
    section, _, key = name.partition(".")
    kind = SECTIONS[section]
    field = fields_of(kind)[key]
    rules = [str(constraint) for constraint in field.constraints]
    plain = REFUSED if name in FIXED else NEW if step_settings({name: None}) else KEPT
    on_change, note = _MORE.get(name, (plain, ""))
    return Setting(
        name=name,
        type=", ".join([field.type_name, *rules]),
        default=field.default,
        meaning=meanings(kind)[key],
        on_change=on_change,
        on_change_note=note,
    )


def _meant_by(pattern: str) -> str:
    """The hint about a pattern that is nearly a setting, a section, a key, or a word of one."""
    by_word = {name: name for name in [*setting_names(), *SECTIONS]}
    for name in setting_names():
        key = name.partition(".")[2]
        for word in [key, *key.split("_")]:
            by_word.setdefault(word, name)
    near = nearest(pattern.strip("*?[]."), by_word)
    return f"did you mean {by_word[near]}? " if near is not None else ""


def _yaml(value: Any) -> str:
    """A default as a config would say it; JSON is YAML, but for the quotes that a plain word needs not."""
    return value if isinstance(value, str) else json.dumps(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
