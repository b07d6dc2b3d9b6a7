"""Configs: what is read is what was written, and what cannot be meant is refused with field, value and remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dpdist import config
from dpdist.config import file as configfile
from dpdist.config.constraints import IsPath
from dpdist.config.section import fields_of
from dpdist.errors import InputError

SMALLEST: dict[str, dict[str, Any]] = {"training": {"steps": 3}, "privacy": {"delta": 1e-5, "noise_multiplier": 1.0}}
EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {steps: 3}\nprivacy: {delta: 1e-5, noise_multiplier: 1}\n")
    with path.open("a") as file:
        file.write("optimizer: {learning_rate: 0.1}\n")
    return path


def value_of(file: Path, override: str) -> Any:
    """The field that an override sets, in the config that comes of it."""
    return config.flatten(configfile.load(file, [override]))[override.partition("=")[0]]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("privacy.delta=1e-6", 1e-6),
        ("privacy.delta=0.00001", 1e-5),
        ("privacy.noise_multiplier=2", 2.0),
        ("privacy.target_epsilon=null", None),
        ("privacy.enabled=false", False),
        ("privacy.insecure_seed=7", 7),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.name=adamw", "adamw"),
        ("training.physical_batch_size=auto", "auto"),
        ("training.physical_batch_size=32", 32),
        ("model.options={hidden: [64, 32], activation: relu}", {"hidden": [64, 32], "activation": "relu"}),
        ("data.path=/data with spaces/a=b", "/data with spaces/a=b"),
        ("data.path=~/data with spaces/a=b", f"{Path.home()}/data with spaces/a=b"),
        ("run.dir=7", "7"),
        ("run.progress=off", "off"),
        ("data.path=2020-99-99", "2020-99-99"),
        ("data.path=1e3k", "1e3k"),
        ("data.path=True.north", "True.north"),
    ],
)
def test_an_override_is_read_as_it_is_meant(file: Path, override: str, value: Any) -> None:
    found = value_of(file, override)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_options_and_keep_the_rest(file: Path) -> None:
    loaded = configfile.load(file, ["model.options.hidden=[8]", "model.options.scale=16", "model.options.scale=4"])
    assert loaded.model.options == {"hidden": [8], "scale": 4}
    assert loaded.privacy.delta == 1e-5


@pytest.mark.parametrize(
    ("override", "field", "remedy"),
    [
        ("training.stepz=3", "training.stepz", "no such key; did you mean training.steps? training has steps, epochs"),
        ("training.zzz=3", "training.zzz", "no such key; training has steps, epochs"),
        ("optimizer.lr=3", "optimizer.lr", "did you mean optimizer.learning_rate? optimizer has"),
        ("training.learning_rate=3", "training.learning_rate", "did you mean optimizer.learning_rate? training has"),
        ("trainings.steps=3", "trainings", "no such section; did you mean training? the sections are data, model"),
        ("zzz.steps=3", "zzz", "no such section; the sections are data, model"),
        ("learning_rate=3", "override", "did you mean optimizer.learning_rate? write section.key=value"),
        ("optimizer.nmae", "override", "did you mean optimizer.name? write section.key=value"),
        ("optimizer.name=adaamw", "optimizer.name", "no such choice; did you mean adamw? give one of sgd, adam, adamw"),
        ("optimizer.name=3", "optimizer.name", "no such choice; give one of sgd"),
        ("training.clipping=Ghost", "training.clipping", "did you mean ghost? give one of auto, per_example"),
        ("training.physical_batch_size=atuo", "training.physical_batch_size", "did you mean auto? give int or auto"),
        ("training.clipping_strategies={a: gost}", "training.clipping_strategies.a", "did you mean ghost? give ghost"),
        ("data.options={a: 1, b: 2, a: 3}", "data.options", "a is given twice, on lines 1 and 1"),
        ("training.steps=3.5", "training.steps", "wrong type; give int"),
        ("training.steps=true", "training.steps", "wrong type; give int"),
        ("training.steps=0", "training.steps", "at least 1"),
        ("training.epochs=2", "training.steps", "not both"),
        ("training.physical_batch_size=0", "training.physical_batch_size", "at least 1, or auto"),
        ("training.physical_batch_size=many", "training.physical_batch_size", "wrong type"),
        ("training.evaluate_every=0", "training.evaluate_every", "at least 1"),
        ("training.evaluation_batch_size=0", "training.evaluation_batch_size", "at least 1"),
        ("training.clipping=sometimes", "training.clipping", "per_example"),
        ("privacy.enabled=no", "privacy.enabled", "wrong type; give bool"),
        ("privacy.enabled=0", "privacy.enabled", "wrong type; give bool"),
        ("privacy.delta=0", "privacy.delta", "between 0 and 1"),
        ("privacy.delta=1", "privacy.delta", "between 0 and 1"),
        ("privacy.delta=.nan", "privacy.delta", "between 0 and 1"),
        ("privacy.delta=null", "privacy.delta", "well below 1/N"),
        ("privacy.noise_multiplier=0", "privacy.noise_multiplier", "privacy.enabled=false"),
        ("privacy.noise_multiplier=-1", "privacy.noise_multiplier", "positive"),
        ("privacy.noise_multiplier=.inf", "privacy.noise_multiplier", "finite"),
        ("privacy.noise_multiplier=null", "privacy.target_epsilon", "give target_epsilon"),
        ("privacy.target_epsilon=0", "privacy.target_epsilon", "positive"),
        ("privacy.target_epsilon=.nan", "privacy.target_epsilon", "positive"),
        ("privacy.clip_norm=0", "privacy.clip_norm", "between 1e-6 and 1e6"),
        ("privacy.clip_norm=1e9", "privacy.clip_norm", "between 1e-6 and 1e6"),
        ("privacy.clip_norm=.nan", "privacy.clip_norm", "between 1e-6 and 1e6"),
        ("privacy.insecure_seed=1.5", "privacy.insecure_seed", "wrong type"),
        ("privacy.noise_placement=everywhere", "privacy.noise_placement", "designated"),
        ("sampling.expected_batch_size=0", "sampling.expected_batch_size", "positive"),
        ("sampling.expected_batch_size=.inf", "sampling.expected_batch_size", "positive"),
        ("sampling.assignment=random", "sampling.assignment", "balanced"),
        ("optimizer.name=lion", "optimizer.name", "adamw"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate", "positive"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate", "finite"),
        ("optimizer.momentum=1", "optimizer.momentum", "[0, 1)"),
        ("optimizer.average_decay=-0.1", "optimizer.average_decay", "[0, 1)"),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay", "optimizer.name=adamw"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps", "0 or more"),
        ("data.test_fraction=1", "data.test_fraction", "between 0 and 1"),
        ("data.workers=0", "data.workers", "at least 1"),
        ("data.worker_processes=-1", "data.worker_processes", "0 or more"),
        ("data.prefetch=0", "data.prefetch", "at least 1"),
        ("data.options=3", "data.options", "wrong type; give dict"),
        ("model.classes=1", "model.classes", "at least 2"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps", "at least 1"),
        ("checkpoint.keep=0", "checkpoint.keep", "at least 1"),
        ("cluster.devices_per_process=0", "cluster.devices_per_process", "at least 1"),
        ("cluster.platform=tpu", "cluster.platform", "gpu"),
        ("cluster.memory_per_device=0", "cluster.memory_per_device", "positive"),
        ("cluster.initialization_timeout=0", "cluster.initialization_timeout", "positive"),
        ("cluster.heartbeat_timeout=-1", "cluster.heartbeat_timeout", "positive"),
        ("cluster.shutdown_timeout=.inf", "cluster.shutdown_timeout", "wrong type; give int"),
        ("cluster.watchdog_timeout=0", "cluster.watchdog_timeout", "positive"),
        ("run.dir=''", "run.dir", "name a directory"),
        (f"run.dir=runs/{'é' * 128}/x", "run.dir", "a name in a path has at most 255 bytes"),
        ('run.dir="a\\0b"', "run.dir", "none of them 0"),
        ("run.dir=~no-such-user/x", "run.dir", "no home directory of that name is known"),
        ("run.plots=1", "run.plots", "wrong type; give bool"),
        ("run.log_every=0", "run.log_every", "at least 1"),
        ("privacy=3", "override", "'privacy=3': write section.key=value"),
        ("privacy.delta", "override", "'privacy.delta': write section.key=value"),
        ("training.steps=[", "training.steps", "not YAML"),
        ("training.steps.first=3", "training.steps.first", "holds a value"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(file: Path, override: str, field: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        configfile.load(file, [override])
    assert caught.value.field == field
    assert remedy in str(caught.value)
    assert str(caught.value).startswith(f"{field} = {caught.value.value!r}: ")


def test_a_section_made_in_python_is_checked_by_the_same_rules() -> None:
    for make, field, remedy in (
        (lambda: config.Optimizer(name="lion"), "optimizer.name", "no such choice"),
        (lambda: config.Optimizer(learning_rate="fast"), "optimizer.learning_rate", "wrong type; give float"),
        (lambda: config.Optimizer(learning_rate=-1), "optimizer.learning_rate", "positive"),
        (lambda: config.Training(steps=True), "training.steps", "wrong type; give int"),
        (lambda: config.Run(dir=3), "run.dir", "wrong type; give str"),
    ):
        with pytest.raises(InputError, match=remedy) as caught:
            make()
        assert caught.value.field == field
    assert config.Privacy(enabled=False, clip_norm=-1).clip_norm == -1  # means nothing, and so forbids nothing


def test_a_home_directory_is_expanded_in_every_path(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = {"run.dir", "data.path", "cluster.compilation_cache", "run.registry"}
    given = [*(f"{name}=~/there" for name in paths), "run.registry_dataset=mine"]
    found = config.flatten(configfile.load(file, given))
    assert {name: found[name] for name in paths} == dict.fromkeys(paths, f"{tmp_path}/home/there")
    assert config.Run(dir="~/there").dir == f"{tmp_path}/home/there"
    assert config.Run(dir=Path("~/there")).dir == f"{tmp_path}/home/there"
    assert config.Run(dir="./~/there").dir == "./~/there"
    declared = {
        f"{name}.{key}"
        for name, section in config.SECTIONS.items()
        for key, field in fields_of(section).items()
        if any(isinstance(each, IsPath) for each in field.constraints)
    }
    assert declared == paths


def test_every_number_a_user_gives_is_checked(file: Path) -> None:
    """A field of numbers that takes NaN, or minus a million, is one that nobody thought about."""
    seeds = {"privacy.insecure_seed", "training.seed", "data.split_seed"}  # any whole number will do
    for name, value in config.flatten(configfile.load(file)).items():
        annotation = {f.name: f.type for f in dataclasses.fields(config.SECTIONS[name.split(".")[0]])}[
            name.split(".")[1]
        ]
        if ("float" in annotation or "int" in annotation) and name not in seeds:
            for bad in (".nan", "-1000000"):
                if name == "training.epochs":
                    continue  # refused beside steps whatever it is
                with pytest.raises(InputError) as caught:
                    configfile.load(file, [f"{name}={bad}"])
                assert caught.value.field == name, (name, value, bad)


def test_privacy_is_not_left_to_a_default() -> None:
    """Neither delta nor the noise has one, so no run is private, or not, by accident."""
    with pytest.raises(InputError, match=r"privacy\.delta"):
        config.from_dict({"training": {"steps": 3}})
    with pytest.raises(InputError, match=r"privacy\.target_epsilon"):
        config.from_dict({"training": {"steps": 3}, "privacy": {"delta": 1e-5}})
    assert config.from_dict({"training": {"steps": 3}, "privacy": {"enabled": False}}).privacy.enabled is False


@pytest.mark.parametrize(
    "tree", [{"training": None}, {"training": [1]}, {"training": 3}, {3: {}}, {"training": {3: 1}}]
)
def test_a_tree_of_another_shape_is_refused(tree: Any) -> None:
    with pytest.raises(InputError):
        config.from_dict(tree)


def test_from_dict_leaves_its_argument_alone() -> None:
    tree = {"model": {"options": {"hidden": [3]}}} | SMALLEST
    config.from_dict(tree)
    assert tree == {"model": {"options": {"hidden": [3]}}} | SMALLEST


def test_a_config_survives_its_own_file(tmp_path: Path) -> None:
    first = config.from_dict(
        {
            "model": {"name": "mlp", "options": {"hidden": [64], "scale": 16.0}, "classes": 4},
            "optimizer": {"learning_rate": 1e-7},
            "data": {"path": "yes", "options": {"off": "no", "number": "1e-3"}},
            "run": {"dir": "1e3"},
        }
        | SMALLEST
    )
    (tmp_path / "config.yaml").write_text(configfile.dump(first))
    assert configfile.load(tmp_path / "config.yaml") == first


def test_the_run_directory_is_called_after_the_file_unless_it_is_named(file: Path) -> None:
    assert configfile.load(file).run.dir == "runs/mine"
    assert configfile.load(file, ["run.dir=elsewhere"]).run.dir == "elsewhere"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("training: {steps: 3", "cannot be read as YAML"),
        ("- training", "holds sections"),
        ("\0", "cannot be read as YAML"),
        ("training: !!python/object/apply:os.system [false]", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "given.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        configfile.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("privacy: {delta: 1e-5}\nrun: {}\nprivacy: {enabled: false}\n", "privacy is given twice, on lines 1 and 3"),
        ("privacy:\n  delta: 1\n  clip_norm: 1\n  delta: 2\n", "privacy.delta is given twice, on lines 2 and 4"),
        ("model: {options: {a: {b: 1, 'b': 2}}}", "model.options.a.b is given twice, on lines 1 and 1"),
        ("data: {options: {list: [{a: 1}, {a: 1,\n a: 2}]}}", "data.options.list.a is given twice, on lines 1 and 2"),
    ],
)
def test_a_section_or_key_that_is_given_twice_is_an_error_with_both_lines(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "given.yaml").write_text(text)
    with pytest.raises(InputError, match=f"{words}; keep one of them") as caught:
        configfile.load(tmp_path / "given.yaml")
    assert caught.value.value == str(tmp_path / "given.yaml")


def test_what_a_merge_brings_may_be_given_again(tmp_path: Path) -> None:
    """An anchor holds defaults, and an alias within itself is no endless walk."""
    path = tmp_path / "merged.yaml"
    path.write_text(
        "data: {options: &base {a: 1, b: 2, c: &loop [*loop]}}\nmodel: {options: {<<: *base, a: 3}}\n"
        "training: {steps: 3}\nprivacy: {enabled: false}\n"
    )
    assert {key: configfile.read(path)["model"]["options"][key] for key in "ab"} == {"a": 3, "b": 2}


def test_of_two_overrides_of_one_setting_the_later_counts(file: Path) -> None:
    assert configfile.load(file, ["training.steps=4", "training.steps=5"]).training.steps == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_configs_of_the_project_are_valid_and_say_what_they_cost(path: Path) -> None:
    configfile.load(path)
    head = path.read_text().split("\ndata:")[0]
    for word in ("command", "privacy", "cost", "result"):
        assert word in head
    assert len(EXAMPLES) >= 2
