"""The settings of norm layers, which nobody can tune."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bilevel.checks.first_batch import FirstBatch
from bilevel.checks.laws import Finding

NORMS = {
    F.batch_norm: "batch norm",
    F.instance_norm: "instance norm",
    F.layer_norm: "layer norm",
    F.group_norm: "group norm",
    F.rms_norm: "RMS norm",
}
"""The functions that normalize, by what people call them."""


class _Seen(TorchFunctionMode):
    """Looks on while a network runs, and notes the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NORMS:
            self.norms[NORMS[func]] = None
        return func(*args, **(kwargs or {}))


def norm_settings(case: FirstBatch) -> Iterator[Finding]:
    """A network's norms have a momentum and an eps, which are no hyperparameters and cannot be made ones."""
    with torch.no_grad(), _Seen() as seen:
        case.predict(train=True)
    for norm in seen.norms:
        if norm == "batch norm":
            text = "momentum and eps of batch norm are not tunable: L_T does not depend on the momentum, and eps is"
        else:
            text = f"the eps of {norm} is not tunable: it is"
        yield Finding(
            "note",
            f"{text} a number in the network's constructor, set there; gain and shift, where there are any, are part of w",
        )
