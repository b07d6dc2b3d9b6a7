"""Directories of private runs with real ledgers, and exports of them, made without training."""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from dpdist import config as config_module
from dpdist.config import file as configfile
from dpdist.mechanism.accounting import ADJACENCY
from dpdist.mechanism.accounting import epsilon as computed
from dpdist.mechanism.composition import Phase, charged_phases, total_cost
from dpdist.mechanism.keys import Secret
from dpdist.mechanism.ledger import Ledger, Plan, PrivacyTerms
from dpdist.release.export import shareable
from dpdist.release.statement import as_text, statement
from dpdist.run.calibration import best_order
from dpdist.run.directory import write_atomically
from dpdist.run.fingerprints import params_digest
from dpdist.run.layout import RunPaths

#: Many runs of a test are alike.
epsilon = functools.cache(computed)


def config_of(**sections: dict[str, Any]) -> config_module.Config:
    """A small private config, with other settings by section."""
    base: dict[str, dict[str, Any]] = {
        "privacy": {"noise_multiplier": 2.0, "delta": 1e-5},
        "sampling": {"expected_batch_size": 10},
        "training": {"steps": 100},
    }
    return config_module.from_dict({name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


def private_run(
    root: Path,
    *,
    q: float = 0.01,
    sigma: float = 2.0,
    steps: int = 100,
    delta: float = 1e-5,
    size: int = 1000,
    done: bool = True,
    data_tag: bytes = b"",
    **sections: dict[str, Any],
) -> Path:
    """A run that has begun, and taken all steps where it is `done`.

    Args:
        data_tag: the fingerprint of its data.
    """
    paths, spent = RunPaths(root), epsilon(sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta)
    paths.private.mkdir(parents=True)
    given = {"privacy": {"noise_multiplier": sigma, "delta": delta}, "training": {"steps": steps}}
    given["sampling"] = {"expected_batch_size": q * size}
    paths.config.write_text(configfile.dump(config_of(**given | sections)))
    secret = Secret.fresh()
    write_atomically(paths.secret, secret.reveal(), mode=0o600)
    terms = PrivacyTerms(
        clip_norm=1.0,
        noise_multiplier=sigma,
        delta=delta,
        epsilon=spent.epsilon,
        epsilon_rdp=spent.epsilon_rdp,
        accountant=spent.accountant,
        renyi_order=best_order(Phase(q, sigma, steps), delta),
        grid=2.0**-40,
        grid_slack=1e-6,
    )
    plan = Plan(
        incarnation=0,
        nonce=secrets.token_hex(32),
        environment="jax 0.10.2",
        adjacency=ADJACENCY,
        dataset_size=size,
        sampling_probability=q,
        expected_batch_size=q * size,
        steps=steps,
        steps_asked=steps,
        privacy=terms,
        data=secret.tag(b"data" + data_tag),
    )
    ledger = Ledger(paths.ledger)
    ledger.begin(plan)
    if done:
        ledger.reserve(0, steps)
    return root


def more(root: Path, *, steps: int, sigma: float, start: int = 100) -> None:
    """Another incarnation of a run, from `start` on."""
    from dataclasses import replace

    ledger = Ledger(RunPaths(root).ledger)
    first = ledger.plans[0]
    own = Phase(first.sampling_probability, sigma, steps - start)
    cost = total_cost(first, charged_phases(ledger, len(ledger.plans)), own)
    terms = replace(
        first.private_terms(),
        noise_multiplier=sigma,
        epsilon=cost.epsilon,
        epsilon_rdp=cost.epsilon_rdp,
        accountant=cost.accountant,
    )
    number = len(ledger.plans)
    ledger.begin(
        replace(
            first, incarnation=number, nonce=secrets.token_hex(32), start=start, steps=steps, steps_asked=steps,
            reasons=["a setting changed"], privacy=terms,
        )
    )  # fmt: skip
    ledger.reserve(start, steps)


def export_of(root: Path, to: Path) -> Path:
    """The statement of a run, as its export has it."""
    ledger = Ledger(RunPaths(root).ledger)
    config = config_module.from_dict(configfile.read(RunPaths(root).config))
    facts = statement(config, ledger, step=ledger.plans[-1].steps, finite=True)
    to.mkdir()
    (to / "privacy.json").write_text(json.dumps(facts))
    (to / "PRIVACY.md").write_text(as_text(facts))
    return to


def whole_export(root: Path, to: Path) -> Path:
    """A run's export with all its files, of made-up parameters."""
    facts = json.loads((export_of(root, to) / "privacy.json").read_text())
    params = {"dense": {"bias": np.zeros(2, np.float32), "kernel": np.ones((3, 2), np.float32)}}
    facts["params_sha256"] = params_digest(params)
    arrays = {f"dense/{name}": array for name, array in params["dense"].items()}
    metadata = {"params_sha256": facts["params_sha256"], "guarantee": facts["guarantee"]}
    save_file(arrays, to / "params.safetensors", metadata=metadata)
    config = config_module.from_dict(configfile.read(RunPaths(root).config))
    (to / "config.yaml").write_text(yaml.safe_dump(shareable(config)))
    (to / "model.json").write_text("{}")
    restate(to, facts)
    return to


def restate(export: Path, facts: dict[str, Any]) -> None:
    """Write a statement as a careful liar does: PRIVACY.md and all digests follow."""
    (export / "PRIVACY.md").write_text(as_text(facts))
    names = sorted(path.name for path in export.iterdir() if path.name != "privacy.json")
    facts["files"] = {name: hashlib.sha256((export / name).read_bytes()).hexdigest() for name in names}
    (export / "privacy.json").write_text(json.dumps(facts))


def edit(file: Path, **changes: Any) -> None:
    """Change, or with None remove, fields of a JSON file."""
    facts = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))
