"""The progress of a run: a bar on a terminal, a line every few seconds in a log.

It has no clock of its own. When a line comes, and the time left that it tells, would say how long single steps took,
and so how large their samples were; both follow from times that `dpdist.run.recorder` has made public.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dpdist.run.private_log import public_stderr

_LINE_SECONDS = 5.0
#: Names that would not fit.
_SHORT = {"accuracy": "acc", "perplexity": "ppl", "token_accuracy": "acc"}


class ProgressLine:
    """Step, epsilon spent of target, examples/s and time left; public numbers only.

    Args:
        steps: the last step.
        start: the step at which this part of the run begins.
        budget: the epsilon to compare with (the target, or the plan's epsilon); None without privacy.
        style: `bar`, `lines`, `off`, or `auto`: a bar where stderr is a terminal.
    """

    def __init__(
        self, *, steps: int, start: int, budget: float | None, style: Literal["auto", "bar", "lines", "off"]
    ) -> None:
        if style == "auto":
            style = "bar" if public_stderr().isatty() else "lines"
        self._steps, self._start, self._budget = steps, start, budget
        self._shown, self._lines = start, style == "lines"
        self._bar = None
        self._metric = ""
        if style == "bar":
            self._bar = Progress(
                BarColumn(bar_width=12), TextColumn("{task.description}"), console=Console(file=public_stderr())
            )
            self._bar.start()
            self._task = self._bar.add_task("first step", total=steps, completed=start)

    def show_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Add the first of the newest test metrics to what is shown."""
        for name, value in list(metrics.items())[:1]:
            self._metric = f" | {_SHORT.get(name, name)} {'-' if value is None else f'{value:.4g}'}"

    def update(
        self, step: int, epsilon: float | None, examples_per_second: float | None, step_seconds: float | None
    ) -> None:
        """Show the state after `step` steps; lines appear about every five seconds, and at the end.

        Args:
            step_seconds: the mean time of a step so far, of those whose time is public; None before there are any.
        """
        apart = 1 if step_seconds is None else max(1, round(_LINE_SECONDS / max(step_seconds, 1e-9)))
        if self._bar is None and (not self._lines or (step - self._shown < apart and step < self._steps)):
            return
        self._shown = step
        remaining = self._steps - step
        left = "-" if step_seconds is None and remaining else _clock((step_seconds or 0.0) * remaining)
        spent = f" | eps {epsilon:.2f} of {self._budget:.2f}" if epsilon is not None else ""
        # Short enough to stand beside the bar in 80 columns.
        rate = "-" if examples_per_second is None else f"{examples_per_second:,.0f}"
        text = f"{step}/{self._steps}{spent} | {rate} ex/s | ETA {left}{self._metric}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            say(f"step {text}")

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()


def say(text: str) -> None:
    """One line to stderr, where logs go."""
    print(text, file=public_stderr(), flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
