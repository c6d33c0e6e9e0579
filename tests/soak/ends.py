"""Kill runs after their last step: within the summary, the picture and the end of W&B."""

import json
import random
import shutil
import time
from pathlib import Path

from tests.support.wandb_files import of_kind, read_file

from .kills import Server, differences, serving, wandb_differences

RUN = (
    *("problem=ridge", "solver=fixed", "seed=1", "wandb.mode=offline", "resume=auto"),
    *("runner.progress=none", "runner.device=cpu", "runner.epochs=6", "runner.evaluate_every=1"),
    "runner.warmup_epochs=1",
)


class Ends:
    """Runs that are killed after their last step, compared with an undisturbed one."""

    def __init__(self, server: Server, place: Path) -> None:
        self.server, self.place = server, place
        self.count = place / "count"
        self.whole = place / "undisturbed"
        ended = self._run(self.whole, "none", 0)
        assert ended.rc == 0, ended.said
        self.events: dict[str, int] = json.loads(self.count.read_text())

    def kill(self, number: int, seed: int) -> tuple[str, list[str]]:
        """Kill a run once or twice, repeat its command, and return where and what was lost."""
        draw, directory = random.Random(f"{number} {seed}"), self.place / f"killed-{number}"
        act, most, struck = draw.choice(["kill", "killgroup"]), sum(self.events.values()), []
        for _ in range(1 + number % 2):
            at = draw.randint(1, most)
            ended = self._run(directory, act, at)
            struck.append(f"{act} {at}/{most}: {ended.rc}")
        ended = self._run(directory, "none", 0)
        lost = [] if ended.rc == 0 else [f"status {ended.rc}: {ended.said}"]
        lost = lost or [
            *differences(self.whole, directory),
            *wandb_differences(directory),
            *_missing(directory),
        ]
        if not lost:
            shutil.rmtree(directory)
        return "; ".join(struck), lost

    def _run(self, directory, act, at):
        fault = {"act": act, "at": at, "count": str(self.count), "late": True}
        return self.server.run(self.place, *RUN, f"hydra.run.dir={directory}", fault=fault)


def _missing(directory: Path) -> list[str]:
    found = [] if (directory / "curves.png").exists() else ["curves.png is missing"]
    parts = sorted(directory.glob("wandb/offline-run-*"), key=lambda part: part.stat().st_mtime)
    for part in parts[-1:]:
        records = [record for file in part.glob("*.wandb") for record in read_file(file)]
        ends = [end.exit_code for end in of_kind(records, "exit")]
        best = any(
            item.key.startswith("best/")
            for summary in of_kind(records, "summary")
            for item in summary.update
        )
        if ends != [0] or not best:
            found.append(f"W&B has ends {ends}, and its summary: {best}")
    return found


def main(seed: int, kills: int, place: Path) -> int:
    """Kill runs `kills` times at least, and return 1 if anything was lost."""
    began, struck, failed, number = time.monotonic(), 0, 0, 0
    with serving() as server:
        ends = Ends(server, place)
        print(f"events after the last step: {ends.events}", flush=True)
        while struck < kills:
            where, lost = ends.kill(number, seed)
            struck, number = struck + where.count(": -9"), number + 1
            failed += bool(lost)
            print(f"| {number} | {where} | {'; '.join(lost) or 'nothing'} |", flush=True)
    print(f"{struck} kills, {failed} runs that lost something; {time.monotonic() - began:.0f} s")
    return min(failed, 1)
