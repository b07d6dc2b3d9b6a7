"""Which settings may change within an incarnation."""

from __future__ import annotations

from dpdist.config import Config, Privacy, Training, flatten
from dpdist.run.step_settings import MAY_CHANGE, settings_digest, step_settings


def test_what_may_change_is_a_list_of_settings_that_exist_and_everything_else_counts() -> None:
    settings = flatten(Config(privacy=Privacy(enabled=False), training=Training(steps=1)))
    for free in MAY_CHANGE:
        assert any(name.startswith(free) if free.endswith(".") else name == free for name in settings), free
    counted = step_settings(settings)
    for name in settings:
        changed = settings_digest(settings | {name: "other"}) != settings_digest(settings)
        assert changed == (name in counted), name
    assert {name.partition(".")[0] for name in counted} == {
        "data", "model", "optimizer", "privacy", "sampling", "training"
    }  # fmt: skip
    assert not [
        name for name in settings if name.startswith(("privacy.", "optimizer.", "model.")) and name not in counted
    ]


def test_a_setting_whose_name_begins_like_a_free_one_counts() -> None:
    assert step_settings({"data.path": 1, "data.path_of_labels": 2, "run.dir": 3}) == {"data.path_of_labels": 2}
