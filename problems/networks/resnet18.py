"""ResNet-18 for small images, with or without a norm."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bilevel.problems.networks.building_blocks import (
    Drop,
    Norm,
    drop_channels,
    he_,
    keep,
    normalization,
    scaled,
)


class Block(nn.Module):
    """Two 3×3 convolutions with norms, and a shortcut around them.

        x ← relu(shortcut(x) + α · norm(conv(relu(norm(conv(x))))))

    The shortcut is a 1×1 convolution if the shape changes, otherwise the identity. With a norm,
    α is 1. Without a norm, α is a weight that starts at 0, so that the sum over blocks does not
    grow with their number.

    Source: He et al., CVPR 2016, figure 2; α: De & Smith, NeurIPS 2020, section 4 (SkipInit).
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"  # a norm subtracts the mean, and adds its own shift
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=bias)
        self.first_norm = normalization(norm, fan_out)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=bias)
        self.second_norm = normalization(norm, fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            projection = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(projection, normalization(norm, fan_out))
        self.alpha = nn.Parameter(torch.zeros(())) if norm == "none" else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(self.shortcut(x) + (branch if self.alpha is None else branch * self.alpha))


class ResNet18(nn.Module):
    """ResNet-18 for 32 × 32 pixels, with 11.17 million weights and 5 dropout sites.

    A 3×3 stem without pooling precedes four stages of two blocks. Dropout sites: 0 the input,
    1 to 3 the first three stages (whole channels), 4 the pooled features, which are the channels of
    the last stage.

    Args:
        shape: channels, height and width of an image, of any size.
        classes: number of logits.
        norm: layer after each convolution: `none`, `batch` or `group`. With `none`, each block
            starts as its shortcut (`Block`).
        width: factor on all numbers of channels.

    Source: He et al., CVPR 2016, table 1; the stem for small images: section 4.2.

    Example:
        >>> ResNet18(width=1 / 16)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """

    SITES = 5

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        norm: Norm = "batch",
        width: float = 1,
    ) -> None:
        super().__init__()
        channels = scaled([64, 128, 256, 512], width)
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1, bias=norm == "none")
        self.stem_norm = normalization(norm, channels[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                Block(fan_in, fan_out, 1 + (i > 0), norm), Block(fan_out, fan_out, 1, norm)
            )
            for i, (fan_in, fan_out) in enumerate(
                zip([channels[0], *channels], channels, strict=False)
            )
        )
        self.head = nn.Linear(channels[-1], classes)
        self.apply(he_)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = F.relu(self.stem_norm(self.stem(drop(0, x))))
        for site, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if site < len(self.stages):
                x = drop_channels(drop, site, x)
        return self.head(drop(len(self.stages), x.mean((2, 3))))
