"""Recurrent networks that score the next word, with named dropout sites."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilevel import Carry, Params
from bilevel.validate import one_of, whole

Site: TypeAlias = Literal["input", "hidden", "output"]
Drop: TypeAlias = Callable[[Site, Tensor], Tensor]
"""Maps a dropout site and its activations [B, T, n] to the activations after dropout."""

CELLS = {"lstm": (nn.LSTM, ("hidden", "cell")), "gru": (nn.GRU, ("hidden",))}


class Outputs(NamedTuple):
    """The outputs of a network for one window of text.

    Attributes:
        logits: scores of the next word.
        raw: outputs of the last layer.
        dropped: outputs of the last layer after dropout.
        state: recurrent state after the last token.
    """

    logits: Float[Tensor, "batch time words"]
    raw: Float[Tensor, "batch time units"]
    dropped: Float[Tensor, "batch time units"]
    state: Carry


def keep(site: Site, x: Tensor) -> Tensor:
    """Return x: no dropout at any site."""
    return x


class RecurrentNetwork(nn.Module):
    """An embedding, LSTM or GRU layers, and a decoder that may be tied to the embedding.

    The last layer has as many units as a tied decoder needs. Dropout sites are the embedded words
    (`input`), the activations between layers (`hidden`) and the outputs of the last layer
    (`output`). Factors of whole words are a separate argument.

    Args:
        words: size of the vocabulary.
        embedding: length of the vector of a word.
        hidden: number of units per layer.
        layers: number of layers.
        cell: `lstm` or `gru`.
        tied: whether the decoder shares the table of the embedding.

    Source: Merity, Keskar & Socher, ICLR 2018, also for the names of the sites.

    Example:
        >>> network = RecurrentNetwork(words=7, embedding=4, hidden=5, layers=2)
        >>> out = network(torch.zeros(3, 6, dtype=torch.long), network.fresh(3, torch.ones(())))
        >>> out.logits.shape, sorted(out.state), out.state["cell.0"].shape
        (torch.Size([3, 6, 7]), ['cell.0', 'cell.1', 'hidden.0', 'hidden.1'], torch.Size([3, 5]))

    Raises:
        BilevelError: the cell is unknown, or a size is below 1.
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
        one_of(CELLS, cell=cell)
        whole(1, embedding=embedding, hidden=hidden, layers=layers)
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
        """Draw weights: U(±0.1) for words and decoder, U(±1/√units) for layers, bias zero."""
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
        """Return the state before the first token: zeros."""
        return {
            f"{s}.{i}": like.new_zeros(batch, units)
            for i, units in enumerate(self.units)
            for s in self.states
        }

    def recurrent_weights(self) -> list[str]:
        """Return the names of the hidden-to-hidden matrices."""
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
