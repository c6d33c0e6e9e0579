"""Import everything once, then fork a process that runs the command line for each request.

Requests and answers are lines of JSON on the standard input and output. Each process runs the
installed command line; the faults are put into it from outside.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


class Fault:
    """A fault at the `at`-th event of a run.

    Events: a round or an evaluation begins; a file is written, synced, linked, renamed or removed;
    the summary, the picture or the end of W&B begins.

    Args:
        act: a signal of `SIGNALS`; `full`: no file can grow beyond `limit` bytes any more; `crash`:
            an evaluation raises; `killgroup`: kill W&B's process too.
        only: the kind of events that are counted; by default all.
        count: the file to which the process writes the number of events of each kind.
        late: whether only events after the last step are counted.
    """

    def __init__(
        self,
        act: str,
        at: int,
        count: str,
        limit: int = 0,
        only: str = "",
        late: bool = False,
    ) -> None:
        self.act, self.at, self.limit, self.only, self.events = act, at, limit, only, 0
        self.late = late
        self.counts: dict[str, int] = {}
        self.count = os.open(count, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def tick(self, event: str) -> None:
        if self.late and event != "summary":
            return
        self.late = False
        self.counts[event] = self.counts.pop(event, 0) + 1
        if self.act != "full" or self.events < self.at:  # a full disk would take this too
            os.pwrite(self.count, json.dumps(self.counts).ljust(200).encode(), 0)
        if self.only not in ("", event):
            return
        self.events += 1
        if self.act == "crash":
            if self.events >= self.at and event == "evaluate":
                raise RuntimeError("a crash in evaluation")
        elif self.events == self.at:
            if self.act == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
            elif self.act == "killgroup":
                os.killpg(0, signal.SIGKILL)
            elif self.act in SIGNALS:
                os.kill(os.getpid(), SIGNALS[self.act])

    def watch(self, owner: object, name: str, event: str) -> None:
        call = getattr(owner, name)

        def watched(*arguments, **named):
            self.tick(event)
            return call(*arguments, **named)

        setattr(owner, name, watched)

    def install(self) -> None:
        import bilevel.checkpoint.file_format
        import bilevel.loggers.jsonl
        import bilevel.loggers.plot
        import bilevel.loggers.wandb_logger
        import bilevel.run.faults
        import bilevel.run.loop
        import bilevel.run.stages

        bilevel.run.faults.AT_THE_END = bilevel.run.faults.PAUSE = 0.01  # nobody makes room here
        self.watch(bilevel.run.loop.Loop, "_round", "round")
        self.watch(bilevel.run.loop, "evaluate", "evaluate")
        self.watch(bilevel.checkpoint.file_format._ChecksumWriter, "_write", "checkpoint")
        self.watch(bilevel.loggers.jsonl.JsonLines, "log", "line")
        self.watch(bilevel.run.stages, "summarize", "summary")
        self.watch(bilevel.loggers.jsonl.JsonLines, "finish", "finish")
        self.watch(bilevel.loggers.plot.CurvesPlot, "finish", "picture")
        for name in ("finish", "close"):
            self.watch(bilevel.loggers.wandb_logger.WandB, name, f"W&B {name}")
        self.watch(bilevel.loggers.jsonl.SummaryFile, "finish", "finish")
        for name in ("fsync", "replace", "link", "unlink"):
            self.watch(os, name, name)


def run(request: dict) -> int:
    from bilevel.cli.app import main

    os.chdir(request["cwd"])
    if request.get("fault"):
        Fault(**request["fault"]).install()
    return main(request["arguments"])


def preload() -> None:
    """Run once, so that everything is imported."""
    import tempfile

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        quiet = [
            "wandb.mode=disabled",
            "runner.progress=none",
            "runner.picture=false",
            "runner.device=cpu",
        ]
        here = os.getcwd()
        request = {
            "cwd": directory,
            "arguments": [
                *quiet,
                "problem=digits",
                "solver=gp",
                "runner.epochs=1",
                "trial.epochs=1",
            ],
        }
        assert run(request) == 0
        os.chdir(here)


def serve() -> None:
    out = os.dup(1)
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    preload()
    os.write(out, b'{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()  # not a file: a full disk would take it too
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = 70
            try:
                code = run(request)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException as error:  # told to the test, whatever it is
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(code)
        os.close(writing)
        os.write(out, json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.set_blocking(reading, False)
        try:
            said = os.read(reading, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            said = ""
        os.close(reading)
        os.write(
            out,
            json.dumps({"rc": os.waitstatus_to_exitcode(status), "said": said}).encode() + b"\n",
        )


if __name__ == "__main__":
    serve()
