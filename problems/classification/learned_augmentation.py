"""Learned augmentation: a small convolutional network on images, few if wanted, with strengths and dropout rates tuned."""

from collections.abc import Sequence

from bilevel import BilevelError
from bilevel.problems.classification.any_network import images as of_network
from bilevel.problems.classification.augmentation import Operation
from bilevel.problems.classification.problem import Changes, Classification, WeightDecay
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.dropout import Kind

ALL: tuple[Operation, ...] = ("affine", "colour", "cutout")


def augmented_images(
    images: Images,
    channels: Sequence[int] = (16, 32),
    hidden: int | None = None,
    augment: Sequence[Operation] = ALL,
    flip: bool = False,
    train_size: int | None = None,
    valid_size: int | None = None,
    batch_size: int = 128,
    weight_decay: WeightDecay = False,
    dropout: Kind = "bernoulli",
    temperature: float | None = None,
    space: Changes | None = None,
) -> Classification:
    """`SimpleCNN` on any images; tuned: its four dropout rates, and the strengths of the operations.

    Args:
        images: the data, of 1 or 3 channels.
        channels: of the two convolutions.
        hidden: units of the hidden layer; by default as many as it has inputs.
        augment: any of `affine`, `colour` and `cutout`; empty for none.
        flip: whether half of the training images are mirrored left to right.
        train_size: how many training images are used, the first ones; None for all.
        valid_size: the same of validation images.
        batch_size: of training and of validation.
        weight_decay: as in `Classification`.
        dropout: as there.
        temperature: as there.
        space: changes to the space, as in `Space.override`.

    Example:
        >>> from bilevel.problems.datasets import labelled_images
        >>> problem = augmented_images(labelled_images.digits(), channels=[4, 8], augment=["affine"], train_size=100)
        >>> list(problem.space)[3:]
        ['dropout3', 'degrees', 'translate', 'scale', 'shear']

    Raises:
        BilevelError: as `Classification`, and for more images than there are, or other than two convolutions.
    """
    if not isinstance(images, Images):
        raise BilevelError(
            f"images={images!r} are none; give bilevel.problems.datasets.labelled_images.Images, as images._target_=bilevel.problems.datasets.labelled_images.digits"
        )
    if len(channels) != 2:
        raise BilevelError(
            f"channels={list(channels)}: there are two convolutions; give two numbers, [8,16] say"
        )
    return of_network(
        images,
        "simple_cnn",
        network_options={"first": channels[0], "second": channels[1], "hidden": hidden},
        augment=augment,
        flip=flip,
        train_size=train_size,
        valid_size=valid_size,
        batch_size=batch_size,
        weight_decay=weight_decay,
        dropout=dropout,
        temperature=temperature,
        space=space,
    )
