"""The hyperparameter space: domains by name, and the map between u and λ."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import product
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
        >>> rate = Interval(low=0.0, high=0.95, init=0.05)
        >>> space = Space(dropout=rate, decay=Positive(init=1e-3))
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
                    f"{name}={domain!r} must be a Domain; give a Real, Positive, Interval, Integer "
                    "or Simplex"
                )
        setters: dict[str, str] = {}
        for name, domain in domains.items():
            if domain.optimizer is None:
                continue
            other = setters.setdefault(domain.optimizer, name)
            if other != name and None in (domain.params, domains[other].params):
                remedy = "; keep one"
                if domain.optimizer == "weight_decay":
                    remedy += ", or give each its own weights (params=…)"
                raise BilevelError(
                    f"hyperparameters `{other}` and `{name}` both set the {domain.optimizer} of "
                    f"the inner optimizer{remedy}"
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
        """Return h, the number of unconstrained coordinates."""
        return max((s.stop for s in self._slices.values()), default=0)

    @property
    def tuned(self) -> tuple[str, ...]:
        """Return the names of the hyperparameters that are not frozen, in the order of u."""
        return tuple(self._slices)

    @property
    def per_example(self) -> Tensor:
        """Return the coordinates that are perturbed per example, [h] bool.

        The perturbation of such a coordinate may differ from example to example.
        """
        return self._per_coordinate([self[name].per_example for name in self.tuned], torch.bool)

    def init(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the coordinates u at the initial values, [h].

        They are computed in float64 and returned in `dtype`, by default PyTorch's default type.
        """
        u = self.unconstrain({name: self[name].initial() for name in self.tuned})
        return u.to(torch.get_default_dtype() if dtype is None else dtype)

    def initial_scales(self) -> Tensor:
        """Return the initial σ of every coordinate, [h] in float64."""
        return self._per_coordinate([float(self[name].scale) for name in self.tuned], torch.float64)

    def constrain(self, u: Tensor, generator: torch.Generator | None = None) -> Hypers:
        """Return λ in its own units from u, [h] or [B, h].

        For [B, h], a leaf that is perturbed per example is [B, *shape]. A leaf that is perturbed
        per batch is [*shape], taken from the first row. Integers are rounded stochastically with
        `generator`, and to the nearest whole number without.
        """
        hypers: Hypers = {}
        for name, domain in self.items():
            if domain.frozen:
                hypers[name] = self._constant(name, u)
                continue
            place = self._slices[name]
            part = u if place == slice(0, u.shape[-1]) else u[..., place]
            if u.ndim == 2 and not domain.per_example:
                part = part[0]
            if (shape := part.shape[:-1] + domain.shape) != part.shape:
                part = part.reshape(shape)
            hypers[name] = domain.constrain(part, generator)
        return hypers

    def unconstrain(self, hypers: Hypers) -> Tensor:
        """Return u, [h], from unbatched hyperparameters; frozen ones are ignored.

        Raises:
            BilevelError: a tuned hyperparameter is missing.
        """
        if missing := [name for name in self.tuned if name not in hypers]:
            raise BilevelError(
                f"hyperparameter `{missing[0]}` has no value; give one for each of "
                f"{', '.join(self.tuned)}"
            )
        parts = [
            self[name].unconstrain(hypers[name]).expand(self[name].shape).reshape(-1)
            for name in self.tuned
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def by_name(self, v: Tensor) -> Hypers:
        """Cut a vector over the coordinates, [h], into one leaf for each tuned hyperparameter.

        Leaves have the shapes of their domains, and the values keep their units.
        """
        return {name: v[s].reshape(self[name].shape) for name, s in self._slices.items()}

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> "Space":
        """Return the space with some fields of some hyperparameters changed.

        Configuration files use this method. A new name adds a setting of the inner optimizer to
        tune; it needs the fields `optimizer` and `init`.

        Example:
            >>> from bilevel import Positive
            >>> space = Space(decay=Positive(init=1e-3))
            >>> space.override({"decay": {"init": 0.1}})["decay"].init
            0.1
            >>> list(space.override({"rate": {"optimizer": "lr", "init": 0.01}}))
            ['decay', 'rate']

        Raises:
            BilevelError: a hyperparameter or a field is unknown, or a value lies outside its
                domain.
        """
        domains = dict(self._domains)
        if not isinstance(changes, Mapping):
            raise BilevelError(
                f"space={changes!r} must map names of hyperparameters to changes; write "
                "space.NAME.init=…"
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
                    f"hyperparameter `{name}` is unknown{near(name, domains)}; choose "
                    f"{', '.join(domains)}"
                )
            # the shape belongs to the problem
            known = [field.name for field in fields(domains[name]) if field.name != "shape"]
            if not isinstance(change, Mapping):
                value = "…" if change is None else change
                raise BilevelError(
                    f"hyperparameter `{name}`={value} must be set through a field; write "
                    f"{name}.init={value} for its initial value"
                )
            if change.get("optimizer", domains[name].optimizer) != domains[name].optimizer:
                raise BilevelError(
                    f"hyperparameter `{name}` exists, so {name}.optimizer={change['optimizer']} "
                    "cannot be set; use a new name for the setting of the inner optimizer, for "
                    f"example rate.optimizer={change['optimizer']}"
                )
            if "shape" in change:
                raise BilevelError(
                    f"hyperparameter `{name}`: shape={change['shape']} cannot be set, since the "
                    f"problem fixes the shape {list(domains[name].shape)}; leave it out"
                )
            for field in change:
                if field not in known:
                    raise BilevelError(
                        f"hyperparameter `{name}`: {field}={change[field]!r} is an unknown "
                        f"field{near(field, known)}; choose {', '.join(known)}"
                    )
            try:
                domains[name] = replace(domains[name], **change)
            except BilevelError as error:
                raise BilevelError(f"hyperparameter `{name}`: {error}") from None
        return Space(**domains)

    def _constant(self, name: str, like: Tensor) -> Tensor:
        """Return the value of a frozen hyperparameter.

        It is copied to each device once, since every copy waits for the device.
        """
        key = (name, like.device, like.dtype)
        if key not in self._constants:
            with torch.inference_mode(False):  # training must be able to use it too
                self._constants[key] = self[name].initial().to(like.device, like.dtype)
        return self._constants[key]

    def _per_coordinate(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        sizes = torch.tensor([self[name].numel for name in self.tuned], dtype=torch.long)
        return torch.repeat_interleave(torch.tensor(values, dtype=dtype), sizes)


def entry_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the entries of an array, or the name itself for a number.

    Example:
        >>> entry_names("decay", ()), entry_names("mix", (1, 2))
        (['decay'], ['mix[0,0]', 'mix[0,1]'])
    """
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape))]


def require_space(space: Any) -> None:
    """Raise `BilevelError` if the argument `space` is no `Space`."""
    if not isinstance(space, Space):
        raise BilevelError(
            f"space={type(space).__name__} must be a Space; write for example "
            "Space(decay=Positive(init=1e-3))"
        )


def _added(name: str, change: Mapping[str, Any]) -> Domain:
    """Return the setting of the inner optimizer that joins a space as `name`."""
    if "init" not in change:
        raise BilevelError(
            f"hyperparameter `{name}` needs an initial value; give {name}.init=… beside "
            f"{name}.optimizer=…"
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
            f"hyperparameter `{name}`: {error}; give optimizer, init, scale, frozen, low or high"
        ) from None
    except BilevelError as error:
        raise BilevelError(f"hyperparameter `{name}`: {error}") from None
