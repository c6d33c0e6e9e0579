"""`tuned_dropout`: the dropout rates of a module as hyperparameters, without a change of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.dropout import AlphaDropout, FeatureAlphaDropout

from bilevel.domains import Integer, Interval
from bilevel.dropout.calls import TunedCalls
from bilevel.dropout.kinds import DropoutKind, dropout_by_name
from bilevel.dropout.sites import dropout_sites
from bilevel.errors import BilevelError
from bilevel.name_patterns import Patterns, grouped
from bilevel.params import Hypers
from bilevel.space import Space
from bilevel.validate import wrong

Groups: TypeAlias = Patterns | Mapping[str, Patterns]
"""Patterns of the names of sites; a mapping has the name of a hyperparameter for each group."""

START = 0.05
"""The initial rate of a group whose layers all have the rate 0."""

HIGHEST = 0.95
"""The largest rate of a hyperparameter that the space does not declare."""


class TunedDropout:
    """The dropout rates of a module, as hyperparameters; made by `tuned_dropout`.

    Attributes:
        domains: the domain of each hyperparameter, with the mean rate of its layers to begin with.
        sites: the hyperparameter of each tuned site.
        reached: the sites whose rates arrived at a dropout function so far.
        kind: the kind of dropout.
        whole: whether a pattern selects all sites.
    """

    def __init__(
        self, module: nn.Module, groups: Groups, kind: DropoutKind, temperature: float | None
    ) -> None:
        if not isinstance(module, nn.Module):
            raise BilevelError(
                f"module={type(module).__name__} must be an nn.Module; pass the module itself"
            )
        self.kind = kind
        self._drop = dropout_by_name(kind, temperature)
        named = dict(groups) if isinstance(groups, Mapping) else {"dropout": groups}
        if not named or not all(isinstance(name, str) for name in named):
            raise wrong("dropout", groups, "must name hyperparameters", "write {'dropout': '*'}")
        self.whole = "*" in named.values()
        found = {site.name: site for site in dropout_sites(module)}
        if not found:
            raise BilevelError(
                f"dropout={groups!r} selects no layer, because {type(module).__name__} has no "
                "dropout layer and no attribute with `drop` in its name that holds a rate; add "
                "nn.Dropout layers, or leave dropout out"
            )
        self.sites = grouped(named, found, "dropout", "dropout layer")
        rates: dict[str, list[float]] = {name: [] for name in named}
        for name, site in found.items():
            if (hyper := self.sites.get(name)) is not None:
                rates[hyper].append(site.rate)
                alpha = isinstance(site.owner, (AlphaDropout, FeatureAlphaDropout))
                if alpha and kind != "bernoulli":
                    what = f"has no form for `{name}`, which is alpha dropout"
                    raise wrong("dropout_kind", kind, what, "use bernoulli, or leave the layer out")
            site.mark(hyper)
        self.domains = {
            name: Interval(
                low=0.0,
                high=HIGHEST,
                init=sum(own) / len(own) or START,
                differentiable=kind != "bernoulli",
            )
            for name, own in rates.items()
        }
        self.reached: set[str] = set()

    def join(self, space: Space) -> Space:
        """Return the space with the rates; domains that it declares for them keep their ranges.

        Raises:
            BilevelError: a declared rate is not an interval within [0, 1], or not a single number.
        """
        given = {name: space[name] for name in self.domains if name in space}
        for name, domain in given.items():
            if (
                not isinstance(domain, Interval)
                or isinstance(domain, Integer)
                or domain.shape
                or domain.low < 0
                or domain.high > 1
            ):
                raise BilevelError(
                    f"space.{name}={domain!r} is a dropout rate and must be one number between 0 "
                    "and 1; declare Interval(low=0.0, high=0.9, init=0.1), or leave it out"
                )
        declared = {
            name: replace(domain, differentiable=self.kind != "bernoulli")
            for name, domain in given.items()
        }
        return Space(**{**space, **self.domains, **declared})

    def __call__(self, hypers: Hypers, generator: torch.Generator | None) -> TunedCalls:
        """Return a context in which calls of the module drop with the rates in `hypers`.

        Args:
            hypers: λ; a rate is [], or [B] with one for each example.
            generator: for the masks, on the device of the activations.
        """
        return TunedCalls(hypers, self._drop, generator, self.reached)


def tuned_dropout(
    module: nn.Module,
    groups: Groups = "*",
    kind: DropoutKind = "bernoulli",
    temperature: float | None = None,
) -> TunedDropout:
    """Return the dropout rates of a module as hyperparameters; its code needs no change.

    `ModuleProblem(…, dropout=groups)` calls it. Call it yourself for a training loop or a `Problem`
    of your own. It finds the layers of the family of `nn.Dropout`, and attributes that hold a rate
    and have `drop` in their name, as attention layers do (`dropout`, `attention_dropout`). The
    layers keep their rates, marked with the name of the hyperparameter. Only calls within the
    context use λ.

    Args:
        module: any module.
        groups: patterns of the names of layers (`*` stands for any text), or such patterns for each
            hyperparameter: `{"attention": "*.attn.*", "mlp": "*.mlp.*"}`. The default is one
            hyperparameter, `dropout`, for all layers. Other layers keep their rates.
        kind: `bernoulli` is dropout itself, which is sampled, so that ∂L_T/∂λ does not exist.
            `gaussian` and `concrete` have a derivative in the rate.
        temperature: temperature of concrete dropout; None takes 0.1.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        >>> dropout = tuned_dropout(module)
        >>> dropout.sites, dropout.domains["dropout"].init
        ({'1': 'dropout'}, 0.1)
        >>> with dropout({"dropout": torch.tensor(0.5)}, torch.Generator()):
        ...     module(torch.ones(4, 2)).shape
        torch.Size([4, 1])

    Raises:
        BilevelError: there is no such layer, a pattern selects none, two groups select the same
            one, or the kind has no form for it.
    """
    return TunedDropout(module, groups, kind, temperature)
