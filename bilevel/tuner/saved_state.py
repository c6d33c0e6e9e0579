"""The state that a tuner saves, and the check that a state fits before anything is changed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bilevel.errors import BilevelError

PARTS = ("weights", "solution", "solver", "examples", "device")
"""The entries of every state."""


def check_state(
    state: Any, *, tensors: Mapping[str, Tensor], hypers: Mapping[str, Tensor], own: dict[str, str]
) -> None:
    """Require that a state is one of a tuner of the same model, space, solver and optimizer.

    Args:
        state: the argument of `load_state_dict`.
        tensors: parameters and buffers of the model.
        hypers: λ of the tuner.
        own: the type of the device, and the classes of the solver and of the optimizer.

    Raises:
        BilevelError: it is none.
    """
    if not isinstance(state, Mapping):
        raise BilevelError(
            f"state={type(state).__name__} is not a state of a tuner; pass a result of "
            "tuner.state_dict()"
        )
    if missing := [name for name in PARTS if name not in state]:
        inner = [k for k, v in state.items() if isinstance(v, Mapping) and v.keys() >= set(PARTS)]
        remedy = f"state[{inner[0]!r}]" if inner else "a result of tuner.state_dict()"
        raise BilevelError(f"the state has no entry `{missing[0]}`; pass {remedy}")
    if (kind := state["device"]) != own["device"]:
        raise BilevelError(
            f"the model is on {own['device']}, and the state is one of {kind}, with other random "
            "numbers; move the model there before attach"
        )
    for what in ("solver", "optimizer"):
        theirs = state.get(f"{what}_class", own[what])
        if theirs != own[what]:
            raise _misfit(f"its {what} is {theirs}, and not {own[what]}")
    saved_hypers, _, carry = state["solution"]
    for what, saved, ours in (
        ("model", {**state["weights"], **carry}, tensors),
        ("space", saved_hypers, hypers),
    ):
        for name in dict.fromkeys([*saved, *ours]):
            if name not in ours:
                raise _misfit(f"it holds `{name}`, which the {what} lacks")
            if name not in saved:
                raise _misfit(f"it lacks `{name}` of the {what}")
            if saved[name].shape != ours[name].shape:
                shapes = f"{list(saved[name].shape)}, and not {list(ours[name].shape)}"
                raise _misfit(f"its `{name}` has the shape {shapes}")


def _misfit(what: str) -> BilevelError:
    return BilevelError(
        f"the state does not fit this model, space and solver ({what}); attach them as in the run "
        "that saved it"
    )
