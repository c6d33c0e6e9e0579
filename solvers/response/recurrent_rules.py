"""Response rules of recurrent layers, gates written out: the fused ones have neither rules nor a forward-mode derivative.

What does not wait for the previous step is done for all steps at once: the products with the inputs, and in a linearization
those with W₁ too, because its primal states are known before the tangents begin.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from bilevel import BilevelError
from bilevel.solvers.response.per_example_weight import ResponseWeight, primal, rule, tangent
from bilevel.solvers.response.rules import base_of

States = tuple[Tensor, ...]
"""What one direction of one layer passes on from step to step, [B, n] each: h, and the cell of an LSTM."""


class Cell(Protocol):
    """One kind of recurrent layer."""

    def step(
        self, from_input: Tensor, from_hidden: Tensor, states: States
    ) -> tuple[States, States]:
        """The next states; and what `factors` needs of this step."""

    def factors(self, seen: States) -> States:
        """∂(next states)/∂(gates, states) from what the steps have seen, for all of them at once, [B, T, …]."""

    def fixed(self, factors: States, from_input: Tensor, from_hidden: Tensor) -> Tensor:
        """What gates' tangents that are known beforehand, [B, T, gates·n], give to the tangents of the states."""

    def tangents(self, fixed: Tensor, factors: States, from_hidden: Tensor, dots: States) -> States:
        """The tangents of the next states, one step."""


class LSTM:
    """I, f, g, o = split(a) with a = W_ih x + b_ih + W_hh h + b_hh;  c ← σ(f) c + σ(i) tanh(g);  h ← σ(o) tanh(c)."""

    def step(
        self, from_input: Tensor, from_hidden: Tensor, states: States
    ) -> tuple[States, States]:
        i, f, g, o = (from_input + from_hidden).chunk(4, dim=-1)
        i, f, g, o, before = (
            torch.sigmoid(i),
            torch.sigmoid(f),
            torch.tanh(g),
            torch.sigmoid(o),
            states[1],
        )
        c = torch.addcmul(f * before, i, g)
        bounded = torch.tanh(c)
        return (o * bounded, c), (i, f, g, o, before, bounded)

    def factors(self, seen: States) -> States:
        i, f, g, o, before, bounded = seen
        gates = torch.cat(
            [g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), bounded * o * (1 - o)], dim=-1
        )
        return gates, f, o * (1 - bounded * bounded)

    def fixed(self, factors: States, from_input: Tensor, from_hidden: Tensor) -> Tensor:
        return factors[0] * (from_input + from_hidden)

    def tangents(self, fixed: Tensor, factors: States, from_hidden: Tensor, dots: States) -> States:
        gates, f, slope = factors
        into_c, into_h = torch.addcmul(fixed, gates, from_hidden).split(
            [3 * f.shape[-1], f.shape[-1]], dim=-1
        )
        c = torch.addcmul(into_c.unflatten(-1, (3, -1)).sum(-2), f, dots[1])
        return torch.addcmul(into_h, slope, c), c


class GRU:
    """R, z = σ of their gates;  n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn));  h ← (1 − z) n + z h."""

    def step(
        self, from_input: Tensor, from_hidden: Tensor, states: States
    ) -> tuple[States, States]:
        (h,), (r_x, z_x, n_x), (r_h, z_h, n_h) = (
            states,
            from_input.chunk(3, dim=-1),
            from_hidden.chunk(3, dim=-1),
        )
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(torch.addcmul(n_x, r, n_h))
        return (torch.addcmul(n, z, h - n),), (r, z, n, h, n_h)

    def factors(self, seen: States) -> States:
        r, z, n, h, n_h = seen
        new, update = (1 - z) * (1 - n * n), (h - n) * z * (1 - z)
        reset = new * n_h * r * (1 - r)
        return (
            torch.cat([reset, update, new], dim=-1),
            torch.cat([reset, update, new * r], dim=-1),
            z,
        )

    def fixed(self, factors: States, from_input: Tensor, from_hidden: Tensor) -> Tensor:
        each = torch.addcmul(factors[0] * from_input, factors[1], from_hidden)
        return each.unflatten(-1, (3, -1)).sum(-2)

    def tangents(self, fixed: Tensor, factors: States, from_hidden: Tensor, dots: States) -> States:
        moved = (factors[1] * from_hidden).unflatten(-1, (3, -1)).sum(-2)
        return (torch.addcmul(fixed + moved, factors[2], dots[0]),)


