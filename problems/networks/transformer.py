"""Transformers with dropout sites: a classifier of images, and a decoder of text."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilevel.problems.networks.building_blocks import Drop, check_widths, keep
from bilevel.validate import wrong


class Block(nn.Module):
    """A pre-norm block: x ← x + drop(attention(norm x)), then x ← x + drop(mlp(norm x)).

    Args:
        width: n, the length of a token.
        heads: number of heads of attention; it divides n.
        site: dropout site of the attention; that of the MLP is the next one.
        causal: whether a token attends to earlier tokens alone.
    """

    def __init__(self, width: int, heads: int, site: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.site, self.causal = heads, site, causal
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Float[Tensor, "batch time n"], drop: Drop
    ) -> Float[Tensor, "batch time n"]:
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b t (three h n) -> three b h t n", three=3, h=self.heads
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + drop(self.site, self.out(rearrange(mixed, "b h t n -> b t (h n)")))
        return x + drop(self.site + 1, self.mlp(self.mlp_norm(x)))


class Blocks(nn.Module):
    """Blocks with two dropout sites each, from `first` on, and a final norm.

    Args:
        width: n, the length of a token.
        depth: number of blocks.
        heads: number of heads.
        first: dropout site of the first block.
        causal: as in `Block`.

    Raises:
        BilevelError: a size is below 1, or `heads` does not divide `width`.
    """

    def __init__(self, width: int, depth: int, heads: int, first: int, *, causal: bool) -> None:
        super().__init__()
        check_widths(width=[width], depth=[depth], heads=[heads])
        if width % heads:
            raise wrong(
                "heads",
                heads,
                f"does not divide {width}, the length of a token",
                "choose a divisor",
            )
        self.blocks = nn.ModuleList(
            Block(width, heads, first + 2 * i, causal=causal) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Float[Tensor, "batch time n"], drop: Drop
    ) -> Float[Tensor, "batch time n"]:
        for block in self.blocks:
            x = block(x, drop)
        return self.norm(x)


class ViT(nn.Module):
    """A vision transformer for small images, with a class token and learned positions.

    Dropout site 0 is the input, and site 1 the tokens with their positions. Sites 2i and 2i + 1 are
    the attention and the MLP of block i = 1, 2, … Weights start as in PyTorch, and tokens and
    positions at N(0, 0.02²).

    Args:
        shape: channels, height and width of an image.
        classes: number of logits.
        patch: side of a patch; it divides height and width.
        tokens: length of a token.
        depth: number of blocks.
        heads: number of heads.

    Example:
        >>> vit = ViT((1, 28, 28), 10, patch=7, tokens=16, depth=2, heads=2)
        >>> vit(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])

    Source: Dosovitskiy et al., ICLR 2021.

    Raises:
        BilevelError: a size is below 1, `patch` does not divide the image, or `heads` does not
            divide `tokens`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: int = 4,
        tokens: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        check_widths(patch=[patch])
        channels, height, width = shape
        if height % patch or width % patch:
            reason = f"does not divide images of {height} × {width}"
            raise wrong("patch", patch, reason, "choose a divisor of both sides")
        self.embed = nn.Conv2d(channels, tokens, patch, stride=patch)
        count = (height // patch) * (width // patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, tokens))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + count, tokens))
        self.blocks = Blocks(tokens, depth, heads, 2, causal=False)
        self.head = nn.Linear(tokens, classes)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = rearrange(self.embed(drop(0, x)), "b n h w -> b (h w) n")
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(drop(1, x), drop)[:, 0])


class Decoder(nn.Module):
    """A causal transformer that scores the next word; the decoder is tied to the embedding.

    Dropout site 0 is the embedded words with their positions. Sites 2i − 1 and 2i are the attention
    and the MLP of block i = 1, 2, …, and the last site is the output.

    Args:
        words: size of the vocabulary.
        length: largest number of tokens in a window.
        width: length of a token.
        depth: number of blocks.
        heads: number of heads.

    Example:
        >>> decoder = Decoder(words=7, length=5, width=8, depth=2, heads=2)
        >>> decoder(torch.zeros(3, 5, dtype=torch.long)).shape, decoder.sites
        (torch.Size([3, 5, 7]), 6)

    Source: Radford et al., 2019 (GPT-2); Press & Wolf, EACL 2017 (the tied decoder).

    Raises:
        BilevelError: a size is below 1, or `heads` does not divide `width`.
    """

    def __init__(self, words: int, *, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = Blocks(width, depth, heads, 1, causal=True)
        self.sites = 2 * depth + 2
        self.embedding, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self, tokens: Int[Tensor, "batch time"], drop: Drop = keep
    ) -> Float[Tensor, "batch time words"]:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(drop(0, self.embedding(tokens) + self.positions(at)), drop)
        return F.linear(drop(self.sites - 1, x), self.embedding.weight)
