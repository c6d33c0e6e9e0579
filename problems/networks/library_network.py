"""Networks of `torchvision.models`, whose dropout layers become sites with tuned rates."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from bilevel.problems.networks.building_blocks import Drop, keep


@cache
def names() -> tuple[str, ...]:
    """Return the names of the classification networks of `torchvision.models`."""
    from torchvision import models

    return tuple(models.list_models(module=models))


class Site(nn.Module):
    """A dropout site that replaces a dropout layer."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site
        self.drop: Drop = keep

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.site, x)


class TorchvisionNetwork(nn.Module):
    """A network of torchvision by its name, without pretrained weights.

    A grey image is repeated for the three input channels. Dropout sites: 0 the input, then the
    `nn.Dropout` modules of the network in their order. Its other random parts (stochastic depth,
    dropout within attention) are unchanged; their draws follow from the generator of `predict`.

    Args:
        name: name in `torchvision.models.list_models()`.
        classes: number of logits.
        options: arguments of the function that builds the network.

    Example:
        >>> TorchvisionNetwork("squeezenet1_1", 10).sites
        2
    """

    def __init__(self, name: str, classes: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from torchvision import models

        self.network = models.get_model(name, weights=None, num_classes=classes, **(options or {}))
        made: dict[nn.Module, Site] = {}
        for parent in list(self.network.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.Dropout):
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
