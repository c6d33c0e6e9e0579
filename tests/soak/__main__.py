"""Kill, fuzz, attack or watch runs: `python -m tests.soak kills|ends|fuzz|hostile|data|hour`."""

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("what", choices=["kills", "ends", "fuzz", "hostile", "data", "hour"])
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments of the kills, and of the fuzzed inputs"
    )
    parser.add_argument("--examples", type=int, default=3000, help="inputs of each kind to fuzz")
    parser.add_argument("--kills", type=int, default=150, help="kills after the last step")
    parser.add_argument("--minutes", type=float, default=60, help="of each of the two long runs")
    parser.add_argument(
        "--out", type=Path, default=None, help="where files go; by default a folder that is removed"
    )
    asked = parser.parse_args()
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        return run(asked, asked.out.resolve())
    with tempfile.TemporaryDirectory() as place:
        return run(asked, Path(place).resolve())


def run(asked: argparse.Namespace, place: Path) -> int:
    if asked.what == "kills":
        from . import kills

        return kills.main(asked.seed, place)
    if asked.what == "ends":
        from . import ends

        return ends.main(asked.seed, asked.kills, place)
    if asked.what == "fuzz":
        from . import fuzz

        return fuzz.main(asked.seed, asked.examples, place)
    if asked.what == "hostile":
        from . import hostile

        return hostile.main(place)
    if asked.what == "data":
        from . import data

        return data.main(asked.seed, place)
    from . import hour

    return hour.main(asked.minutes, place)


if __name__ == "__main__":
    sys.exit(main())
