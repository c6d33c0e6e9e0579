"""Response rules of LSTM and GRU layers.

Everything that does not depend on the previous step is computed for all steps at once: the
products with the inputs, and in a linearization also the products with W₁, because its primal
states are known before the first tangent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from bilevel import BilevelError
from bilevel.solvers.response.per_example_weight import ResponseWeight, primal, rule, tangent
from bilevel.solvers.response.recurrent_cells import GRU, LSTM, Cell, States
from bilevel.solvers.response.row_counts import PER_BATCH
from bilevel.solvers.response.rules import base_of


@rule(torch._VF.lstm)
def lstm(x: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """Return the outputs and the last states of a (multi-layer, bidirectional) LSTM."""
    return recurrent(LSTM(), x, state, weights, *options)


@rule(torch._VF.gru)
def gru(x: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """Return the outputs and the last states of a (multi-layer, bidirectional) GRU."""
    states = state if isinstance(weights, Tensor) else (state,)
    return recurrent(GRU(), x, states, weights, *options)


def recurrent(cell: Cell, x: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """Return the outputs and the last states of all layers, as PyTorch's function does.

    Args:
        cell: the kind of layer.
        x: the inputs, [B, T, n], or [T, B, n] without `batch_first`.
        state: the initial states, [layers · directions, B, n] each.
        weights: the weights of all layers in PyTorch's order; plain, dual or per-example.
        options: bias, layers, dropout, train, bidirectional, batch_first.

    Raises:
        BilevelError: a packed sequence, `proj_size`, or per-example weights with time first.
    """
    name = type(cell).__name__
    if not isinstance(state, (list, tuple)) or isinstance(weights, Tensor):
        raise BilevelError(
            f"{name}: a packed sequence has no fixed example axis; pad it, or {PER_BATCH} "
            "together with solver.linearize=false"
        )
    biases, layers, dropout, train, bidirectional, batch_first = options
    if not batch_first:
        if any(isinstance(w, ResponseWeight) for w in weights):
            raise BilevelError(
                f"{name}: batch_first=False puts time before the examples, so its weights cannot "
                "be perturbed per example; set batch_first=True"
            )
        options = (biases, layers, dropout, train, bidirectional, True)
        out, *last = recurrent(cell, x.transpose(0, 1), state, weights, *options)
        return out.transpose(0, 1), *last
    for weight in weights:
        if isinstance(weight, ResponseWeight) and len(x) != weight.examples:
            raise BilevelError(
                f"{name}: `{weight.label}` is perturbed for {weight.examples} examples, but its "
                f"input has the shape {tuple(x.shape)}; give one sequence for each example, or "
                f"{PER_BATCH}"
            )
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    if each != (4 if biases else 2):
        raise BilevelError(f"{name}: proj_size has no response rule; set proj_size=0")
    ends: list[States] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *bias = weights[k * each : (k + 1) * each]
            b_ih, b_hh = bias or (None, None)
            start = tuple(s[k] for s in state)
            from_input = F.linear(x, w_ih, b_ih)
            out, end = along_time(cell, from_input, start, w_hh, b_hh, reverse=direction == 1)
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
    """Run one direction of one layer.

    Args:
        cell: the kind of layer.
        from_input: W_ih x + b_ih of every step, [B, T, gates·n].
        start: the initial states.
        weight: W_hh.
        bias: b_hh.
        reverse: go from the last step to the first.

    Returns:
        h after every step, [B, T, n], and the states after the last step.
    """
    order = -1 if reverse else 1
    inputs = (from_input, *start)
    dual = any(tangent(t) is not None for t in inputs) or has_tangent(weight) or has_tangent(bias)
    tensors = [t for t in (*inputs, weight, bias) if t is not None]
    constant = not any(primal(base_of(t)).requires_grad for t in tensors)
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
    """Run `along_time` on duals with a constant primal.

    The first pass computes the states without a graph. The second pass computes their tangents,
    which are linear.
    """
    with torch.no_grad():
        base, shift = primal(base_of(weight)), None if bias is None else primal(base_of(bias))
        states = tuple(primal(s) for s in start)
        visited, intermediates = [states], []
        for gates in primal(from_input).unbind(1)[::order]:
            states, parts = cell.step(gates, F.linear(states[0], base, shift), states)
            visited.append(states)
            intermediates.append(parts)
        stacked = tuple(torch.stack(part, dim=1) for part in zip(*intermediates, strict=True))
        factors = cell.factors(stacked)
        before = torch.stack([states[0] for states in visited[:-1]], dim=1)
    by_weights = weight_tangent(before, weight, bias)
    by_input = tangent(from_input)
    zeros = torch.zeros_like(before[:, :1, :1]).expand(
        before.shape[0], before.shape[1], base.shape[0]
    )
    by_input = zeros if by_input is None else by_input if order == 1 else by_input.flip(1)
    known = cell.known_tangents(factors, by_input, zeros if by_weights is None else by_weights)
    dots = tuple(torch.zeros_like(primal(s)) if (dot := tangent(s)) is None else dot for s in start)
    outputs = []
    for at, *factor in zip(known.unbind(1), *(f.unbind(1) for f in factors), strict=True):
        dots = cell.next_tangents(at, tuple(factor), F.linear(dots[0], base), dots)
        outputs.append(dots[0])
    values = torch.stack([states[0] for states in visited[1:]][::order], dim=1)
    ends = tuple(
        forward_ad.make_dual(value, dot) for value, dot in zip(visited[-1], dots, strict=True)
    )
    return forward_ad.make_dual(values, torch.stack(outputs[::order], dim=1)), ends


def has_tangent(weight: Tensor | None) -> bool:
    """Return whether a weight is linearized: a dual, or a per-example weight with `tangent`."""
    if isinstance(weight, ResponseWeight):
        return weight.tangent
    return weight is not None and tangent(weight) is not None


def weight_tangent(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return x Ẇᵀ + ḃ, or None if W and b have no tangent."""
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
    """Return h ↦ W h + b; for a per-example W, one multiplication gives W₀h and W₁h."""
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
        by_base, by_response = F.linear(h, both).chunk(2, dim=-1)
        return torch.addcmul(by_base + shift, scale, by_response)

    return apply
