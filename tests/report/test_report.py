"""The page shows what the files say, nothing private unless asked, and works without a network."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from private_runs import private_run
from scipy.stats import norm

from dpdist.joint.compose import compose
from dpdist.mechanism.accounting import epsilon as computed
from dpdist.mechanism.ledger import Ledger
from dpdist.report.charts import COLOURS, over_steps
from dpdist.report.words import meaning, true_positive_rate
from dpdist.run.layout import RunPaths
from dpdist_launch.cli import main

SECRET_LOSS = 1.7320508
#: Elements and attributes with which a page loads something.
LOADING = {"src", "href", "xlink:href", "action", "data", "srcset"}


def run_at(root: Path, *, learning_rate: float = 0.5, best: float = 0.9, **more: Any) -> Path:
    """A private run with metrics, a summary, events and private diagnostics."""
    private_run(root, optimizer={"learning_rate": learning_rate}, **more)
    paths = RunPaths(root)
    steps = [25, 50, 75, 100]
    records: list[dict[str, Any]] = [
        {"step": s, "epsilon": 0.01 * s, "examples_per_second": 1e4 + s, "seconds": 1.0} for s in steps
    ]
    records += [{"step": s, "accuracy": best * s / 100, "loss": 1 - s / 200, "epsilon": 0.01 * s} for s in steps]
    paths.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    shares = {"start_up": 0.1, "compile": 0.1, "training": 0.6, "evaluation": 0.1, "saving": 0.05, "lost": 0.05}
    summary = {
        "status": "finished", "step": 100, "steps": 100, "guarantee": "holds", "metrics": {"accuracy": best},
        "examples_per_second": 12345.6, "devices": 4,
        "goodput": {"shares": shares, "node_hours": 2.5, "queue_hours": None},
    }  # fmt: skip
    paths.summary.write_text(json.dumps(summary))
    told = [
        {"time": "2026-01-01T00:00:00Z", "event": "start", "step": 0, "steps": 100, "nodes": 2, "processes": 4},
        {"time": "2026-01-01T01:00:00Z", "event": "resume", "step": 50, "steps": 100, "nodes": 1, "processes": 2}
        | {"restarts": 1, "after": "interrupted"},
        {"time": "2026-01-01T02:00:00Z", "event": "finished", "step": 100, "status": "finished"},
    ]
    paths.events.write_text("".join(json.dumps(event) + "\n" for event in told))
    look = {"step": 0, "examples": 16, "not_finite": 0, "loss": SECRET_LOSS, "incarnation": 0}
    look["norms"] = {"p10": 0.1, "p50": 0.2, "p90": 0.3, "max": 0.4}
    paths.probe.write_text(json.dumps(look) + "\n" + json.dumps(look | {"step": 50}) + "\n")
    taken = [{"step": s, "examples": 10.0, "clipped": 4.0, "not_finite": 0.0, "incarnation": 0} for s in range(100)]
    paths.diagnostics.write_text("".join(json.dumps(step) + "\n" for step in taken))
    return root


class Page(HTMLParser):
    """What a page loads, its elements, and its text without styles."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self._style = False
        self.source = file.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._style = tag == "style"
        self.loads += [value for name, value in attrs if name in LOADING and value and not value.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data


def report(*arguments: object) -> Page:
    assert main(["report", *map(str, arguments)]) == 0
    return Page(Path(arguments[arguments.index("--to") + 1]))  # type: ignore[arg-type]


def test_a_run_is_told_in_words_numbers_curves_and_events_and_nothing_is_loaded(tmp_path: Path) -> None:
    run = run_at(tmp_path / "my run", steps=100)
    page = report(run, "--to", tmp_path / "page.html")
    epsilon = Ledger(run / "ledger.jsonl").plans[0].private_terms().epsilon
    shown = float(page.text.split("(", 1)[1].split(",")[0])
    assert epsilon <= shown <= epsilon * 1.001, "rounded up, in four digits"
    went_on = "went on from step 50 on 1 node(s): the part before was cut short"
    sizes = ("12,300", "2.5 node-hours", "training 60%")
    for text in ("my run", "1e-05)-differentially private", "0.9", *sizes, went_on, "optimizer.learning_rate"):
        assert text in page.text, text
    assert page.elements.count("svg") == 4  # accuracy, loss, epsilon, throughput
    assert page.loads == []
    assert "script" not in page.elements
    assert "url(http" not in page.source


def test_nothing_private_is_shown_unless_asked_and_then_it_says_so(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    public = report(run, "--to", tmp_path / "public.html")
    for secret in (
        "training loss",
        str(SECRET_LOSS),
        "clipped at",
        str(tmp_path),
        (run / "private/secret.key").read_bytes().hex(),
    ):
        assert secret not in public.source
    assert "public numbers only" in public.text
    private = report(run, "--private", "--to", tmp_path / "private.html")
    assert "PRIVATE: training loss" in private.source
    assert "no guarantee covers it" in private.text
    assert "public numbers only" not in private.text
    assert (tmp_path / "private.html").stat().st_mode & 0o077 == 0
    assert private.elements.count("svg") == 7
    public_files = {"config.yaml", "ledger.jsonl", "metrics.jsonl", "summary.json", "events.jsonl"}
    assert {path.name for path in run.iterdir()} == public_files | {"private"}, "it writes nothing into the run"


def test_a_comparison_shows_what_the_choice_costs_and_what_differs(tmp_path: Path) -> None:
    runs = [run_at(tmp_path / f"lr{rate}", learning_rate=rate, best=best) for rate, best in ((0.1, 0.8), (0.7, 0.85))]
    page = report(*runs, "--to", tmp_path / "page.html")
    together = compose(runs)
    largest = max(run["epsilon"] for run in together["runs"])
    shown = float(page.text.split("What they cost together")[1].split("(")[1].split(",")[0])
    assert largest < shown
    assert together["epsilon"] <= shown <= together["epsilon"] * 1.001
    table = page.text.split("Those in which the runs differ.")[1]
    assert ("optimizer.learning_rate" in table, "privacy.delta" in table) == (True, False)
    assert page.source.count(COLOURS[1]) > 0, "each run has its colour"
    two = [run_at(tmp_path / place / "same", learning_rate=0.1) for place in ("a", "b")]
    assert "same (1)" in report(*two, "--to", tmp_path / "page.html").text


def test_a_sweep_stands_for_its_points_that_have_begun(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name in ("a", "b"):
        run_at(sweep / name)
    (sweep / "c").mkdir()
    asked = [{"name": name, "settings": {}, "digest": "", "data": ""} for name in ("a", "b", "c")]
    (sweep / "sweep.json").write_text(json.dumps({"asked": [asked]}))
    page = report(sweep, "--title", "Sweep", "--to", tmp_path / "page.html")
    assert "2 runs" in page.text
    assert "c has not begun" in page.text
    run_at(tmp_path / "another")
    (tmp_path / "notes").mkdir()
    folder = report(tmp_path, "--title", "All of a folder", "--to", tmp_path / "page.html")
    assert "3 runs" in folder.text
    assert "c has not begun" in folder.text
    (tmp_path / "search").mkdir()
    (tmp_path / "search/search.json").write_text("{}")
    assert main(["report", str(tmp_path), "--to", str(tmp_path / "page.html")]) == 2, "a search is not left out unseen"


@pytest.mark.parametrize("broken", ["plain", "open", "ledger", "summary"])
def test_where_no_guarantee_holds_the_page_claims_none(broken: str, tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    paths, words = RunPaths(run), "No privacy guarantee"
    if broken == "plain":
        told = json.loads(paths.summary.read_text()) | {"guarantee": "none: this is the plain arm"}
        paths.summary.write_text(json.dumps(told))
    elif broken == "open":
        paths.secret.chmod(0o644)
    elif broken == "ledger":
        text = paths.ledger.read_text()
        epsilon = json.loads(text.splitlines()[0])["epsilon"]
        paths.ledger.write_text(text.replace(json.dumps(epsilon), json.dumps(epsilon / 2)))
        words = "Unknown: what the run is charged cannot be read"
    else:
        paths.summary.write_text('{"status": "fini')
        words = "summary.json is not whole"
    page = report(run, "--to", tmp_path / "page.html")
    assert words in page.text
    assert ("-differentially private" in page.text) == (broken == "summary")


def test_names_and_values_cannot_become_code(tmp_path: Path) -> None:
    run = run_at(tmp_path / "<script>alert(1)<" / "$x$ & <b>")
    record = {"step": 100, "<img onerror=x>": 0.5, "epsilon": 1.0}
    with RunPaths(run).metrics.open("a") as file:
        file.write(json.dumps(record) + "\n")
    page = report(run, run_at(tmp_path / "other"), "--to", tmp_path / "page.html")
    assert not {"script", "img", "b"} & set(page.elements) - {"b"}
    assert "$x$ & <b>" in page.text


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (["run", "--to", "page.pdf"], "--to = "),
        (["run", "--to", "no/such/page.html"], "--to = "),
        (["nothing", "--to", "page.html"], "RUN = "),
        (["run", "--to", "page.html", "--audit", "run/summary.json"], "--audit = "),
        (["search", "--to", "page.html"], "its trials are private"),
    ],
)
def test_what_cannot_be_reported_is_named(
    given: list[str], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_at(tmp_path / "run")
    run_at(tmp_path / "search")
    (tmp_path / "search/search.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *given]) == 2
    assert field in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", '{"metrics": 3}'),
        ("summary.json", '{"mfu": "a"}'),
        ("summary.json", '{"goodput": {"shares": {}}}'),
        ("summary.json", "[" * 100_000),
        ("metrics.jsonl", '[1]\n{"step": "x"}\n3\n'),
        ("events.jsonl", '[1]\n{"event": 3}\n'),
    ],
)
def test_files_that_somebody_has_edited_are_left_aside(file: str, text: str, tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    (run / file).write_text(text)
    page = report(run, "--to", tmp_path / "page.html")
    assert ("summary.json is not whole" in page.text) == (file == "summary.json")


@pytest.mark.parametrize("asked", ['{"asked": 3}', '{"asked": [[{"nam": 1}]]}', "[" * 100_000])
def test_a_sweep_that_is_not_whole_is_named(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(asked)
    assert main(["report", str(tmp_path), "--to", str(tmp_path / "page.html")]) == 2
    assert "sweep.json is not whole" in capsys.readouterr().err


@pytest.mark.parametrize(("lower", "words"), [(1.5, "can refute a guarantee"), (2.5, "claims are refuted")])
def test_an_audit_is_shown_for_what_it_is(lower: float, words: str, tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    audit = {"epsilon_lower": lower, "epsilon_claimed": 2.0, "confidence": 0.95, "more": []}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    page = report(run, "--audit", tmp_path / "audit.json", "--to", tmp_path / "page.html")
    assert words in page.text
    assert ("claims are refuted" in page.text) == (lower > 2)
    assert "confidence 95%" in page.text
    assert "not this run's" in page.text
    (tmp_path / "audit.json").write_text(json.dumps(audit | {"epsilon_claimed": math.nan}))
    assert main(["report", str(run), "--audit", str(tmp_path / "audit.json"), "--to", str(tmp_path / "x.html")]) == 2


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_no_test_of_a_gaussian_mechanism_finds_more_than_the_words_say(mu: float) -> None:
    """The best test of N(0, 1) against N(mu, 1) is known: its power is Phi(mu - z)."""
    for epsilon in (0.5, 1.0, 3.0, 8.0):
        delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        for rate in (1e-4, 0.01, 0.2):
            power = norm.cdf(mu - norm.isf(rate))
            assert power <= true_positive_rate(epsilon, delta, rate) <= 1
    assert true_positive_rate(0.0, 0.0, 0.01) == pytest.approx(0.01)


def test_what_an_attacker_finds_is_told_by_the_curve_as_dpdist_privacy_attack_does() -> None:
    plan = {"noise_multiplier": 1.0, "sampling_probability": 1.0, "steps": 1}
    spent = computed(**plan, delta=1e-5)
    facts = plan | {"epsilon": spent.epsilon, "delta": 1e-5, "unit": "one training record", "incarnations": [{}]}
    share = float(meaning(facts)[1].rsplit("at most ")[1].split("%")[0]) / 100
    exact = norm.cdf(1 - norm.isf(0.01))  # of one Gaussian step: the best test is known
    assert exact <= share <= exact * 1.02
    assert share < true_positive_rate(spent.epsilon, 1e-5, 0.01) / 3


def test_a_run_that_has_not_ended_is_told_as_that(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    RunPaths(run).summary.unlink()
    events = RunPaths(run).events
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:-1]))
    page = report(run, "--to", tmp_path / "page.html")
    assert "not ended" in page.text
    assert "100 of 100" in page.text, "the step of the newest metrics"


@pytest.mark.parametrize(("epsilon", "word"), [(0.5, "strong"), (8.0, "usual"), (50.0, "WEAK")])
def test_the_words_fit_the_number(epsilon: float, word: str) -> None:
    facts = {"epsilon": epsilon, "delta": 1e-5, "unit": "one training record, not one person", "incarnations": [{}, {}]}
    said = " ".join(meaning(facts))
    assert word in said
    assert [other in said for other in ("strong", "usual", "WEAK")].count(True) == 1


def test_the_same_picture_is_the_same_text_in_the_pages_colours() -> None:
    lines = {"a": [(1, 1.0), (2, 2000.0)], "b": [(1, 3.0)]}
    assert over_steps("metric", lines) == over_steps("metric", lines)
    assert "currentColor" in over_steps("metric", lines)
    assert "#000000" not in over_steps("metric", lines)


@pytest.mark.wait
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_it_and_asks_for_nothing(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    report(run, "--to", tmp_path / "page.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command += ["--window-size=1150,2600", f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (tmp_path / "page.png").stat().st_size > 50_000, done.stderr
    assert "Content Security Policy" not in done.stderr
