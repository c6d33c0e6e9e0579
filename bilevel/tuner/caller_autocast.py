"""The autocast of the caller, which a solver must leave and its problem repeats."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bilevel.errors import BilevelError


class CallerAutocast:
    """The caller's use of `torch.autocast`, which must not change between steps.

    Within a step, autocast surrounds the network alone (`bilevel.device.precision`). A solver's own
    products stay in float32. PyTorch's cache of narrowed weights would be stale after each update.

    Args:
        kind: the type of the device.

    Attributes:
        precision: `bf16` under autocast, else `fp32`.

    Raises:
        BilevelError: the caller narrows to float16.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.precision = self._now()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leave the autocast of the caller within a block.

        Raises:
            BilevelError: it has changed.
        """
        if self._now() != self.precision:
            raise BilevelError(
                "some steps are taken under torch.autocast and others are not; put every step and "
                "outer_step under the same one"
            )
        with torch.autocast(self.kind, enabled=False):
            yield

    def _now(self) -> str:
        if not torch.is_autocast_enabled(self.kind):
            return "fp32"
        if (dtype := torch.get_autocast_dtype(self.kind)) is not torch.bfloat16:
            raise BilevelError(
                f"autocast to {str(dtype).removeprefix('torch.')} needs a scaled loss, and the "
                "solver takes its gradients itself; use torch.autocast with dtype=torch.bfloat16"
            )
        return "bf16"
