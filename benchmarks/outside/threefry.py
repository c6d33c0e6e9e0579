"""JAX's random numbers without JAX: the counter-based generator Threefry-2x32.

Bits equal those of JAX 0.5 and later (its "partitionable" layout); normal numbers equal them up to
rounding in float32. Source: Salmon, Moraes, Dror & Shaw, SC 2011.
"""

from math import prod

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: Words, high: Words, low: Words) -> tuple[Words, Words]:
    """Encrypt the counters (high, low) with a key of two words, in 20 rounds."""
    words = [key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    with np.errstate(over="ignore"):  # the sums are modulo 2³²
        x, y = high + words[0], low + words[1]
        for block in range(5):
            for turn in ROTATIONS[block % 2]:
                x = x + y
                y = x ^ (y << np.uint32(turn) | y >> np.uint32(32 - turn))
            x = x + words[(block + 1) % 3]
            y = y + words[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def seeded(seed: int) -> Words:
    """Return the key of a seed.

    Example:
        >>> seeded(2442).tolist()
        [0, 2442]
    """
    return np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32)


def split(key: Words, count: int) -> Words:
    """Return `count` new keys, [count, 2]."""
    return np.stack(_words(key, count), axis=-1)


def normal(key: Words, *shape: int) -> torch.Tensor:
    """Return N(0, 1) in float32: √2 erf⁻¹(u), with u uniform in (−1, 1) of 23 random bits."""
    high, low = _words(key, prod(shape))
    mantissa = (high ^ low) >> np.uint32(9) | np.float32(1).view(np.uint32)
    unit = mantissa.view(np.float32) - np.float32(1)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.maximum(least, unit * (np.float32(1) - least) + least)
    return (2**0.5 * torch.special.erfinv(torch.from_numpy(uniform))).view(shape)


def _words(key: Words, count: int) -> tuple[Words, Words]:
    """Return two words for each of the counters 0 … count − 1."""
    counters = np.arange(count, dtype=np.uint64)
    high, low = (counters >> np.uint64(32)), (counters & np.uint64(0xFFFFFFFF))
    return threefry(key, high.astype(np.uint32), low.astype(np.uint32))
