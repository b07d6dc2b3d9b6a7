"""Tasks of `dpdist bench clipping` that are small enough to compile in a moment."""

from __future__ import annotations

from dpdist.config import Model
from dpdist_launch.measure.bench.tasks import Task

IMAGE = {"image": ((16, 16, 1), "uint8"), "label": ((), "int32")}
BOUNDS = {"image": 256, "label": 10}
MLP = Task(model=Model(name="mlp", options={"hidden": [8]}), example=IMAGE, bounds=BOUNDS, batch=6)
VIT = Task(
    model=Model(
        name="vit",
        options={"image_size": 16, "patch": 8, "width": 12, "depth": 2, "heads": 3, "mlp": 24},
    ),
    example={"image": ((16, 16, 3), "uint8"), "label": ((), "int32")},
    bounds=BOUNDS,
    batch=6,
)
