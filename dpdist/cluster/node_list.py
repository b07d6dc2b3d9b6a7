"""The nodes of a SLURM step, from its environment, and which ranks are on which."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping


def expand(node_list: str) -> list[str]:
    """SLURM's list of nodes, one by one: `n[08-10],a1` -> n08, n09, n10, a1; several brackets in a name multiply."""
    names = []
    for item in re.findall(r"(?:[^\[\],\s]|\[[^\[\]]*\])+", node_list):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # text and brackets in turns
        choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def node_of_rank(environ: Mapping[str, str]) -> Callable[[int], str | None]:
    """A function from a rank to its node; it says None where the step's layout is not known, or not in blocks."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, repeat in counts for _ in range(int(repeat or 1))]
    nodes = expand(environ.get("SLURM_STEP_NODELIST", ""))
    known = environ.get("SLURM_DISTRIBUTION", "block").startswith("block") and len(nodes) == len(tasks)
    names = [node for node, count in zip(nodes, tasks, strict=False) for _ in range(count)] if known else []
    return lambda rank: names[rank] if rank < len(names) else None


def _numbers(bracket: str) -> list[str]:
    """`08-10,3` -> 08, 09, 10, 3."""
    found = []
    for part in bracket.split(","):
        low, _, high = part.strip().partition("-")
        found += [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
    return found
