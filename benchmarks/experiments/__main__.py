"""Make tables and pictures of `docs/`: `python -m benchmarks.experiments [NAME …] [--quick]`."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.harness import ROOT, Context, find
from benchmarks.experiments.pages import Page
from bilevel import BilevelError
from bilevel.validate import whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if no experiment failed."""
    options = _options(arguments)
    runs = options.runs or ROOT / "runs" / ("experiments-quick" if options.quick else "experiments")
    out = options.out or (
        ROOT / "runs" / "experiments-quick" / "docs" if options.quick else ROOT / "docs"
    )
    try:
        whole(0, **{"--workers": options.workers})
        experiments = find(*options.names)
    except BilevelError as error:
        return _refused(str(error))
    if options.quick and out.resolve().is_relative_to(ROOT / "docs"):
        return _refused(
            "--quick must not write to docs/, because its numbers do not follow the protocol; "
            "omit --out or name another folder"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers inherit it
    failed = []
    for name, experiment in experiments.items():
        try:
            page = Page(experiment.page, ROOT / "docs", out)
            page.check(name)
            settings = {"workers": options.workers, "quick": options.quick, "data": options.data}
            with Context(name, experiment, figures=page.folder, runs=runs, **settings) as context:
                if reason := context.missing():
                    print(f"{name}: skipped: {reason}", flush=True)
                    continue
                context.run()
                context.check()
                page.write(name, experiment.report(context) + "\n\n" + context.colophon())
            print(f"{name}: made {page.path}", flush=True)
        except BilevelError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        except OSError as error:
            failed.append(name)
            place = error.filename or out
            reason = f"cannot use {place}: {error.strerror or error}"
            print(f"{name}: {reason}; give --out or --runs another place", file=sys.stderr)
        except Exception:  # one failed report must not stop the others
            failed.append(name)
            traceback.print_exc()
    if failed:
        print(f"not made: {', '.join(failed)}", file=sys.stderr)
    return min(1, len(failed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="experiments to make (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="run at reduced size and write a copy of the pages"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes of one thread each (default: 2); 0 uses this process",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with MNIST/raw and CIFAR-10; without their data, experiments are skipped",
    )
    parser.add_argument("--out", type=Path, help="folder of the pages (default: docs)")
    parser.add_argument(
        "--runs",
        type=Path,
        help="folder of the kept runs (default: runs/experiments)",
    )
    return parser.parse_args(arguments)


def _refused(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
