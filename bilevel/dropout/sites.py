"""The dropout sites of a module: places that hold a rate as a number."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


class Rate(float):
    """The rate of a dropout site, a number that remembers its site and its hyperparameter.

    A module passes it on to the function that drops. Arithmetic with it returns plain numbers.

    Attributes:
        site: the name of the site.
        hyper: the hyperparameter that takes its place; None for a constant rate.

    Example:
        >>> rate = Rate(0.5, "0.drop", "dropout")
        >>> rate == 0.5, rate.hyper, type(1 - rate).__name__
        (True, 'dropout', 'float')
    """

    site: str
    hyper: str | None

    def __new__(cls, value: float, site: str = "", hyper: str | None = None) -> "Rate":
        rate = super().__new__(cls, value)
        rate.site, rate.hyper = site, hyper
        return rate


class Site(NamedTuple):
    """A place in a module that holds a dropout rate.

    Attributes:
        name: the name of the layer; an attribute of another layer is a part of the name.
        owner: the layer that holds the rate.
        attribute: the name of the attribute.
    """

    name: str
    owner: nn.Module
    attribute: str

    @property
    def rate(self) -> float:
        """Return the rate that the layer holds."""
        return float(getattr(self.owner, self.attribute))

    def mark(self, hyper: str | None) -> None:
        """Let the layer hold the same rate as a `Rate` of `hyper`."""
        setattr(self.owner, self.attribute, Rate(self.rate, self.name, hyper))


def dropout_sites(module: nn.Module) -> list[Site]:
    """Return the sites of a module, in the order of its layers.

    They are the layers of the family of `nn.Dropout`, under their own names, and numbers in [0, 1)
    whose attribute has `drop` in its name (`self_attn.dropout` of `nn.MultiheadAttention`). Fused
    recurrent layers have none: their kernel takes a constant rate.

    Example:
        >>> module = nn.Sequential(nn.Dropout(0.5), nn.MultiheadAttention(4, 2, dropout=0.1))
        >>> [(site.name, site.rate) for site in dropout_sites(module)]
        [('0', 0.5), ('1.dropout', 0.1)]
    """
    return [site for name, layer in module.named_modules() for site in _sites_of(name, layer)]


def _sites_of(name: str, layer: nn.Module) -> Iterator[Site]:
    if isinstance(layer, _DropoutNd):
        yield Site(name or "p", layer, "p")
    elif not isinstance(layer, nn.RNNBase):
        for key, value in vars(layer).items():
            if "drop" in key and _is_rate(value):
                yield Site(f"{name}.{key}" if name else key, layer, key)


def _is_rate(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < 1
