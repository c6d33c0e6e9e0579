"""W&B and the network: reach its server when online, and reach nothing when offline."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bilevel.text import first_line

REACH_SECONDS = 5.0


def unreachable(wandb: Any, settings: Any) -> str | None:
    """Return the reason why W&B cannot be used online, without a prompt or a long wait; or None."""
    url = wandb.setup(settings=settings).settings.base_url
    try:
        urllib.request.urlopen(url, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer of any kind is a connection
    except OSError as error:
        return f"{url} cannot be reached: {getattr(error, 'reason', error)}"
    try:
        known = wandb.login(prompt=False)
    except TypeError:  # an older wandb, whose login would ask
        known = wandb.api.api_key is not None
    except wandb.errors.Error as error:
        return first_line(error)
    return None if known else "this machine has no API key; run `wandb login` first"


@contextmanager
def without_error_reports() -> Iterator[None]:
    """Turn W&B's reports about its own errors off, for W&B processes that start in a block."""
    name = "WANDB_ERROR_REPORTING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
