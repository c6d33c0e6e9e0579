"""The connection of a sweep to Ray: a running one, or one that this command starts for itself."""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from bilevel.errors import BilevelError
from bilevel.text import describe, first_line

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray sends nothing to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # num_gpus=0 hides no GPU
}
OWN = {"include_dashboard": False, "object_store_memory": 100_000_000}
"""Arguments of `ray.init` for a Ray of this command; results of runs are small."""
BUSY = {
    "RAY_worker_niceness": "0",  # the priority of the command; Ray's 15 starves on a busy machine
    "RAY_health_check_timeout_ms": "100000",  # a late answer is no death
}
"""Variables for a Ray of this command, whose machine may be busy with other work."""


def imported() -> Any:
    """Import Ray.

    Raises:
        BilevelError: Ray is not installed.
    """
    try:
        import ray
        import ray.exceptions  # a folder `ray` beside the user has none
    except ImportError as error:
        raise BilevelError(
            f"hydra/launcher=ray needs Ray, which cannot be imported ({first_line(error)}); run "
            "`pip install 'bilevel[ray]'`"
        ) from error
    return ray


@contextmanager
def connected(ray: Any, address: str | None, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Connect to a Ray within the context, or start one.

    Raises:
        BilevelError: Ray does not start or answer.
    """
    own = address is None
    given = {**(OWN if own else {}), "log_to_driver": False, "logging_level": logging.ERROR}
    with variables({**QUIET, **({**BUSY, **token()} if own else {})}), ExitStack() as stack:
        stack.callback(ray.shutdown)  # it also ends a Ray that has started in part
        try:
            with signals_of_the_command():
                ray.init("local" if own else address, **{**given, **arguments})
        except Exception as error:
            raise BilevelError(
                f"hydra.launcher.address={'null' if own else address} gives no Ray "
                f"({describe(error).rstrip('.')}); leave the address out to start one, or start "
                "it with `ray start --head`, and look at hydra.launcher.init"
            ) from error
        yield


@contextmanager
def variables(added: Mapping[str, str]) -> Iterator[None]:
    """Set variables of Ray within the context; afterwards, remove those that Ray has set too."""
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def signals_of_the_command() -> Iterator[None]:
    """Keep signals for this process while Ray starts others.

    A scheduler sends a signal to all processes, and a terminal too. SIGUSR1 and SIGHUP would end
    Ray's, so they inherit a mask. Ray itself blocks SIGINT there. It also replaces the handler of
    SIGTERM here.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGHUP})
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if terminated is None else terminated)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@cache
def token() -> dict[str, str]:
    """Return variables with a secret that only the processes of this command know.

    Ray listens on all interfaces. Without the secret, everybody could run code there. Ray's own
    token would be a file in the home directory.
    """
    if any(name.startswith("RAY_AUTH_") for name in os.environ):
        return {}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
