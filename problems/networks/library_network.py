"""Networks of torchvision and timm, whose dropout layers become sites with tuned rates."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.problems.networks.building_blocks import Drop, keep

Library = Literal["torchvision", "timm"]


@cache
def names() -> tuple[str, ...]:
    """Return the names of the classification networks of `torchvision.models`."""
    from torchvision import models

    return tuple(models.list_models(module=models))


@cache
def timm_names() -> tuple[str, ...]:
    """Return the names of the networks of timm.

    Raises:
        BilevelError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise BilevelError(
            f"network=timm/… needs timm ({error}); install it with `pip install timm`"
        ) from None
    return tuple(timm.list_models())


class Site(nn.Module):
    """A dropout site that replaces a dropout layer."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site
        self.drop: Drop = keep

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.site, x)


class LibraryNetwork(nn.Module):
    """A network of torchvision or timm by its name, without pretrained weights.

    A grey image is repeated for the three input channels. Dropout sites: 0 the input, then the
    `nn.Dropout` modules of the network in their order. A module of timm with the rate 0, its
    default, is none. The network's other random parts (stochastic depth, dropout within attention)
    are unchanged; their draws follow from the generator of `predict`.

    Args:
        library: `torchvision` or `timm`.
        name: name in `torchvision.models.list_models()` or `timm.list_models()`.
        classes: number of logits.
        options: arguments of the function that builds the network.

    Example:
        >>> LibraryNetwork("torchvision", "squeezenet1_1", 10).sites
        2
    """

    def __init__(
        self, library: Library, name: str, classes: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network = _network(library, name, classes, options or {})
        made: dict[nn.Module, Site] = {}
        for parent in list(self.network.modules()):
            for child_name, child in list(parent.named_children()):
                # attention reads the rate of `attn_drop` and does not call it
                unused = library == "timm" and (
                    getattr(child, "p", 0) == 0 or child_name == "attn_drop"
                )
                if isinstance(child, nn.Dropout) and not unused:
                    setattr(parent, child_name, made.setdefault(child, Site(len(made) + 1)))
        self._own = list(made.values())

    @property
    def sites(self) -> int:
        """Return the number of dropout sites."""
        return 1 + len(self._own)

    def forward(self, x: Float[Tensor, "batch channels height width"], drop: Drop = keep) -> Tensor:
        x = drop(0, x)
        for site in self._own:
            site.drop = drop
        try:
            return self.network(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)
        finally:
            for site in self._own:
                site.drop = keep


def _network(library: Library, name: str, classes: int, options: Mapping[str, Any]) -> nn.Module:
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, num_classes=classes, **options)
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=classes, **options)
