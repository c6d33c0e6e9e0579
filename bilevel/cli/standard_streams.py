"""Standard output and error, whose failure must not end a run.

A pipe may have no reader, a terminal may be closed, a disk may be full.
"""

import os
from contextlib import suppress
from typing import TextIO

from bilevel.text import printable


def print_line(text: str, stream: TextIO | None) -> None:
    """Print a line if the stream takes it; characters that command a terminal are written out."""
    if stream is None:  # closed before the process started
        return
    try:
        print(printable(text), file=stream, flush=True)
    except BrokenPipeError:
        _discard(stream)
    except OSError:  # a disk may have room again for the next line
        pass


def occupy_standard_streams() -> None:
    """Connect descriptors 0, 1 and 2 to the null device if they are closed.

    Otherwise the next file that is opened gets such a number, and receives what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def flush_standard_streams(*streams: TextIO | None) -> None:
    """Flush the streams and ignore errors.

    Python flushes them at its end too, where an error would change the exit status.
    """
    for stream in streams:
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Connect the stream to the null device."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
