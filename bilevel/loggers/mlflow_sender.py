"""A thread that writes to MLflow, so that a step does not wait for a server."""

import queue
import threading
from collections.abc import Callable


class Sender:
    """Calls functions in order in a thread of its own; the first error ends it.

    The thread is a daemon: a server that does not answer delays no exit of the process.

    Example:
        >>> sender, done = Sender(), []
        >>> sender.send(lambda: done.append(1))
        >>> sender.wait(5.0), done
        (True, [1])
        >>> sender.end()
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], object] | threading.Event | None] = queue.Queue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, call: Callable[[], object]) -> None:
        """Let the thread call a function after all earlier ones.

        Raises:
            Exception: an earlier call has failed; each error is raised once.
        """
        self._raise()
        self._calls.put(call)

    def wait(self, seconds: float) -> bool:
        """Wait until everything has been called, and return whether it has.

        Raises:
            Exception: see `send`.
        """
        done = threading.Event()
        self._calls.put(done)
        in_time = done.wait(seconds)
        self._raise()
        return in_time

    def end(self) -> None:
        """End the thread after all earlier calls, without waiting."""
        self._calls.put(None)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        failed = False
        while (call := self._calls.get()) is not None:
            if isinstance(call, threading.Event):
                call.set()
                continue
            if failed:
                continue  # each further call would wait for the server again
            try:
                call()
            except Exception as error:
                failed, self._error = True, error
