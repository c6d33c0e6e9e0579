"""Images as JPEG files in one NumPy archive, at a tenth of their size in memory."""

import io
import struct
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import Labelled, UnreadableImage
from bilevel.problems.datasets.pillow_images import from_pillow
from bilevel.text import first_line


def read_archive(path: str) -> tuple[Labelled, Labelled]:
    """Decode the training images and the test images of an archive into memory.

    The archive holds these arrays for `train`, and the same ones for `test`:

    - `train_bytes`, uint8: all JPEG files, one after the other,
    - `train_offsets`, [n + 1]: file i is bytes[offsets[i] : offsets[i + 1]],
    - `train_labels`, [n]: the class of each image, from 0.

    Args:
        path: a file that `numpy.savez` wrote.

    Raises:
        BilevelError: the file is missing or damaged, an array is missing, or the arrays do not fit
            each other.
        UnreadableImage: an image is damaged, or has another shape than the first one.
    """
    import zipfile
    import zlib

    import numpy as np

    # An .npy file has no `with` statement: AttributeError or TypeError.
    damage = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return _part(archive, path, "train"), _part(archive, path, "test")
    except OSError as error:
        raise BilevelError(
            f"archive={path} cannot be read: {error.strerror or error}; give the path of an archive"
        ) from None
    except damage as error:
        raise BilevelError(
            f"archive={path} is cut off or not an .npz archive ({first_line(error)}); copy it again"
        ) from None


def _part(archive: Any, path: str, part: Literal["train", "test"]) -> Labelled:
    names = [f"{part}_{field}" for field in ("bytes", "offsets", "labels")]
    if missing := [name for name in names if name not in archive]:
        raise BilevelError(
            f"{path} lacks the array {missing[0]}; write {', '.join(names)} as "
            "bilevel.problems.datasets.jpeg_archive.read_archive describes"
        )
    content, offsets, labels = (archive[name] for name in names)
    rising = (
        len(offsets) == len(labels) + 1 and offsets[0] >= 0 and (offsets[1:] > offsets[:-1]).all()
    )
    if not rising or offsets[-1] > len(content):
        raise BilevelError(
            f"{path}: {part}_offsets do not divide {len(content):,} bytes into {len(labels):,} "
            "files; give n + 1 rising numbers"
        )
    data, cuts = content.tobytes(), offsets.tolist()
    images: list[Tensor] = []
    for index, (begin, end) in enumerate(pairwise(cuts)):
        where = f"{path}, {part} image {index}"
        image = decode_jpeg(data[begin:end], where)
        if images and image.shape != images[0].shape:
            raise UnreadableImage(
                f"{where} has shape {list(image.shape)}, and the first image has shape "
                f"{list(images[0].shape)}; bring all images to one shape"
            )
        images.append(image)
    return torch.stack(images), torch.from_numpy(labels).long()


def decode_jpeg(content: bytes, where: str) -> UInt8[Tensor, "channels height width"]:
    """Return the pixels of one JPEG file.

    Raises:
        UnreadableImage: the file is damaged or not a JPEG file.
    """
    # torchvision's decoder is faster, but it will be removed.
    from PIL.JpegImagePlugin import JpegImageFile

    try:
        with JpegImageFile(io.BytesIO(content)) as image:
            return from_pillow(image)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise UnreadableImage(
            f"{where} is damaged or not a JPEG file ({first_line(error)}); copy the archive again"
        ) from None
