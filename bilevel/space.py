"""The hyperparameter space: domains by name, and λ in its own units from unconstrained coordinates u."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.domains import Domain, optimizer_setting
from bilevel.errors import BilevelError
from bilevel.params import Hypers
from bilevel.text import near


class Space(Mapping[str, Domain]):
    """Hyperparameters by name; solvers see u ∈ R^h, problems see `Hypers`.

    Coordinates follow the order of the names; frozen hyperparameters have none.

    Example:
        >>> from bilevel import Interval, Positive
        >>> space = Space(dropout=Interval(low=0.0, high=0.95, init=0.05), decay=Positive(init=1e-3))
        >>> u = space.init()
        >>> u.shape, round(u[0].item(), 3)
        (torch.Size([2]), -2.89)
        >>> {name: round(leaf.item(), 4) for name, leaf in space.constrain(u).items()}
        {'dropout': 0.05, 'decay': 0.001}
    """

    def __init__(self, **domains: Domain) -> None:
        for name, domain in domains.items():
            if not isinstance(domain, Domain):
                raise BilevelError(
                    f"hyperparameter `{name}` is a {type(domain).__name__}; give a Real, Positive, Interval, Integer or Simplex"
                )
        setters: dict[str, str] = {}
        for name, domain in domains.items():
            if domain.optimizer is not None and setters.setdefault(domain.optimizer, name) != name:
                raise BilevelError(
                    f"`{setters[domain.optimizer]}` and `{name}` both set the inner optimizer's {domain.optimizer}; keep one"
                )
        self._domains = domains
        self._slices: dict[str, slice] = {}
        for name, domain in domains.items():
            if not domain.frozen:
                self._slices[name] = slice(self.numel, self.numel + domain.numel)
        self._constants: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __getitem__(self, name: str) -> Domain:
        return self._domains[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}={domain}' for name, domain in self.items())})"

    @property
    def numel(self) -> int:
        """h, the number of unconstrained coordinates."""
        return max((s.stop for s in self._slices.values()), default=0)

    @property
    def tuned(self) -> tuple[str, ...]:
        """Names of the hyperparameters that are not frozen, in the order of their coordinates."""
        return tuple(self._slices)

    @property
    def per_example(self) -> Tensor:
        """[h] bool: the coordinates whose perturbation may differ from example to example."""
        return self._per_coordinate([self[name].per_example for name in self.tuned], torch.bool)

    def init(self, dtype: torch.dtype | None = None) -> Tensor:
        """The coordinates u at the initial values: [h], computed in float64 and given in `dtype` (by default PyTorch's)."""
        u = self.unconstrain({name: self[name].initial() for name in self.tuned})
        return u.to(torch.get_default_dtype() if dtype is None else dtype)

    def initial_scales(self) -> Tensor:
        """σ of every coordinate at the start: [h] in float64."""
        return self._per_coordinate([float(self[name].scale) for name in self.tuned], torch.float64)

    def constrain(self, u: Tensor, generator: torch.Generator | None = None) -> Hypers:
        """λ in its own units from u, [h] or [B, h].

        Given [B, h], a leaf perturbed per example is [B, *shape]; one perturbed per batch is [*shape], taken from the first
        row. Integers are rounded stochastically with `generator`, to the nearest without.
        """
        hypers: Hypers = {}
        for name, domain in self.items():
            if domain.frozen:
                hypers[name] = self._constant(name, u)
                continue
            part = u[..., self._slices[name]]
            if u.ndim == 2 and not domain.per_example:
                part = part[0]
            hypers[name] = domain.constrain(part.reshape(part.shape[:-1] + domain.shape), generator)
        return hypers

    def unconstrain(self, hypers: Hypers) -> Tensor:
        """u: [h] from unbatched hyperparameters; frozen ones are ignored.

        Raises:
            BilevelError: a tuned hyperparameter is missing.
        """
        if missing := [name for name in self.tuned if name not in hypers]:
            raise BilevelError(
                f"no value for hyperparameter `{missing[0]}`; give one for each of {', '.join(self.tuned)}"
            )
        parts = [
            self[name].unconstrain(hypers[name]).expand(self[name].shape).reshape(-1)
            for name in self.tuned
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def by_name(self, v: Tensor) -> Hypers:
        """A vector over the coordinates, [h], as one leaf of its domain's shape per tuned hyperparameter; no change of
        units.
        """
        return {name: v[s].reshape(self[name].shape) for name, s in self._slices.items()}

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> "Space":
        """The same space with some fields of some hyperparameters changed, as configuration does it.

        A new name is a setting of the inner optimizer that shall be tuned too, and says which: `optimizer`, and `init`.

        Example:
            >>> from bilevel import Positive
            >>> Space(decay=Positive(init=1e-3)).override({"decay": {"init": 0.1}})["decay"].init
            0.1
            >>> list(Space(decay=Positive(init=1e-3)).override({"rate": {"optimizer": "lr", "init": 0.01}}))
            ['decay', 'rate']

        Raises:
            BilevelError: an unknown hyperparameter or field (with the near misses), or a value out of its domain.
        """
        domains = dict(self._domains)
        if not isinstance(changes, Mapping):
            raise BilevelError(
                f"space={changes!r} changes no hyperparameter by its name; write space.NAME.init=… for one"
            )
        for name, change in changes.items():
            if (
                name not in domains
                and isinstance(change, Mapping)
                and change.get("optimizer") is not None
            ):
                domains[name] = _added(name, change)
                continue
            if name not in domains:
                raise BilevelError(
                    f"there is no hyperparameter `{name}`{near(name, domains)}; there are {', '.join(domains)}"
                )
            known = [
                field.name for field in fields(domains[name]) if field.name != "shape"
            ]  # that is the problem's own
            if not isinstance(change, Mapping):
                value = "…" if change is None else change
                raise BilevelError(
                    f"hyperparameter `{name}` has several fields; write {name}.init={value} for where it starts"
                )
            if change.get("optimizer", domains[name].optimizer) != domains[name].optimizer:
                raise BilevelError(
                    f"hyperparameter `{name}` is there already, for something else; a setting of the inner optimizer takes a "
                    f"new name: write rate.optimizer={change['optimizer']}, say"
                )
            if "shape" in change:
                raise BilevelError(
                    f"hyperparameter `{name}`: its shape {list(domains[name].shape)} comes from the problem; leave it out"
                )
            for field in change:
                if field not in known:
                    raise BilevelError(
                        f"hyperparameter `{name}` has no field `{field}`{near(field, known)}; it has {', '.join(known)}"
                    )
            try:
                domains[name] = replace(domains[name], **change)
            except BilevelError as error:
                raise BilevelError(f"hyperparameter `{name}`: {error}") from None
        return Space(**domains)

    def _constant(self, name: str, like: Tensor) -> Tensor:
        """The value of a frozen hyperparameter, copied to each device once: a copy waits for the device."""
        key = (name, like.device, like.dtype)
        if key not in self._constants:
            with torch.inference_mode(False):  # what is made in inference must still serve training
                self._constants[key] = self[name].initial().to(like.device, like.dtype)
        return self._constants[key]

    def _per_coordinate(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        sizes = torch.tensor([self[name].numel for name in self.tuned], dtype=torch.long)
        return torch.repeat_interleave(torch.tensor(values, dtype=dtype), sizes)


def _added(name: str, change: Mapping[str, Any]) -> Domain:
    """The setting of the inner optimizer that joins a space as `name`."""
    if "init" not in change:
        raise BilevelError(
            f"hyperparameter `{name}` has no initial value; give {name}.init=… beside {name}.optimizer=…"
        )
    try:
        return optimizer_setting(
            **{
                "setting" if field == "optimizer" else field: value
                for field, value in change.items()
            }
        )
    except TypeError as error:
        raise BilevelError(
            f"hyperparameter `{name}`: {error}; it takes optimizer, init, scale, frozen, low and high"
        ) from None
    except BilevelError as error:
        raise BilevelError(f"hyperparameter `{name}`: {error}") from None
