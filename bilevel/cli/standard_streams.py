"""Standard output and error, which a run outlives: a pipe that nobody reads, a terminal that is gone, a full disk."""

import os
from contextlib import suppress
from typing import TextIO


def say(text: str, stream: TextIO | None) -> None:
    """Print a line; no run fails since it cannot be printed."""
    if stream is None:  # closed before we began
        return
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        _discard(stream)
    except OSError:  # a disk may have room again for the next line
        pass


def occupy_standard_streams() -> None:
    """Give those of descriptors 0, 1 and 2 that are closed to the null device.

    The next file that is opened would get the number, `metrics.jsonl` say, and what a library prints would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def flush_standard_streams(*streams: TextIO | None) -> None:
    """Empty the buffers while that can still fail in silence: Python, at its end, makes another exit status of it."""
    for stream in streams:
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Let all that follows go nowhere."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
