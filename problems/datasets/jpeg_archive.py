"""Images kept as JPEG files in one NumPy archive: a tenth of the bytes that they take in memory."""

import io
import struct
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import Labelled, UnreadableImage, from_pillow


def read(path: str) -> tuple[Labelled, Labelled]:
    """The training and the test images of an archive, decoded into memory once.

    For each of `train` and `test` it holds the arrays

    - `train_bytes`, uint8: all JPEG files one after the other,
    - `train_offsets`, [n + 1]: file i is bytes[offsets[i] : offsets[i + 1]],
    - `train_labels`, [n]: the class of each, from 0.

    Args:
        path: a file that `numpy.savez` wrote.

    Raises:
        BilevelError: there is no such file, it is damaged, lacks an array, or its arrays do not fit each other.
        UnreadableImage: an image in it is damaged, or of another shape.
    """
    import zipfile
    import zlib

    import numpy as np

    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return _part(archive, path, "train"), _part(archive, path, "test")
    except OSError as error:
        raise BilevelError(
            f"cannot read the archive {path}: {error.strerror or error}; give the path of one"
        ) from None
    except (
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as error:  # an .npy file has no `with`
        raise BilevelError(
            f"{path} is cut off or no .npz archive ({str(error).splitlines()[0]}); copy it anew"
        ) from None


def _part(archive: Any, path: str, part: Literal["train", "test"]) -> Labelled:
    names = [f"{part}_{field}" for field in ("bytes", "offsets", "labels")]
    if missing := [name for name in names if name not in archive]:
        raise BilevelError(
            f"{path} holds no {missing[0]}, and {', '.join(names)} are read; write it as bilevel.problems.datasets.jpeg_archive says"
        )
    content, offsets, labels = (archive[name] for name in names)
    rising = (
        len(offsets) == len(labels) + 1 and offsets[0] >= 0 and (offsets[1:] > offsets[:-1]).all()
    )
    if not rising or offsets[-1] > len(content):
        raise BilevelError(
            f"{path}: {part}_offsets do not cut {len(content):,} bytes into {len(labels):,} files; give n + 1 rising numbers"
        )
    data, cuts = content.tobytes(), offsets.tolist()
    images: list[Tensor] = []
    for index, (begin, end) in enumerate(pairwise(cuts)):
        image = decoded(data[begin:end], f"{path}, {part} image {index}")
        if images and image.shape != images[0].shape:
            first = list(images[0].shape)
            raise UnreadableImage(
                f"{path}, {part} image {index} is {list(image.shape)} and the first {first}; bring all to one shape"
            )
        images.append(image)
    return torch.stack(images), torch.from_numpy(labels).long()


def decoded(content: bytes, where: str) -> UInt8[Tensor, "channels height width"]:
    """The pixels of one JPEG file.

    Raises:
        UnreadableImage: it is none, or damaged.
    """
    from PIL.JpegImagePlugin import (
        JpegImageFile,
    )  # torchvision's decoder is quicker, and is to be removed

    try:
        with JpegImageFile(io.BytesIO(content)) as image:
            return from_pillow(image)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise UnreadableImage(
            f"{where} is damaged or no JPEG ({said[0]}); copy the archive anew"
        ) from None
