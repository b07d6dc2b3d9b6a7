"""What integer sums and noise cost over float32 ones, a step: `python cost.py cnn|vit ROUNDS`.

Both arms take whole steps of the same programs in turn; the float32 arm draws four float32 normals a coordinate, as dpdist
once did, in place of three float64 ones. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.step import Microbatch, StepPrograms, StepSpec, accumulate_sample, noisy_update
from dpdist.models import cross_entropy
from dpdist.models.small import cnn
from dpdist.models.vit import vit
from dpdist.program.update import initial_state, update_of

WHICH = {
    "cnn": (lambda example: cnn(example=example, classes=10), (28, 28, 1), 64, 256),
    "vit": (lambda example: vit(example=example, classes=100, variant="Ti/16", image_size=224), (224, 224, 3), 8, 64),
}


def main(which: str, rounds: int) -> None:
    build, shape, physical, batch = WHICH[which]
    example = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8), "label": jax.ShapeDtypeStruct((), jnp.int32)}
    model, random, keys = build(example), np.random.default_rng(0), Keys(Secret.from_insecure_seed(1), b"cost")
    loss = lambda params, one: (model.loss or cross_entropy)(model.apply(params, one), one)
    images, labels = random.integers(0, 256, (batch, *shape), dtype=np.uint8), np.arange(batch, dtype=np.int32) % 10
    initial = initial_state(model.init(jax.random.key(0)), optax.sgd(0.1), False)
    arms: dict[str, list[Any]] = {}
    for name, grid in (("float32", None), ("integer", 2.0**-37)):
        programs = StepPrograms(
            StepSpec(
                grad_sum=clipped_grad_sum(loss, clip_norm=1.0),
                state=initial,
                example=example,
                update=update_of(optax.sgd(0.1), average_decay=0.0),
                mesh=Mesh(np.array(jax.devices()[:1]), ("devices",)),
                batch_sizes=(physical,),
                normaliser=float(batch),
                clip_norm=1.0,
                noise_scale=None if grid is None else 1.0,
                grid=grid,
                placement="designated",
                randomised=False,
            )
        )
        arms[name] = [programs, programs.place(initial), programs.zero_sums()]
    parameters = arms["integer"][0].parameters

    @jax.jit
    def four_draws(keys: Any) -> Any:
        return sum(jax.random.normal(key, (parameters,), jnp.float32) for key in jax.random.split(keys, 4)) * 0.5

    four_draws(jax.random.key(0)).block_until_ready()
    rounds_of_batches = [
        {0: jax.device_put(Microbatch({"image": images[i:j], "label": labels[i:j]}, np.ones(physical, np.float32), labels[i:j]))}
        for i, j in ((start, start + physical) for start in range(0, batch, physical))
    ]

    def step(name: str, number: int) -> float:
        programs, state, sums = arms[name]
        began = time.perf_counter()
        sums = accumulate_sample(programs, state.params, sums, rounds_of_batches, programs.loss_key(keys, number))
        if name == "float32":
            four_draws(jax.random.key(number)).block_until_ready()
        state, sums, *_ = jax.block_until_ready(noisy_update(programs, state, sums, keys, number))
        arms[name][1:] = [state, sums]
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            seconds[name].append(step(name, number))
    ratios = [a / b for a, b in zip(seconds["integer"][1:], seconds["float32"][1:], strict=True)]
    print(
        json.dumps(
            {
                "model": which,
                "parameters": parameters,
                "batch": batch,
                "physical": physical,
                "rounds": rounds,
                "float32_seconds": statistics.median(seconds["float32"][1:]),
                "integer_seconds": statistics.median(seconds["integer"][1:]),
                "ratio": statistics.median(ratios),
                "ratio_p25": float(np.quantile(ratios, 0.25)),
                "ratio_p75": float(np.quantile(ratios, 0.75)),
                "jax": jax.__version__,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
