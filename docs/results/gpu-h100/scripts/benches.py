"""One model's clipping arms on this device; nothing measured is lost to a cut-off. usage:
benches.py MODEL BATCH DTYPE --to DIR [--limit SECONDS] [--rounds 5] [--seconds 0.2] [--arms a,b] [--peers]
Every arm is compiled, run and timed before the next one is compiled; DIR/benches.jsonl has a line an arm at once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

BEGAN = time.time()
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("batch", type=int)
parser.add_argument("dtype", choices=["float32", "bfloat16"])
parser.add_argument("--to", required=True, type=Path)
parser.add_argument("--limit", type=float, default=170)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=0.2)
parser.add_argument("--arms", default="sgd,auto-gpu,auto,bookkeeping,per_example,jax-masked")
parser.add_argument("--peers", action="store_true")
args = parser.parse_args()
END = BEGAN + args.limit
ROWS: dict[str, dict] = {}
LABEL = f"{args.model} p={args.batch} {args.dtype}"
args.to.mkdir(parents=True, exist_ok=True)
FILE = open(args.to / "benches.jsonl", "a")


def note(kind: str, **values):
    FILE.write(json.dumps({"kind": kind, "model": args.model, "batch": args.batch, "dtype": args.dtype, "at": round(time.time() - BEGAN, 1), **values}, default=str) + "\n")
    FILE.flush()
    print(f"{kind}: " + " ".join(f"{k}={v}" for k, v in values.items())[:400], flush=True)


def table(why: str) -> None:
    lines = [f"| {LABEL} ({why}) | ms | x sgd | compile s | temp MiB | GFLOP | difference |", "| --- | --- | --- | --- | --- | --- | --- |"]
    base = ROWS.get("sgd", {}).get("ms")
    for name, r in list(ROWS.items()):
        if "failed" in r:
            lines.append(f"| {name} | {r['failed'][:90]} | | | | | |")
            continue
        spread = f"{r['ratio']:.2f} ({r['ratio_p25']:.2f}-{r['ratio_p75']:.2f})" if "ratio" in r else (f"{r['ms'] / base:.2f}*" if base else "")
        mark = "c" if r.get("cached") else ""
        lines.append(f"| {name} | {r.get('ms_rounds', r['ms']):.2f} | {spread} | {r.get('compile_s') or 0:.1f}{mark} | {r.get('temp_mib') or 0:.0f} | {r.get('gflop') or 0:.0f} | {r.get('difference', float('nan')):.1e} |")
    text = "\n".join(lines) + "\n"
    (args.to / f"table-{args.model}-{args.dtype}.md").write_text(text)
    print(text, flush=True)


def last_words(why):
    def say(*_):
        try:
            table(why)
        finally:
            os._exit(3)

    return say


# A compilation does not return to Python, so a thread ends the program.
watch = threading.Timer(max(1, END - time.time() - 2), last_words("cut off"))
watch.daemon = True
watch.start()
signal.signal(signal.SIGTERM, last_words("terminated"))

import jax  # noqa: E402
import numpy as np  # noqa: E402

HITS = [0]
jax.monitoring.register_event_listener(lambda event, **_: HITS.__setitem__(0, HITS[0] + (event == "/jax/compilation_cache/cache_hits")))

from dpdist.config import Model  # noqa: E402
from dpdist.machines import machine  # noqa: E402
from dpdist.mechanism.clipping import clipped_grad_sum, plan_clipping  # noqa: E402
from launch.bench.arms import jax_arm  # noqa: E402
from launch.bench.clipping import distance  # noqa: E402
from launch.bench.program import Arm, jax_program  # noqa: E402
from launch.bench.rounds import interleaved, ratios  # noqa: E402
from launch.bench.tasks import TASKS, problem_of  # noqa: E402

DEVICE = jax.devices()[0]
RATES = machine(DEVICE.device_kind, DEVICE.platform)


def auto_gpu() -> Arm:
    """`auto` as training would have it on this device."""
    return Arm(name="auto-gpu", framework="jax", private=True, prepare=lambda problem: jax_program(
        clipped_grad_sum(problem.loss, clip_norm=problem.clip_norm, method="auto", machine=RATES), problem))


def arm_of(name: str) -> Arm:
    if name == "auto-gpu":
        return auto_gpu()
    if name == "jax_privacy":
        from launch.bench.peers.jax_privacy_arm import jax_privacy_arm

        return jax_privacy_arm()
    return jax_arm(name)


def main() -> None:
    task = TASKS[args.model]
    options = dict(task.model.options)
    if args.dtype != "float32":
        options["dtype"] = args.dtype
        task = dataclasses.replace(task, model=dataclasses.replace(task.model, options=options))
    began = time.time()
    problem = problem_of(task, args.batch)
    jax.block_until_ready(problem.params)
    note("problem", seconds=round(time.time() - began, 1), device=DEVICE.device_kind, rates=RATES,
         parameters=sum(leaf.size for leaf in jax.tree.leaves(problem.params)), before=round(began - BEGAN, 1))
    names = args.arms.split(",")
    strategies = {}
    try:
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.batch)
        for name, how in (("auto-gpu", dict(machine=RATES)), ("auto", {}), ("bookkeeping", dict(method="bookkeeping"))):
            plan = plan_clipping(problem.loss, problem.params, example, **how)
            strategies[name] = {leaf.path: leaf.strategy for leaf in plan}
            chosen = list(strategies[name].values())
            note("plan", arm=name, ghost=chosen.count("ghost"), instantiate=chosen.count("instantiate"))
    except Exception as error:
        note("plan", failed=f"{type(error).__name__}: {error}"[:300])
    programs, reference, slowest = {}, {}, 0.0
    if args.peers:
        names.append("jax_privacy")
    for name in names:
        if name == "auto" and strategies.get("auto") and strategies.get("auto") == strategies.get("auto-gpu") and "auto-gpu" in names:
            note("arm", arm=name, same_as="auto-gpu")
            continue
        if name == "bookkeeping" and strategies.get(name) and strategies[name] == strategies.get("auto-gpu") and "auto-gpu" in names:
            note("arm", arm=name, same_as="auto-gpu")
            continue
        # Compilations of one model take about as long as each other; the rounds need some seconds.
        if time.time() + 1.3 * slowest + 10 > END:
            note("arm", arm=name, skipped="no time left")
            continue
        began, HITS[0] = time.time(), 0
        try:
            arm = arm_of(name)
            program = arm.prepare(problem)
            hits = HITS[0]
            prepared = time.time() - began
            times = []
            result = program.run()
            while len(times) < 10 or sum(times) < 0.3:
                at = time.perf_counter()
                program.run()
                times.append(time.perf_counter() - at)
                if len(times) >= 3 and sum(times) > 5 or len(times) >= 50:
                    break
            memory = DEVICE.memory_stats() or {}
            row = {"ms": 1e3 * float(np.median(times)), "ms_p25": 1e3 * float(np.percentile(times, 25)), "ms_p75": 1e3 * float(np.percentile(times, 75)),
                   "calls": len(times), "compile_s": program.compiled.seconds, "cached": hits > 0, "temp_mib": program.compiled.temp_bytes / 2**20,
                   "arguments_outputs_mib": (program.compiled.memory - program.compiled.temp_bytes) / 2**20,
                   "gflop": (program.compiled.flops or 0) / 1e9, "peak_mib_so_far": memory.get("peak_bytes_in_use", 0) / 2**20}
            ROWS[name] = row
            note("arm", arm=name, **{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            sums = program.read(result)
            del result
            row["difference"] = distance(sums, reference.setdefault(arm.private, sums))
            note("difference", arm=name, to="its kind's first arm", value=row["difference"], finite=bool(all(np.isfinite(v).all() for v in sums.values())))
            programs[name] = program
            slowest = max(slowest, prepared + 2)
        except Exception as error:
            ROWS[name] = {"failed": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
            note("arm", arm=name, **ROWS[name])
            slowest = max(slowest, time.time() - began)
    if len(programs) > 1:
        # As many rounds as fit what is left.
        one = sum(max(args.seconds, ROWS[n]["ms"] / 1e3) + ROWS[n]["ms"] / 1e3 for n in programs)
        rounds = max(1, min(args.rounds, int((END - time.time() - 4) / one)))
        times = interleaved({n: p.run for n, p in programs.items()}, rounds=rounds, seconds=args.seconds)
        for name, own in times.items():
            ROWS[name]["ms_rounds"] = 1e3 * float(np.median(own))
            if "sgd" in times:
                ROWS[name] |= ratios(own, times["sgd"])
            note("rounds", arm=name, rounds=rounds, ms=ROWS[name]["ms_rounds"], ratio=ROWS[name].get("ratio"), by_round=[round(1e3 * t, 4) for t in own])
    watch.cancel()
    table("complete")


if __name__ == "__main__":
    main()
