"""Tables, plots and checks of a sweep's report, from points that are made up."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from dpdist.errors import InputError
from dpdist_launch.measure.scaling import report
from dpdist_launch.measure.scaling.arms import ARMS, DP, SGD, SGD_SYNC
from dpdist_launch.measure.scaling.directory import Point, SweepDirectory, grid
from dpdist_launch.measure.scaling.markdown import shares_cores
from dpdist_launch.measure.scaling.model import speed_up

NODES, REPEATS = (1, 2, 4), 3
#: Examples per second on one node, and Amdahl's fraction.
TRUTH = {DP: (400.0, 0.98), SGD: (1000.0, 0.9), SGD_SYNC: (800.0, 0.5)}
DESCRIPTION = {
    "command": ["dpdist", "scaling", "configs/x.yaml", "model.options={a: 1}", "--nodes", "1,2,4"],
    "measured": {"model.name": "cnn", "data.source": "idx", "privacy.delta": 1e-5, "--cluster": "slurm"},
}


def measured(point: Point, **changes: Any) -> dict[str, Any]:
    rate, fraction = TRUTH[point.arm]
    rate *= speed_up(point.nodes, 1, fraction) * (1 + 0.01 * (point.repeat - 2))
    numbers = {
        "arm": point.arm,
        "nodes": point.nodes,
        "repeat": point.repeat,
        "processes": 4 * point.nodes,
        "devices": 4 * point.nodes,
        "steps": 20,
        "examples_per_second": rate,
        "examples_per_second_per_device": rate / 4 / point.nodes,
        "step_seconds": 512 / rate,
        "step_seconds_p10": 500 / rate,
        "step_seconds_p90": 600 / rate,
        "compile_seconds": 12.5,
        "padding": 0.0625,
        "imbalance": 1.25,
        "microbatches_per_step": 6.0,
        "all_reduce_seconds": 0.0125,
        "all_reduces_per_step": {DP: 2, SGD: 1, SGD_SYNC: 6}[point.arm],
        "all_reduce_share": 0.375,
        "epsilon": 2.75 if point.arm == DP else None,
        "physical_batch_size": 32,
        "expected_batch_size": 512.0,
        "parameters": 26010,
        "hardware": {
            "platform": "gpu",
            "device_kind": "Tesla V100",
            "machine": "x86_64",
            "hosts": point.nodes,
            "processes_per_host": 4,
            "cores_per_host": 40,
            "peak_resident_bytes": 10**9,
            "peak_device_bytes": 2 * 10**9,
        },
        "versions": {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2", "dpdist": "0.1.0", "code": "abcdef"},
        "started": f"2030-01-0{point.repeat}T00:00:00+00:00",
        "seconds": 60.0,
    }
    return numbers | changes


def sweep_of(root: Path, points: list[Point]) -> SweepDirectory:
    directory = SweepDirectory(root)
    directory.begin(DESCRIPTION, points)
    for point in points:
        directory.result(point).write_text(json.dumps(measured(point)))
    return directory


@pytest.fixture
def whole(tmp_path: Path) -> SweepDirectory:
    return sweep_of(tmp_path, grid(NODES, list(ARMS), REPEATS))


def test_the_csv_has_a_row_a_point(whole: SweepDirectory) -> None:
    report.write(whole)
    with (whole.root / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(NODES) * len(ARMS) * REPEATS
    row = next(r for r in rows if (r["arm"], r["nodes"], r["repeat"]) == (DP, "4", "2"))
    assert float(row["examples_per_second"]) == measured(Point(arm=DP, nodes=4, repeat=2))["examples_per_second"]
    assert row["hardware.device_kind"] == "Tesla V100"
    assert row["versions.jax"] == "0.10.2"
    assert next(r for r in rows if r["arm"] == SGD)["epsilon"] == ""


def test_the_json_has_points_spreads_and_the_model(whole: SweepDirectory) -> None:
    report.write(whole)
    content = json.loads((whole.root / "scaling.json").read_text())
    assert len(content["points"]) == len(NODES) * len(ARMS) * REPEATS
    assert (content["missing"], content["base"]) == ({}, 1)
    for arm, (rate, fraction) in TRUTH.items():
        found = content["arms"][arm]
        assert found["parallel_fraction"] == pytest.approx(fraction, abs=0.002)  # 1/X of the repeats is not symmetric
        assert found["smallest"] == 1
        for nodes in NODES:
            at = found["nodes"][str(nodes)]
            expected = rate * speed_up(nodes, 1, fraction)
            spread = {"mean": expected, "min": 0.99 * expected, "max": 1.01 * expected, "std": 0.01 * expected}
            assert at["examples_per_second"] == pytest.approx(spread)
            assert at["fraction_of_ideal"]["mean"] == pytest.approx(speed_up(nodes, 1, fraction) / nodes)
            assert at["repeats"] == REPEATS


def test_the_page_says_what_one_wants_to_know(whole: SweepDirectory) -> None:
    page = report.write(whole).read_text()
    lines = page.splitlines()
    # 400 and 1000 on one node; on four 400 / (0.02 + 0.98 / 4) = 1509 and 1000 / (0.1 + 0.9 / 4) = 3077.
    assert "| nodes | devices | dp | sgd | sgd-sync-every-batch | dp / sgd |" in lines
    assert "| 1 | 4 | 400 ± 4 | 1,000 ± 10 | 800 ± 8 | 0.400 |" in lines
    assert "| 4 | 16 | 1,509 ± 15 | 3,077 ± 31 | 1,280 ± 13 | 0.491 |" in lines
    assert "| 4 | 0.943 ± 0.009 | 0.769 ± 0.008 | 0.400 ± 0.004 |" in lines
    assert next(line for line in lines if line.startswith("| Amdahl's f | 0.98"))
    assert "| 4 | sgd-sync-every-batch | 400.0 | 32 | 6 | 6 | 12.5 | 37.5% | 6.2% | 1.250 | 12.5 |" in lines
    for words in (
        "`dpdist scaling configs/x.yaml 'model.options={a: 1}' --nodes 1,2,4`",
        "Tesla V100 (x86_64), hosts: 1, 2, 4",
        "jax 0.10.2",
        "epsilon 2.75 at every node count (delta 1e-05)",
        "2030-01-01T00:00:00+00:00 to 2030-01-03",
    ):
        assert words in page
    assert "Note" not in page
    for name in ("throughput", "fraction_of_ideal", "amdahl"):
        assert f"]({name}.png)" in page
        width, height = struct.unpack(">II", (whole.root / f"{name}.png").read_bytes()[16:24])
        assert width > 700
        assert height > 400


@pytest.mark.parametrize(
    ("points", "present"),
    [
        (grid((2,), [SGD], 1), "| 2 | 8 |"),  # one arm, one count, one repeat: no ratio, no fit, no spread
        (grid((1, 4), [DP], 1), "| 4 | 16 | 1,494 |"),
        ([*grid((1, 2), [DP], 1), *grid((1,), [SGD], 1)], "| 2 | 8 | 776 |  |  |"),
    ],
)
def test_a_part_of_a_sweep_is_reported_too(points: list[Point], present: str, tmp_path: Path) -> None:
    directory = sweep_of(tmp_path, points)
    assert present in report.write(directory).read_text()


def test_all_arms_are_compared_to_one_base(whole: SweepDirectory) -> None:
    """Without one arm's points on one node, its fraction would be 1 where that of the others is far less."""
    for repeat in range(1, REPEATS + 1):
        whole.result(Point(arm=SGD, nodes=1, repeat=repeat)).unlink()
    page = report.write(whole).read_text()
    assert "at 2 nodes, the base," in page
    assert "(At 1 node, not every arm was measured.)" in page
    assert next(line for line in page.splitlines() if line.startswith("| 2 | 1.000 ± 0.010 | 1.000 ± 0.010 | 1.000"))
    for arm in (DP, SGD_SYNC):
        for nodes in (2, 4):
            for repeat in range(1, REPEATS + 1):
                whole.result(Point(arm=arm, nodes=nodes, repeat=repeat)).unlink()
    page = report.write(whole).read_text()
    assert "there is no base that all of them could be compared to" in page
    assert "1.000" not in page


