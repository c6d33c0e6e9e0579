"""Count augmented images per second: a batch at once, and one by one with Pillow as in torchvision.

Both use the same parameters.

python -m benchmarks.augmentation [--seconds 5] [--threads 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from bilevel.problems.classification import image_transforms

BATCH = 128
SHAPES = {"colour, 32 × 32": (3, 32, 32), "grey, 28 × 28": (1, 28, 28)}
MOST = {
    "degrees": 20.0,
    "shift": 0.1,
    "scale": 0.2,
    "shear": 20.0,
    "colour": 0.3,
    "hue": 0.1,
    "length": 8.0,
}

Parameters = dict[str, Tensor]


def parameters(generator: torch.Generator) -> Parameters:
    """Draw one value of every parameter for each image of a batch."""

    def within(name: str, *shape: int) -> Tensor:
        return MOST[name] * (2 * torch.rand((BATCH, *shape), generator=generator) - 1)

    names = ("brightness", "contrast", "saturation")
    return {
        "degrees": within("degrees"),
        "shift": within("shift", 2),
        "scale": 1 + within("scale"),
        "shear": within("shear"),
        **{name: 1 + within("colour") for name in names},
        "hue": within("hue"),
        "centres": torch.rand((BATCH, 1, 2), generator=generator),
        "holes": torch.ones(BATCH),
        "length": torch.full((BATCH,), MOST["length"]),
    }


def batched(x: Tensor, p: Parameters) -> Tensor:
    """Augment a batch of bytes [B, C, H, W]; return it in [0, 1]."""
    x = image_transforms.affine(x / 255, p["degrees"], p["shift"], p["scale"], p["shear"])
    x = image_transforms.contrast(image_transforms.brightness(x, p["brightness"]), p["contrast"])
    if x.shape[1] == 3:
        x = image_transforms.hue(image_transforms.saturation(x, p["saturation"]), p["hue"])
    return image_transforms.cutout(x, p["holes"], p["length"], p["centres"], 0.5)


def one_by_one(x: Tensor, p: Parameters) -> Tensor:
    """Augment one image at a time through Pillow, as the worker of a data loader does."""
    height, width = x.shape[2:]
    pixels = x.permute(0, 2, 3, 1).squeeze(-1).numpy()
    numbers = {name: values.tolist() for name, values in p.items()}
    out = []
    for i in range(len(x)):
        image = Image.fromarray(pixels[i])
        (dx, dy), scale, shear = (
            numbers["shift"][i],
            numbers["scale"][i],
            [numbers["shear"][i], 0.0],
        )
        moved = [dx * width, dy * height]
        image = TF.affine(
            image, numbers["degrees"][i], moved, scale, shear, InterpolationMode.BILINEAR
        )
        image = TF.adjust_contrast(
            TF.adjust_brightness(image, numbers["brightness"][i]), numbers["contrast"][i]
        )
        if x.shape[1] == 3:
            image = TF.adjust_hue(
                TF.adjust_saturation(image, numbers["saturation"][i]), numbers["hue"][i]
            )
        tensor = TF.to_tensor(image)
        ((y, z),), side = numbers["centres"][i], int(numbers["length"][i])
        top, left = int(y * height) - side // 2, int(z * width) - side // 2
        tensor[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0.5
        out.append(tensor)
    return torch.stack(out)


def main() -> None:
    """Print a table: images per second of both, their ratio, and the difference of the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="seconds of measurement for each kind of images"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| images | a batch at once | one by one (Pillow) | ratio | mean difference | rounds |")
    print("|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        print(_row(name, shape, options.seconds), flush=True)


def _row(name: str, shape: tuple[int, ...], seconds: float) -> str:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (BATCH, *shape), generator=generator, dtype=torch.uint8)
    p = parameters(generator)
    apart = (batched(x, p) - one_by_one(x, p)).abs().mean().item()
    taken: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        # Both take turns, so that a slow moment of the machine affects both.
        taken.append((_time(lambda: batched(x, p)), _time(lambda: one_by_one(x, p))))
    ours, theirs = (BATCH / statistics.median(column) for column in zip(*taken, strict=True))
    ratio = statistics.median(b / a for a, b in taken)
    return (
        f"| {name} | {ours:,.0f}/s | {theirs:,.0f}/s | {ratio:.1f} | {apart:.4f} | {len(taken)} |"
    )


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
