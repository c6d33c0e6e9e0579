"""Recurrent cells with their gates written out, and the derivatives of their steps.

The fused kernels of PyTorch have neither response rules nor a forward-mode derivative.
"""

from typing import Protocol

import torch
from torch import Tensor

States = tuple[Tensor, ...]
"""The states of one direction of one layer between two steps, [B, n] each: h, and c of an LSTM."""


class Cell(Protocol):
    """A kind of recurrent layer."""

    def step(
        self, from_input: Tensor, from_hidden: Tensor, states: States
    ) -> tuple[States, States]:
        """Return the next states, and the intermediate values that `factors` needs.

        Args:
            from_input: W_ih x + b_ih, [B, gates·n].
            from_hidden: W_hh h + b_hh, [B, gates·n].
            states: the states before the step.
        """

    def factors(self, intermediates: States) -> States:
        """Return ∂(next states)/∂(gates, states) of all steps at once, [B, T, …].

        Args:
            intermediates: the intermediate values of all steps, stacked along axis 1.
        """

    def known_tangents(self, factors: States, from_input: Tensor, from_hidden: Tensor) -> Tensor:
        """Return the part of the states' tangents that is known before the first step.

        Args:
            factors: the factors of all steps.
            from_input: the tangents of `from_input`, [B, T, gates·n].
            from_hidden: the tangents of `from_hidden` at a fixed h, [B, T, gates·n].
        """

    def next_tangents(
        self, known: Tensor, factors: States, from_hidden: Tensor, tangents: States
    ) -> States:
        """Return the tangents of the next states.

        Args:
            known: the known part of this step.
            factors: the factors of this step.
            from_hidden: W_hh ḣ, [B, gates·n].
            tangents: the tangents of the states before the step.
        """


class LSTM:
    """The LSTM cell: i, f, g, o = split(W_ih x + b_ih + W_hh h + b_hh), then the states change.

    c ← σ(f) c + σ(i) tanh(g)
    h ← σ(o) tanh(c)
    """

    def step(
        self, from_input: Tensor, from_hidden: Tensor, states: States
    ) -> tuple[States, States]:
        i, f, g, o = (from_input + from_hidden).chunk(4, dim=-1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        before = states[1]
        c = torch.addcmul(f * before, i, g)
        tanh_c = torch.tanh(c)
        return (o * tanh_c, c), (i, f, g, o, before, tanh_c)

    def factors(self, intermediates: States) -> States:
        i, f, g, o, before, tanh_c = intermediates
        gates = torch.cat(
            [g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], dim=-1
        )
        return gates, f, o * (1 - tanh_c * tanh_c)

    def known_tangents(self, factors: States, from_input: Tensor, from_hidden: Tensor) -> Tensor:
        return factors[0] * (from_input + from_hidden)

    def next_tangents(
        self, known: Tensor, factors: States, from_hidden: Tensor, tangents: States
    ) -> States:
        gates, f, slope = factors
        into_c, into_h = torch.addcmul(known, gates, from_hidden).split(
            [3 * f.shape[-1], f.shape[-1]], dim=-1
        )
        c = torch.addcmul(into_c.unflatten(-1, (3, -1)).sum(-2), f, tangents[1])
        return torch.addcmul(into_h, slope, c), c


class GRU:
    """The GRU cell: r and z are σ of their gates, and n is the candidate for the next state.

    n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn))
    h ← (1 − z) n + z h
    """

    def step(
        self, from_input: Tensor, from_hidden: Tensor, states: States
    ) -> tuple[States, States]:
        (h,) = states
        r_x, z_x, n_x = from_input.chunk(3, dim=-1)
        r_h, z_h, n_h = from_hidden.chunk(3, dim=-1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(torch.addcmul(n_x, r, n_h))
        return (torch.addcmul(n, z, h - n),), (r, z, n, h, n_h)

    def factors(self, intermediates: States) -> States:
        r, z, n, h, n_h = intermediates
        new, update = (1 - z) * (1 - n * n), (h - n) * z * (1 - z)
        reset = new * n_h * r * (1 - r)
        by_input = torch.cat([reset, update, new], dim=-1)
        by_hidden = torch.cat([reset, update, new * r], dim=-1)
        return by_input, by_hidden, z

    def known_tangents(self, factors: States, from_input: Tensor, from_hidden: Tensor) -> Tensor:
        each = torch.addcmul(factors[0] * from_input, factors[1], from_hidden)
        return each.unflatten(-1, (3, -1)).sum(-2)

    def next_tangents(
        self, known: Tensor, factors: States, from_hidden: Tensor, tangents: States
    ) -> States:
        moved = (factors[1] * from_hidden).unflatten(-1, (3, -1)).sum(-2)
        return (torch.addcmul(known + moved, factors[2], tangents[0]),)
