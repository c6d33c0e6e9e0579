"""The check that a model stays as it was when a solver was set up for it."""

import torch
from torch import nn

from bilevel.errors import BilevelError


class UnchangedModel:
    """The device, the type and the trained parameters of a model, which must not change.

    Args:
        model: the model.

    Attributes:
        device: the device of its parameters.

    Raises:
        BilevelError: the parameters lie on several devices, or there are none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = list(model.parameters())
        devices = {p.device for p in self._parameters}
        if len(devices) != 1:
            found = " and ".join(sorted(map(str, devices))) or "none"
            raise BilevelError(
                f"model lies on {found}, and a solver needs one device; move it to one"
            )
        self.device: torch.device = devices.pop()
        self._dtype = self._parameters[0].dtype
        self._trained: list[bool] = []

    def note_trained(self) -> None:
        """Note which parameters are trained, when the solver is set up."""
        self._trained = [p.requires_grad for p in self._parameters]

    def check(self) -> None:
        """Raise `BilevelError` if the model has changed."""
        first = next(self._model.parameters())  # `to` may make new parameters
        if first.device != self.device:
            raise BilevelError(
                f"model has moved from {self.device} to {first.device}; move it before attach"
            )
        if first.dtype != self._dtype:
            was, now = (str(t).removeprefix("torch.") for t in (self._dtype, first.dtype))
            raise BilevelError(f"model was {was} and is {now} now; convert it before attach")
        if first is not self._parameters[0]:
            raise BilevelError(
                "model has other parameters than at attach; change its layers before attach"
            )
        if [p.requires_grad for p in self._parameters] != self._trained:
            raise BilevelError(
                "requires_grad of a parameter of model has changed since the first step; freeze "
                "and unfreeze before attach, and attach again after a change"
            )
