"""Standard output and error: what a run shows may fail in any way, and the run does not."""

import json
import os
import re
import subprocess
import sys

import pytest

from bilevel.cli.standard_streams import flush_standard_streams, occupy_standard_streams, print_line


def command(directory, *overrides):
    run = [
        f"hydra.run.dir={directory}",
        "problem=quadratic",
        "runner.epochs=20",
        "runner.warmup_epochs=1",
        "runner.picture=false",
        "logger=jsonl",
    ]
    return [sys.executable, "-m", "bilevel", *run, *overrides]


@pytest.mark.parametrize("both", [False, True])
def test_a_run_whose_output_nobody_reads_goes_on(tmp_path, both):
    pipe = subprocess.PIPE
    arguments = command(tmp_path / "run", "runner.evaluate_every=0.1")
    with subprocess.Popen(
        arguments, stdout=pipe, stderr=subprocess.STDOUT if both else pipe
    ) as run:
        run.stdout.readline()
        run.stdout.close()
        told = "" if both else run.stderr.read().decode()
    assert run.returncode == 0, told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"] is False
    if not both:
        # On a slow machine the reader may end after the last record: then `finish` fails.
        assert re.search(r"PlainDisplay failed to (log|finish) \(BrokenPipeError: the reader", told)
        assert "of the output has ended); the run continues" in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(tmp_path / "run"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert (
        "PlainDisplay failed to log (OSError: [Errno 28] No space left on device); "
        "the run continues" in done.stderr
    )
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_line_that_cannot_be_printed_is_no_error(capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        print_line("one", stream)
        print_line("two", stream)  # the descriptor leads to the null device now
        assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev
        flush_standard_streams(stream, None)
    print_line("three", None)
    print_line("four", sys.stdout)
    assert capsys.readouterr().out == "four\n"


def test_closed_descriptors_are_not_left_to_the_next_file(tmp_path):
    script = (
        "import os, sys\n"
        "from bilevel.cli.standard_streams import occupy_standard_streams as occupy\n"
        "os.close(1); os.close(0); occupy()\n"
        "file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)\n"
        "os.write(1, b'x'); assert os.read(0, 1) == b''; sys.exit(file)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "file"])
    assert done.returncode > 2
    assert (tmp_path / "file").read_bytes() == b""
    occupy_standard_streams()  # where all are open, nothing
