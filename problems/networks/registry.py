"""Networks by name: those of this package, and torchvision's."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.problems.networks.alexnet_vgg16 import VGG16, AlexNet
from bilevel.problems.networks.building_blocks import Norm, check_norm, scaled
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.networks.resnet18 import ResNet18
from bilevel.problems.networks.simple_cnn import SimpleCNN
from bilevel.problems.networks.torchvision_network import TorchvisionNetwork, names
from bilevel.text import near

Shape = tuple[int, int, int]


class Network(NamedTuple):
    """What `Classification` needs of a network.

    Attributes:
        make: makes one, a module with `forward(x, drop)`.
        sites: how many dropout sites it has, numbered from 0.
    """

    make: Callable[[], nn.Module]
    sites: int


def image_network(
    name: str, shape: Shape, classes: int, norm: Norm | None = None, **options: Any
) -> Network:
    """The network called `name` for images of `shape`.

    | name | options | norm | dropout sites |
    |---|---|---|---|
    | `mlp` | `hidden` ([1200, 1200]), `width` | none | the input and the hidden layers |
    | `simple_cnn` | `first` (16), `second` (32), `hidden`, `width` | **none**, batch, group | 4 |
    | `alexnet` | `width` | **none**, batch, group | 8 |
    | `vgg16` | `width` | **none**, batch, group | 16 |
    | `resnet18` | `width` | none, **batch**, group | 5 |
    | `torchvision/NAME` | those of `torchvision.models.NAME` | its own | the input and its own `nn.Dropout`s |

    `width` is a factor on all channels and hidden units. `torchvision/` may be left out where the name is none of ours.

    Args:
        name: in this table.
        shape: channels, height and width of an image.
        classes: how many logits there are.
        norm: after each convolution; None for the network's usual one, in bold.
        options: of the network.

    Example:
        >>> image_network("mlp", (1, 28, 28), 10, hidden=[32]).sites
        2
        >>> sum(p.numel() for p in image_network("vgg16", (3, 32, 32), 10).make().parameters())
        15245130

    Raises:
        BilevelError: an unknown name, norm or option, or images that do not fit.
    """
    theirs = str(name).removeprefix("torchvision/")
    if name in OURS:
        network = _ours(name, shape, classes, norm, options)
    elif theirs in names():
        if norm is not None:
            raise BilevelError(
                f"norm={norm}: {theirs} of torchvision has the norms that it has; leave norm out (norm=null)"
            )
        make = partial(TorchvisionNetwork, theirs, classes, options)
        network = Network(make, 0)
    else:
        raise BilevelError(
            f"there is no network {name!r}{near(theirs, dict.fromkeys([*OURS, *names()]))}; there are {', '.join(OURS)}, and "
            "those of torchvision.models by their names"
        )
    module = _fitting(name, network.make, shape, classes)
    return (
        network._replace(sites=module.sites) if isinstance(module, TorchvisionNetwork) else network
    )


def _ours(
    name: str, shape: Shape, classes: int, norm: Norm | None, options: dict[str, Any]
) -> Network:
    known = list(signature(OURS[name]).parameters)[2:]
    if norm is not None:
        check_norm(norm)
        if "norm" not in known and norm != "none":
            raise BilevelError(
                f"norm={norm}: {name} has no convolutions to put one after; leave norm out (norm=null)"
            )
    taken = [option for option in known if option != "norm"]
    for option in options:
        if option not in taken:
            raise BilevelError(
                f"{name} has no option {option!r}{near(option, taken)}; it has {', '.join(taken)}"
            )
    width = options.get("width", 1)
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < inf:
        raise BilevelError(
            f"width={width!r} is no factor on channels; give a number above zero, 1 for the network as it is"
        )
    given = {"norm": norm} if norm is not None and "norm" in known else {}
    return OURS[name](shape, classes, **given, **options)


def _mlp(
    shape: Shape, classes: int, hidden: Sequence[int] = (1200, 1200), width: float = 1
) -> Network:
    sizes = [prod(shape), *(scaled(hidden, width) if width != 1 else hidden), classes]
    return Network(partial(MLP, sizes), len(sizes) - 1)


def _simple_cnn(
    shape: Shape,
    classes: int,
    norm: Norm = "none",
    first: int = 16,
    second: int = 32,
    hidden: int | None = None,
    width: float = 1,
) -> Network:
    if width != 1:
        first, second, *units = scaled(
            [first, second, *([] if hidden is None else [hidden])], width
        )
        hidden = units[0] if units else None
    return Network(partial(SimpleCNN, first, second, hidden, shape, classes, norm), SimpleCNN.SITES)


def _alexnet(shape: Shape, classes: int, norm: Norm = "none", width: float = 1) -> Network:
    return Network(partial(AlexNet, shape, classes, norm, width), AlexNet.SITES)


def _vgg16(shape: Shape, classes: int, norm: Norm = "none", width: float = 1) -> Network:
    return Network(partial(VGG16, shape, classes, norm, width), VGG16.SITES)


def _resnet18(shape: Shape, classes: int, norm: Norm = "batch", width: float = 1) -> Network:
    return Network(partial(ResNet18, shape, classes, norm, width), ResNet18.SITES)


OURS: dict[str, Callable[..., Network]] = {
    "mlp": _mlp,
    "simple_cnn": _simple_cnn,
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "resnet18": _resnet18,
}
"""The networks of this package by name: from (shape, classes, norm where there is one, options)."""


def _fitting(name: str, make: Callable[[], nn.Module], shape: Shape, classes: int) -> nn.Module:
    """The network, after a pass over two images, both without values where that works: whether they fit is seen at once."""
    try:
        try:
            module, logits = _passed(make, shape, "meta")
        except NotImplementedError:  # a constructor that reads values (regnet's)
            with torch.random.fork_rng(devices=[]):
                module, logits = _passed(make, shape, "cpu")
    except BilevelError:
        raise
    except Exception as error:  # of torchvision's own code, about its options or its input
        said = " ".join(str(error).split())
        raise BilevelError(
            f"{name} cannot be made for images of {' × '.join(map(str, shape))} ({type(error).__name__}: {said}); give options "
            "that its constructor takes (image_size=32 for a vision transformer, say), larger images, or another network"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        raise BilevelError(
            f"{name} gives more than logits in training; switch its other outputs off (aux_logits=false), or take another one"
        )
    return module


def _passed(make: Callable[[], nn.Module], shape: Shape, device: str) -> tuple[nn.Module, Any]:
    with torch.device(device), torch.no_grad():
        module = make()
        return module, module(torch.zeros(2, *shape))
