"""Recurrent networks for language: words in, scores of the next word out, with named places where a problem may put dropout."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilevel import BilevelError, Carry, Params
from bilevel.text import near

Site: TypeAlias = Literal["input", "hidden", "output"]
Drop: TypeAlias = Callable[[Site, Tensor], Tensor]
"""What happens to the activations [B, T, n] at a dropout site."""

CELLS = {"lstm": (nn.LSTM, ("hidden", "cell")), "gru": (nn.GRU, ("hidden",))}


class Outputs(NamedTuple):
    """What a network says of a window.

    Attributes:
        logits: scores of the next word.
        raw: outputs of the last layer.
        dropped: the same after dropout.
        state: after the last token.
    """

    logits: Float[Tensor, "batch time words"]
    raw: Float[Tensor, "batch time units"]
    dropped: Float[Tensor, "batch time units"]
    state: Carry


def keep(site: Site, x: Tensor) -> Tensor:
    """No dropout at any site."""
    return x


class RecurrentNetwork(nn.Module):
    """Embedding, layers of LSTM or GRU, and a decoder that may be tied to the embedding.

    The last layer has as many units as a tied decoder needs. Dropout sites are the embedded words (`input`), what goes between
    layers (`hidden`) and what the last one says (`output`); the factors of whole words come beside them.

    Args:
        words: size of the vocabulary.
        embedding: numbers per word.
        hidden: units per layer.
        layers: how many.
        cell: `lstm` or `gru`.
        tied: whether the decoder is the embedding's table.

    Source: Merity, Keskar & Socher, ICLR 2018, whose names for the sites these are.

    Example:
        >>> network = RecurrentNetwork(words=7, embedding=4, hidden=5, layers=2)
        >>> out = network(torch.zeros(3, 6, dtype=torch.long), network.fresh(3, torch.ones(())))
        >>> out.logits.shape, sorted(out.state), out.state["cell.0"].shape
        (torch.Size([3, 6, 7]), ['cell.0', 'cell.1', 'hidden.0', 'hidden.1'], torch.Size([3, 5]))

    Raises:
        BilevelError: an unknown cell, or a size below 1.
    """

    def __init__(
        self,
        words: int,
        *,
        embedding: int,
        hidden: int,
        layers: int = 1,
        cell: str = "lstm",
        tied: bool = True,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise BilevelError(
                f"cell={cell!r}{near(str(cell), CELLS)} is none of {', '.join(CELLS)}; choose one of these"
            )
        for name, value in (("embedding", embedding), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise BilevelError(f"{name}={value} is below 1; choose {name} ≥ 1")
        make, self.states = CELLS[cell]
        self.units = [hidden] * (layers - 1) + [embedding if tied else hidden]
        self.embedding = nn.Embedding(words, embedding)
        self.layers = nn.ModuleList(
            make(fan_in, fan_out, batch_first=True)
            for fan_in, fan_out in zip([embedding, *self.units], self.units, strict=False)
        )
        self.decoder = None if tied else nn.Parameter(torch.empty(words, hidden))
        self.bias = nn.Parameter(torch.zeros(words))

    def initial(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Weights: U(±0.1) for words and decoder, U(±1/√units) for layers, a bias of zero."""
        params = {}
        for name, p in self.named_parameters():
            bound = (
                self.units[int(name.split(".")[1])] ** -0.5
                if name.startswith("layers.")
                else 0.1 * (name != "bias")
            )
            params[name] = torch.empty(p.shape, dtype=dtype).uniform_(
                -bound, bound, generator=generator
            )
        return params

    def fresh(self, batch: int, like: Tensor) -> Carry:
        """The state before the first token: zeros."""
        return {
            f"{s}.{i}": like.new_zeros(batch, units)
            for i, units in enumerate(self.units)
            for s in self.states
        }

    def recurrent_weights(self) -> list[str]:
        """Names of the hidden-to-hidden matrices."""
        return [f"layers.{i}.weight_hh_l0" for i in range(len(self.layers))]

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: Carry,
        drop: Drop = keep,
        factors: Float[Tensor, " words"] | None = None,
    ) -> Outputs:
        x = self.embedding(tokens)
        after: Carry = {}
        if factors is not None:
            x = x * factors[tokens][..., None]
        x = drop("input", x)
        for i, layer in enumerate(self.layers):
            names = [f"{s}.{i}" for s in self.states]
            before = [state[name][None] for name in names]
            raw, last = layer(x, tuple(before) if len(before) > 1 else before[0])
            after |= {
                name: s[0]
                for name, s in zip(names, last if len(names) > 1 else [last], strict=True)
            }
            x = drop("hidden" if i < len(self.layers) - 1 else "output", raw)
        logits = F.linear(
            x, self.embedding.weight if self.decoder is None else self.decoder, self.bias
        )
        return Outputs(logits, raw, x, after)
