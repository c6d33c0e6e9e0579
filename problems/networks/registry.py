"""Networks for images by name: those of this package, of torchvision and of timm."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.problems.networks.alexnet_vgg16 import VGG16, AlexNet
from bilevel.problems.networks.building_blocks import Norm, scaled
from bilevel.problems.networks.library_network import Library, LibraryNetwork, names, timm_names
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.networks.resnet18 import ResNet18
from bilevel.problems.networks.simple_cnn import SimpleCNN
from bilevel.problems.networks.transformer import ViT
from bilevel.text import near
from bilevel.validate import one_of, positive, wrong

Shape = tuple[int, int, int]


class Network(NamedTuple):
    """A network as `Classification` takes it.

    Attributes:
        make: makes a module with `forward(x, drop)`.
        sites: number of dropout sites, numbered from 0.
    """

    make: Callable[[], nn.Module]
    sites: int


def image_network(
    name: str, shape: Shape, classes: int, norm: Norm | None = None, **options: Any
) -> Network:
    """Return the network called `name` for images of `shape`.

    | name | options | norm | dropout sites |
    |---|---|---|---|
    | `mlp` | `hidden` ([1200, 1200]), `width` | none | the input and the hidden layers |
    | `simple_cnn` | `first` (16), `second` (32), `hidden`, `width` | **none**, batch, group | 4 |
    | `alexnet` | `width` | **none**, batch, group | 8 |
    | `vgg16` | `width` | **none**, batch, group | 16 |
    | `resnet18` | `width` | none, **batch**, group | 5 |
    | `vit` | `patch` (4), `tokens` (128), `depth` (4), `heads` (4), `width` | | 2 + 2 · `depth` |
    | `torchvision/NAME` | those of `torchvision.models.NAME` | its own | input, `nn.Dropout`s |
    | `timm/NAME` | those of `timm.create_model(NAME)` | its own | input, `nn.Dropout`s above 0 |

    `width` is a factor on all numbers of channels and hidden units. The prefix `torchvision/` can
    be omitted if this package has no network of that name.

    Args:
        name: a name in this table.
        shape: channels, height and width of an image.
        classes: number of logits.
        norm: layer after each convolution; None takes the usual one of the network, in bold.
        options: options of the network.

    Example:
        >>> image_network("mlp", (1, 28, 28), 10, hidden=[32]).sites
        2
        >>> vgg16 = image_network("vgg16", (3, 32, 32), 10).make()
        >>> sum(p.numel() for p in vgg16.parameters())
        15245130

    Raises:
        BilevelError: the name, the norm or an option is unknown, or the images do not fit.
    """
    theirs = str(name).removeprefix("torchvision/")
    if name in OURS:
        network = _ours(name, shape, classes, norm, options)
    elif theirs in names() or theirs.startswith("timm/"):
        network = _of_library(name, theirs, classes, norm, options)
    else:
        meant = near(theirs, dict.fromkeys([*OURS, *names()]))
        remedy = f"choose {', '.join(OURS)}, a network of torchvision.models or timm/NAME"
        raise wrong("network", name, f"is unknown{meant}", remedy)
    module = _checked_module(name, network.make, shape, classes)
    if isinstance(module, LibraryNetwork):
        return network._replace(sites=module.sites)
    return network


def _of_library(
    name: str, theirs: str, classes: int, norm: Norm | None, options: dict[str, Any]
) -> Network:
    """Return a network of torchvision or timm; its sites are counted once it is made."""
    library: Library = "timm" if theirs.startswith("timm/") else "torchvision"
    own = theirs.removeprefix("timm/")
    if norm is not None:
        raise wrong("norm", norm, f"does not apply to {own} of {library}", "set norm=null")
    if library == "timm" and own not in (known := timm_names()):
        remedy = "choose one of timm.list_models()"
        raise wrong("network", name, f"is unknown{near(own, dict.fromkeys(known))}", remedy)
    return Network(partial(LibraryNetwork, library, own, classes, options), 0)


def _ours(
    name: str, shape: Shape, classes: int, norm: Norm | None, options: dict[str, Any]
) -> Network:
    known = list(signature(OURS[name]).parameters)[2:]
    if norm is not None:
        one_of(("none", "batch", "group"), norm=norm)
        if "norm" not in known and norm != "none":
            reason = f"needs convolutions, and {name} has none"
            raise wrong("norm", norm, reason, "set norm=null")
    taken = [option for option in known if option != "norm"]
    for option in options:
        if option not in taken:
            raise BilevelError(
                f"{name} has no option `{option}`{near(option, taken)}; choose {', '.join(taken)}"
            )
    positive("choose 1 for the network as it is", width=options.get("width", 1))
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
        first, second = scaled([first, second], width)
        hidden = None if hidden is None else scaled([hidden], width)[0]
    return Network(partial(SimpleCNN, first, second, hidden, shape, classes, norm), SimpleCNN.SITES)


def _alexnet(shape: Shape, classes: int, norm: Norm = "none", width: float = 1) -> Network:
    return Network(partial(AlexNet, shape, classes, norm, width), AlexNet.SITES)


def _vgg16(shape: Shape, classes: int, norm: Norm = "none", width: float = 1) -> Network:
    return Network(partial(VGG16, shape, classes, norm, width), VGG16.SITES)


def _resnet18(shape: Shape, classes: int, norm: Norm = "batch", width: float = 1) -> Network:
    return Network(partial(ResNet18, shape, classes, norm, width), ResNet18.SITES)


def _vit(
    shape: Shape,
    classes: int,
    patch: int = 4,
    tokens: int = 128,
    depth: int = 4,
    heads: int = 4,
    width: float = 1,
) -> Network:
    if width != 1:  # a whole number of units for each head
        tokens = heads * scaled([tokens], width / heads)[0]
    return Network(partial(ViT, shape, classes, patch, tokens, depth, heads), 2 + 2 * depth)


OURS: dict[str, Callable[..., Network]] = {
    "mlp": _mlp,
    "simple_cnn": _simple_cnn,
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "resnet18": _resnet18,
    "vit": _vit,
}
"""Functions of (shape, classes, norm if there is one, options), by the names of the networks."""


def _checked_module(
    name: str, make: Callable[[], nn.Module], shape: Shape, classes: int
) -> nn.Module:
    """Return the network after a pass over two images, which shows that the images fit.

    Neither the network nor the images hold values, unless a constructor reads them.
    """
    try:
        try:
            module, logits = _make_and_run(make, shape, "meta")
        except NotImplementedError:  # a constructor that reads values, as in regnet
            with torch.random.fork_rng(devices=[]):
                module, logits = _make_and_run(make, shape, "cpu")
    except BilevelError:
        raise
    except Exception as error:  # torchvision raises many classes about options and inputs
        reason = " ".join(str(error).split())
        raise BilevelError(
            f"network={name!r} cannot be made for images of {' × '.join(map(str, shape))} "
            f"({type(error).__name__}: {reason}); give options that its constructor accepts (such "
            "as image_size=32 for a vision transformer), larger images, or another network"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        reason = "returns more than logits in training"
        remedy = "switch its other outputs off (aux_logits=false), or choose another network"
        raise wrong("network", name, reason, remedy)
    return module


def _make_and_run(
    make: Callable[[], nn.Module], shape: Shape, device: str
) -> tuple[nn.Module, Any]:
    with torch.device(device), torch.no_grad():
        module = make()
        return module, module(torch.zeros(2, *shape))
