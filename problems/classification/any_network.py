"""Image classification with a network by its name, and everything tuned: dropout rates, augmentation, weight decay."""

from collections.abc import Mapping, Sequence
from typing import Any

from bilevel import BilevelError
from bilevel.problems.classification.augmentation import Operation
from bilevel.problems.classification.problem import Changes, Classification, WeightDecay
from bilevel.problems.datasets import labelled_images
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.by_name import by_name
from bilevel.problems.networks.dropout import Kind
from bilevel.problems.networks.mlp_cnn import Norm


def images(
    data: Images | ImageFiles,
    network: str = "simple_cnn",
    norm: Norm | None = None,
    width: float | None = None,
    network_options: Mapping[str, Any] | None = None,
    augment: Sequence[Operation] = (),
    flip: bool = False,
    channels_last: bool = False,
    train_size: int | None = None,
    valid_size: int | None = None,
    batch_size: int | None = 128,
    weight_decay: WeightDecay = False,
    dropout: Kind = "bernoulli",
    temperature: float | None = None,
    space: Changes | None = None,
) -> Classification:
    """Images, and a network for them; tuned: a dropout rate for each of its sites, and the strengths of the operations.

    Args:
        data: in memory or in files.
        network: `mlp`, `simple_cnn`, `alexnet`, `vgg16`, `resnet18`, or one of torchvision's, as in
            `bilevel.problems.networks.by_name.by_name`.
        norm: `none`, `batch` or `group`; None for the network's usual one.
        width: a factor on its channels and units; None for the network as it is.
        network_options: its other options.
        augment: any of `affine`, `colour` and `cutout`, as in `bilevel.problems.classification.augmentation`.
        flip: whether half of the training images are mirrored left to right.
        channels_last: as in `Classification`.
        train_size: how many training images are used, the first ones; None for all.
        valid_size: the same of validation images.
        batch_size: of training and of validation.
        weight_decay: as in `Classification`.
        dropout: as there.
        temperature: as there.
        space: changes to the space, as in `Space.override`.

    Example:
        >>> problem = images(labelled_images.digits(), "simple_cnn", width=0.25, augment=["cutout"], train_size=100)
        >>> list(problem.space)
        ['input_dropout', 'dropout1', 'dropout2', 'dropout3', 'cutout_holes', 'cutout_length']

    Raises:
        BilevelError: as `by_name` and `Classification`; more images than there are, or what is no data.

    Source: Bae & Grosse, NeurIPS 2020, the FashionMNIST and CIFAR-10 experiments of the official code.
    """
    if not isinstance(data, (Images, ImageFiles)):
        raise BilevelError(
            f"data={data!r} is no data; give bilevel.problems.datasets.labelled_images.Images, as data._target_=bilevel.problems.datasets.labelled_images.cifar10"
        )
    data = labelled_images.few(data, train_size, valid_size)
    options = dict(network_options or {}) | ({} if width is None else {"width": width})
    made = by_name(network, data.shape, data.class_count, norm, **options)
    return Classification(
        made.make,
        data,
        sites=made.sites,
        weight_decay=weight_decay,
        dropout=dropout,
        temperature=temperature,
        augment=augment,
        flip=flip,
        channels_last=channels_last,
        batch_size=batch_size,
        space=space,
    )
