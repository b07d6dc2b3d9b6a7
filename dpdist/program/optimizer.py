"""Build the optax optimizer that a config names. It only ever sees the noisy mean gradient."""

from __future__ import annotations

import optax

from dpdist.config import Optimizer


def build(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Return the optimizer with its learning-rate schedule over `steps` steps."""
    rate = _schedule(config, steps)
    if config.name == "sgd":
        return optax.sgd(rate, momentum=config.momentum or None)
    if config.name == "adam":
        return optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)


def _schedule(config: Optimizer, steps: int) -> optax.Schedule:
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