def test_a_law_that_does_not_describe_the_points_is_left_out(whole: SweepDirectory) -> None:
    assert "off by (root mean square) | 0.8% | 0.8% | 0.8% |" in report.write(whole).read_text()
    for repeat in range(1, REPEATS + 1):  # as where four nodes share what two had for themselves
        point = Point(arm=SGD, nodes=4, repeat=repeat)
        whole.result(point).write_text(json.dumps(measured(point, examples_per_second=700.0)))
    page = report.write(whole).read_text()
    assert "Amdahl's law does not describe sgd: its best fit is off by " in page
    assert next(line for line in page.splitlines() if line.startswith("| Amdahl's f | 0.98") and "|  |" in line)
    assert json.loads((whole.root / "scaling.json").read_text())["arms"][SGD]["parallel_fraction"] is None


def test_what_is_missing_is_noted(whole: SweepDirectory) -> None:
    whole.result(Point(arm=DP, nodes=4, repeat=1)).unlink()
    assert "Not measured (yet): dp-n4-r1." in report.write(whole).read_text()


def test_points_of_another_epsilon_are_named(whole: SweepDirectory) -> None:
    odd = Point(arm=DP, nodes=2, repeat=3)
    whole.result(odd).write_text(json.dumps(measured(odd, epsilon=2.75 + 1e-12)))
    with pytest.raises(InputError) as caught:
        report.write(whole)
    assert str(caught.value).startswith("epsilon = ")
    assert "2.750000000001 at dp-n2-r3" in str(caught.value)
    assert "2.75 at dp-n1-r1, " in str(caught.value)
    assert not (whole.root / "scaling.md").exists()


def test_an_unfair_comparison_is_noted(whole: SweepDirectory) -> None:
    odd = Point(arm=SGD, nodes=2, repeat=1)
    whole.result(odd).write_text(json.dumps(measured(odd, physical_batch_size=64)))
    assert "At 2 nodes the physical batches differ (32, 64)" in report.write(whole).read_text()


def test_nodes_that_share_cores_are_noted(whole: SweepDirectory) -> None:
    for point in whole.points():
        numbers = measured(point)
        numbers["hardware"] |= {"hosts": 1, "processes_per_host": 4 * point.nodes, "cores_per_host": 2}
        whole.result(point).write_text(json.dumps(numbers))
    page = report.write(whole).read_text()
    assert "Up to 4 nodes were 16 processes on 1 host(s) of 2 cores" in page
    assert "these curves show overhead, not speed" in page


@pytest.mark.parametrize(
    ("nodes", "hosts", "processes", "cores", "shared"),
    [(2, 2, 4, 4, False), (2, 2, 5, 4, True), (2, 1, 2, 64, True), (1, 1, 1, 1, False)],
)
def test_when_cores_are_shared(nodes: int, hosts: int, processes: int, cores: int, shared: bool) -> None:
    hardware = {"hosts": hosts, "processes_per_host": processes, "cores_per_host": cores}
    assert shares_cores({"nodes": nodes, "hardware": hardware}) is shared