@rule(torch._VF.lstm)
def lstm(x: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """A (multi-layer, bidirectional) LSTM."""
    return recurrent(LSTM(), x, state, weights, *options)


@rule(torch._VF.gru)
def gru(x: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """A (multi-layer, bidirectional) GRU."""
    return recurrent(
        GRU(), x, state if isinstance(weights, Tensor) else (state,), weights, *options
    )


def recurrent(cell: Cell, x: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """What PyTorch's function of this cell answers: the outputs, and the last states of all layers.

    Args:
        cell: which one.
        x: inputs, [B, T, n] or time first.
        state: the initial states, [layers · directions, B, n] each.
        weights: of all layers, as PyTorch lays them out; plain, duals or responding.
        options: bias, layers, dropout, train, bidirectional, batch_first.
    """
    name = type(cell).__name__
    if not isinstance(state, (list, tuple)) or isinstance(weights, Tensor):
        raise BilevelError(
            "a packed sequence has no fixed example axis; pad it, or perturb per batch (per_example=False) with linearize=false"
        )
    biases, layers, dropout, train, bidirectional, batch_first = options
    if not batch_first:
        if any(isinstance(w, ResponseWeight) for w in weights):
            raise BilevelError(
                f"an {name} perturbed per example needs batch_first=True: the example axis comes first"
            )
        out, *last = recurrent(
            cell,
            x.transpose(0, 1),
            state,
            weights,
            biases,
            layers,
            dropout,
            train,
            bidirectional,
            True,
        )
        return out.transpose(0, 1), *last
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    if each != (4 if biases else 2):
        raise BilevelError(
            f"an {name} with projections (proj_size) has no response rule; leave proj_size=0"
        )
    ends: list[States] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *bias = weights[k * each : (k + 1) * each]
            b_ih, b_hh = bias or (None, None)
            start = tuple(s[k] for s in state)
            out, end = along_time(
                cell, F.linear(x, w_ih, b_ih), start, w_hh, b_hh, reverse=direction == 1
            )
            outputs.append(out)
            ends.append(end)
        x = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x, *(torch.stack(part) for part in zip(*ends, strict=True))


def along_time(
    cell: Cell,
    from_input: Tensor,
    start: States,
    weight: Tensor,
    bias: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, States]:
    """One direction of one layer: h at every step, [B, T, n], and the states after the last."""
    order = -1 if reverse else 1
    dual = (
        any(tangent(t) is not None for t in (from_input, *start))
        or has_tangent(weight)
        or has_tangent(bias)
    )
    constant = not any(
        primal(base_of(t)).requires_grad
        for t in (from_input, *start, weight, bias)
        if t is not None
    )
    if dual and constant:
        return linearized(cell, from_input, start, weight, bias, order)
    hidden_gates = hidden_product(weight, bias)
    states, outputs = start, []
    for gates in from_input.unbind(1)[::order]:
        states, _ = cell.step(gates, hidden_gates(states[0]), states)
        outputs.append(states[0])
    return torch.stack(outputs[::order], dim=1), states


def linearized(
    cell: Cell, from_input: Tensor, start: States, weight: Tensor, bias: Tensor | None, order: int
) -> tuple[Tensor, States]:
    """`along_time` for duals of constant primal: first the states, without a graph; then their tangents, linear in time."""
    with torch.no_grad():
        base, shift = primal(base_of(weight)), None if bias is None else primal(base_of(bias))
        states = tuple(primal(s) for s in start)
        visited, seen = [states], []
        for gates in primal(from_input).unbind(1)[::order]:
            states, parts = cell.step(gates, F.linear(states[0], base, shift), states)
            visited.append(states)
            seen.append(parts)
        factors = cell.factors(tuple(torch.stack(part, dim=1) for part in zip(*seen, strict=True)))
        before = torch.stack([states[0] for states in visited[:-1]], dim=1)
    known = weight_tangent(before, weight, bias)
    moved = tangent(from_input)
    zeros = torch.zeros_like(before[:, :1, :1]).expand(
        before.shape[0], before.shape[1], base.shape[0]
    )
    moved = zeros if moved is None else moved if order == 1 else moved.flip(1)
    fixed = cell.fixed(factors, moved, zeros if known is None else known)
    dots = tuple(torch.zeros_like(primal(s)) if (dot := tangent(s)) is None else dot for s in start)
    outputs = []
    for at, *factor in zip(fixed.unbind(1), *(f.unbind(1) for f in factors), strict=True):
        dots = cell.tangents(at, tuple(factor), F.linear(dots[0], base), dots)
        outputs.append(dots[0])
    values = torch.stack([states[0] for states in visited[1:]][::order], dim=1)
    ends = tuple(
        forward_ad.make_dual(value, dot) for value, dot in zip(visited[-1], dots, strict=True)
    )
    return forward_ad.make_dual(values, torch.stack(outputs[::order], dim=1)), ends


def has_tangent(weight: Tensor | None) -> bool:
    """Whether a weight is a linearization: a dual, or a responding one that is read as such."""
    return (
        weight.tangent
        if isinstance(weight, ResponseWeight)
        else weight is not None and tangent(weight) is not None
    )


def weight_tangent(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """X Ẇᵀ + ḃ, the part of a linear map's tangent that comes of its weights; None where they do not move."""
    parts = []
    if isinstance(weight, ResponseWeight):
        parts.append(weight.broadcast_scale(x.ndim, -1) * F.linear(x, weight.response))
    elif (dot := tangent(weight)) is not None:
        parts.append(F.linear(x, dot))
    if isinstance(bias, ResponseWeight):
        parts.append(bias.broadcast_scale(x.ndim, -1) * bias.response)
    elif bias is not None and (dot := tangent(bias)) is not None:
        parts.append(dot)
    return sum(parts[1:], start=parts[0]) if parts else None


def hidden_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """H ↦ W h + b for every step: of a responding weight, W₀h and W₁h come of one multiplication."""
    if (
        not isinstance(weight, ResponseWeight)
        or weight.tangent
        or not (bias is None or isinstance(bias, ResponseWeight))
    ):
        return lambda h: F.linear(h, weight, bias)
    both, scale = torch.cat([weight.base, weight.response]), weight.scale
    shift = torch.zeros_like(scale) if bias is None else bias.dense()

    def apply(h: Tensor) -> Tensor:
        weight.check_examples(h)
        fixed, moved = F.linear(h, both).chunk(2, dim=-1)
        return torch.addcmul(fixed + shift, scale, moved)

    return apply
