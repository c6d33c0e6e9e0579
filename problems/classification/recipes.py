"""Image classification problems: digits, MNIST, and any images with a network by its name."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bilevel import BilevelError
from bilevel.problems.classification.augmentation import Operation
from bilevel.problems.classification.problem import Classification, WeightDecay
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.labelled_images import Images, first_examples
from bilevel.problems.datasets.standard_images import load_digits, load_mnist
from bilevel.problems.networks.building_blocks import Norm
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.networks.registry import image_network

ALL: tuple[Operation, ...] = ("affine", "colour", "cutout")


def digits(
    hidden: Sequence[int] = (256, 256),
    batch_size: int = 64,
    split_seed: int = 0,
    **options: Any,
) -> Classification:
    """Classify scikit-learn's digits by an MLP; tuned: a dropout rate per layer, and weight decay.

    Args:
        hidden: widths of the hidden layers.
        batch_size: number of examples in a batch of training and of validation.
        split_seed: seed of the data split.
        options: other arguments of `Classification`.

    Example:
        >>> list(digits(hidden=[32]).space)
        ['input_dropout', 'dropout1', 'weight_decay']
        >>> digits(hidden=[32], weight_decay="per_weight").space["weight_decay"].shape
        (2410,)
    """
    sizes = [64, *hidden, 10]
    return Classification(
        partial(MLP, sizes),
        load_digits(split_seed),
        sites=len(sizes) - 1,
        batch_size=batch_size,
        **options,
    )


def mnist(
    root: str = "data",
    download: bool = True,
    hidden: Sequence[int] = (1200, 1200),
    *,
    valid_fraction: float = 0.15,
    train_size: int | None = None,
    valid_size: int | None = None,
    weight_decay: WeightDecay = False,
    **options: Any,
) -> Classification:
    """Classify MNIST by the MLP 784-1200-1200-10; tuned: three dropout rates.

    Args:
        root: folder of the data.
        download: whether missing files are downloaded.
        hidden: widths of the hidden layers.
        valid_fraction: fraction of the training images that are used for validation.
        train_size: number of training images, the first ones; None uses all.
        valid_size: number of validation images, the first ones; None uses all.
        weight_decay: as in `Classification`; off by default.
        options: other arguments of `Classification`.

    Source: Bae & Grosse, NeurIPS 2020, the MNIST experiment of the official code.
    """
    sizes = [784, *hidden, 10]
    return Classification(
        partial(MLP, sizes),
        first_examples(load_mnist(root, download, valid_fraction), train_size, valid_size),
        sites=len(sizes) - 1,
        weight_decay=weight_decay,
        **options,
    )


def images(
    data: Images | ImageFiles,
    network: str = "simple_cnn",
    norm: Norm | None = None,
    width: float | None = None,
    network_options: Mapping[str, Any] | None = None,
    *,
    train_size: int | None = None,
    valid_size: int | None = None,
    weight_decay: WeightDecay = False,
    **options: Any,
) -> Classification:
    """Classify images by a network that is given by its name.

    Tuned are a dropout rate for each dropout site of the network, and the strengths of the
    augmentation operations.

    Args:
        data: images in memory or in files.
        network: `mlp`, `simple_cnn`, `alexnet`, `vgg16`, `resnet18`, `vit`, or a network of
            torchvision or timm, as in `bilevel.problems.networks.registry.image_network`.
        norm: `none`, `batch` or `group`; None takes the usual one of the network.
        width: factor on the numbers of channels and units; None keeps the network as it is.
        network_options: other options of the network.
        train_size: number of training images, the first ones; None uses all.
        valid_size: number of validation images, the first ones; None uses all.
        weight_decay: as in `Classification`; off by default.
        options: other arguments of `Classification`.

    Example:
        >>> problem = images(load_digits(), width=0.25, augment=["cutout"], train_size=100)
        >>> list(problem.space)[3:]
        ['dropout3', 'cutout_holes', 'cutout_length']

    Raises:
        BilevelError: `data` holds no images, a size exceeds the number of images, or
            `image_network` or `Classification` raises it.

    Source: Bae & Grosse, NeurIPS 2020, the FashionMNIST and CIFAR-10 experiments of the official
    code.
    """
    if not isinstance(data, (Images, ImageFiles)):
        raise BilevelError(
            f"data={data!r} must hold images; give an Images or ImageFiles object, for example "
            "data._target_=bilevel.problems.datasets.load_cifar10"
        )
    data = first_examples(data, train_size, valid_size)
    own = dict(network_options or {}) | ({} if width is None else {"width": width})
    made = image_network(network, data.shape, data.class_count, norm, **own)
    return Classification(made.make, data, sites=made.sites, weight_decay=weight_decay, **options)


def augmented_images(
    images: Images,
    channels: Sequence[int] = (16, 32),
    hidden: int | None = None,
    augment: Sequence[Operation] = ALL,
    *,
    train_size: int | None = None,
    valid_size: int | None = None,
    weight_decay: WeightDecay = False,
    **options: Any,
) -> Classification:
    """Classify images by `SimpleCNN`, with learned augmentation.

    Tuned are the four dropout rates of the network and the strengths of the operations.

    Args:
        images: data in memory, with 1 or 3 channels.
        channels: numbers of channels of the two convolutions.
        hidden: number of hidden units; None takes as many as the hidden layer has inputs.
        augment: any of `affine`, `colour` and `cutout`; an empty list switches augmentation off.
        train_size: number of training images, the first ones; None uses all.
        valid_size: number of validation images, the first ones; None uses all.
        weight_decay: as in `Classification`; off by default.
        options: other arguments of `Classification`.

    Example:
        >>> problem = augmented_images(load_digits(), channels=[4, 8], augment=["affine"])
        >>> list(problem.space)[3:]
        ['dropout3', 'degrees', 'translate', 'scale', 'shear']

    Raises:
        BilevelError: `images` holds no images in memory, a size exceeds the number of images,
            `channels` has not two numbers, or `Classification` raises it.
    """
    if not isinstance(images, Images):
        raise BilevelError(
            f"images={images!r} must hold images in memory; give an Images object, for example "
            "images._target_=bilevel.problems.datasets.load_digits"
        )
    if len(channels) != 2:
        raise BilevelError(
            f"channels={list(channels)} must have two numbers, one per convolution; "
            "give for example [8,16]"
        )
    images = first_examples(images, train_size, valid_size)
    first, second = channels
    made = image_network(
        "simple_cnn", images.shape, images.class_count, first=first, second=second, hidden=hidden
    )
    return Classification(
        made.make,
        images,
        sites=made.sites,
        augment=augment,
        weight_decay=weight_decay,
        **options,
    )
