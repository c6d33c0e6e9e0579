"""The display of a run in the terminal, while it runs and at its end."""

import math
import time
from abc import abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bilevel.loggers.logger import Logger, Progress, RunInfo
from bilevel.loggers.records import Record
from bilevel.loggers.tables import (
    duration,
    final_tables,
    moves_table,
    number,
    part,
    scores,
    scores_table,
    title,
    units,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

DISPLAYS = ("auto", "live", "plain", "none")


def display(kind: str, console: "Console | None" = None) -> list[Logger]:
    """Return the loggers that show a run: none, or one."""
    if kind == "none":
        return []
    from rich.console import Console

    class ClosablePipeConsole(Console):
        """A console that raises where the reader of a pipe ends; Rich would end the run."""

        def on_broken_pipe(self) -> None:
            with suppress(SystemExit):
                super().on_broken_pipe()
            raise BrokenPipeError("the reader of the output has ended")

    console = console or ClosablePipeConsole(highlight=False)
    live = kind == "live" or (
        kind == "auto" and console.is_terminal and not console.is_dumb_terminal
    )
    return [LiveDisplay(console) if live else PlainDisplay(console)]


class _Display(Logger):
    """The parts that both displays share: progress, and the tables at the end."""

    def __init__(self, console: "Console", *, part: bool = False) -> None:
        self.console = console
        self.is_part = part
        self.record: Record = {}
        self.progress = Progress(0, 0.0, 0.0)
        # other encodings may raise on these characters in the middle of a run
        unicode = console.encoding.lower().startswith("utf")
        self.arrow, self.sigma, self.dot = ("→", "σ", "·") if unicode else ("->", "sigma", "-")

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        self.run = run
        self.best = run.best
        # time and fraction at which this process began
        self._began: tuple[float, float] | None = None

    def log(self, record: Record) -> None:
        self.record = record
        if math.isfinite(record["valid_loss"]) and self.run.select.improves(record, self.best):
            self.best = record
        self.show()

    def advance(self, progress: Progress) -> None:
        # rounds after warm-up take longer, and those at constant λ are the shortest
        changes = [self.run.warmup_epochs, self.run.tuned_epochs or 0]
        changed = any(self.progress.epoch < at <= progress.epoch for at in changes)
        if self._began is None or changed:
            self._began = (time.monotonic(), progress.fraction)
        self.progress = progress
        self.tick()

    @abstractmethod
    def show(self) -> None:
        """Show the new record."""

    def tick(self) -> None:
        """Note the end of a round."""

    def title(self) -> str:
        parts = [
            self.run.problem,
            self.run.solver,
            f"seed {self.run.seed}",
            *(["resumed"] if self.run.resumed else []),
        ]
        if (place := self.run.place) is not None:
            parts.insert(0, f"run {place.run}" + (f" of {place.runs}" if place.runs else ""))
        return f" {self.dot} ".join(parts)

    def epoch(self) -> str:
        budget = "" if self.run.epochs is None else f"/{self.run.epochs:g}"
        return f"epoch {max(self.progress.epoch, self.record.get('epoch', 0.0)):.4g}{budget}"

    def phase(self) -> str:
        """Return the phase of the run in a word; empty while λ moves."""
        epoch, tuned = self.progress.epoch, self.run.tuned_epochs
        if 0 < epoch < self.run.warmup_epochs:
            return "warm-up"
        return "tuning ended" if tuned is not None and epoch >= tuned else ""

    def time_left(self) -> str:
        """Return the time until the budget that is reached first; patience may stop earlier."""
        if self._began is None or self.progress.fraction <= self._began[1]:
            return ""
        passed, done = time.monotonic() - self._began[0], self.progress.fraction - self._began[1]
        most = "" if self.run.patience is None else "at most "
        return f"{most}{duration(passed * (1 - self.progress.fraction) / done)} left"

    def stalled(self) -> str:
        """Return the used part of patience; empty while it is unused."""
        if self.run.patience is None or not self.progress.stalled:
            return ""
        return f"no new best for {self.progress.stalled} of {self.run.patience}"

    def nested(self) -> Logger:
        self.close()  # two displays at a time would overwrite each other
        return type(self)(self.console, part=True)

    def finish(self, summary: Record) -> None:
        self.close()
        if self.is_part:
            self._print_part(summary)
            return
        if summary["diverged"]:  # the command line prints the reason
            self.console.print(
                f"diverged: `last` is the end of the run; the best step is in {self.run.directory}",
                markup=False,
                soft_wrap=True,
            )
        elif summary["message"]:
            self.console.print(summary["message"], markup=False, soft_wrap=True)
        if (chosen := summary.get("refit", {}).get("chosen")) is not None:
            of = "the run itself" if chosen == "run" else f"refit-{chosen}"
            self.console.print(f"the result is that of {of}", markup=False, soft_wrap=True)
        for table in final_tables(summary, self.arrow, self.sigma):
            self.console.print(table, "")
        costs = [f"{duration(summary['seconds'])} of training", f"{summary['examples']:,} examples"]
        if (refit := summary.get("refit")) is not None:
            costs[0] += f" ({duration(refit['seconds'])} of refits)"
        costs.append(f"{summary['steps']:,} inner and {summary['outer_steps']:,} outer steps")
        if summary["peak_memory_bytes"] is not None:
            costs.append(f"peak memory {summary['peak_memory_bytes'] / 2**20:,.0f} MiB")
        self.console.print(f" {self.dot} ".join(costs), markup=False, soft_wrap=True)
        self.console.print(f"saved in {self.run.directory}", markup=False, soft_wrap=True)

    def _print_part(self, summary: Record) -> None:
        """Print one line about a refit; the tables at the end of the run show the chosen one."""
        best = {
            name: value for name, value in scores(summary["best"]).items() if "train" not in name
        }
        found = [f"{title(name)} {number(name, value)}" for name, value in best.items()]
        words = [*found, duration(summary["seconds"])]
        if summary["diverged"] or summary["interrupted"]:
            words.append(summary["stopped"])
        text = f"{self.run.directory.name}: {', '.join(words)}"
        self.console.print(text, markup=False, soft_wrap=True)


class PlainDisplay(_Display):
    """One line per evaluation, at most one every `interval` seconds: for logs and pipes."""

    def __init__(self, console: "Console", interval: float = 1.0, *, part: bool = False) -> None:
        super().__init__(console, part=part)
        self.interval = interval
        self._shown = -math.inf

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        super().start(run, state)
        with suppress(OSError):  # a full disk is reported at the first evaluation
            self._print(self.title())

    def show(self) -> None:
        if time.monotonic() - self._shown < self.interval:
            return
        self._shown = time.monotonic()
        losses = [
            f"{title(name)} {number(name, value)}" for name, value in scores(self.record).items()
        ]
        hypers = [f"{name} {units(value)}" for name, value in part(self.record, "hypers.").items()]
        self._print(
            " | ".join(
                filter(
                    None,
                    [self.epoch(), *losses, ", ".join(hypers), self.stalled(), self.time_left()],
                )
            )
        )

    def notice(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class LiveDisplay(_Display):
    """A panel that is redrawn with every evaluation and a few times a second, for a terminal."""

    INTERVAL = 0.25  # seconds; drawing costs some milliseconds

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        from rich.live import Live

        super().start(run, state)
        self._drawn = -math.inf
        # no drawing thread, since it would compete with training
        self.live: Live | None = Live(
            self.panel(), console=self.console, auto_refresh=False, transient=True
        )
        with suppress(OSError):
            self.live.start()

    def show(self) -> None:
        if self.live is not None:
            self._drawn = time.monotonic()
            self.live.update(self.panel(), refresh=True)

    def tick(self) -> None:
        if time.monotonic() - self._drawn >= self.INTERVAL:
            self.show()

    def notice(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def panel(self) -> "RenderableType":
        """Return progress, losses, and the path of each hyperparameter so far."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        where = "  ".join(filter(None, [self.epoch(), self.phase(), self.stalled()]))
        bar.add_row(
            where, ProgressBar(total=1.0, completed=self.progress.fraction), self.time_left()
        )
        rows: list[RenderableType] = [bar]
        if self.record:
            rows += [scores_table(now=self.record, best=self.best), self._hypers_table()]
        return Panel(Group(*rows), title=self.title(), title_align="left", border_style="dim")

    def _hypers_table(self) -> "RenderableType":
        now, scales = part(self.record, "hypers."), part(self.record, "scales.")
        return moves_table(self.run.initial, now, scales, self.arrow, self.sigma, "now")
