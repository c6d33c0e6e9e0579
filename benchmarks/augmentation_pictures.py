"""Draw every augmentation at four strengths, on an image of CIFAR-10 and on one of MNIST.

python -m benchmarks.augmentation_pictures --data PATH [--image 0]
    [--out docs/problems/augmentations_cifar.png]

PATH is a folder that holds MNIST/raw, and cifar-10-batches-py or cifar10_jpeg.npz.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.experiments.augmentation import pictures
from bilevel import BilevelError
from bilevel.problems.datasets import standard_images


def main() -> int:
    """Write the picture; return 0 on success and 1 if data are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("docs/problems/augmentations_cifar.png"))
    parser.add_argument("--image", type=int, default=0, help="index of the test image")
    options = parser.parse_args()
    archive = options.data / "cifar10_jpeg.npz"
    try:
        cifar = standard_images.load_cifar10(
            str(options.data), download=False, archive=str(archive) if archive.exists() else None
        )
        mnist = standard_images.load_mnist(str(options.data), download=False)
    except BilevelError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    assert cifar.test is not None
    pictures(options.out, cifar.test[0][options.image][None], mnist)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
