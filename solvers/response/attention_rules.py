"""Response rules of attention: `nn.MultiheadAttention`, and a per-example bias of the scores.

PyTorch's `multi_head_attention_forward` has the examples in its second axis, also where the layer
has `batch_first=True`. Its projections are linear maps by the rules; the attention between them has
no weights.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import BilevelError
from bilevel.solvers.response.dense_weight import both, is_per_example, written_out
from bilevel.solvers.response.per_example_weight import missing, rule
from bilevel.solvers.response.row_counts import PER_BATCH


@rule(F.multi_head_attention_forward)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs [T, B, n], and the weights of attention [B, T, S] if they are needed.

    Raises:
        BilevelError: the inputs have no example axis, or keys or values are static.
    """
    if query.ndim != 3 or static_k is not None or static_v is not None:
        raise BilevelError(
            f"attention over an input of shape {tuple(query.shape)}, or with static keys, has no "
            f"response rule; give [B, T, n] with batch_first=True, or {PER_BATCH}"
        )
    if is_causal and attn_mask is None:
        raise BilevelError("is_causal=True needs attn_mask; give the causal mask as well")
    weights: list[Any] = [q_proj_weight, k_proj_weight, v_proj_weight]
    if not use_separate_proj_weight:
        weights = _thirds(in_proj_weight)
    biases = _thirds(in_proj_bias)
    inputs = [x.transpose(0, 1) for x in (query, key, value)]
    parts = [F.linear(*part) for part in zip(inputs, weights, biases, strict=True)]
    for i, extra in enumerate((bias_k, bias_v), start=1):
        if extra is not None:  # [1, 1, n], one more key and one more value for every example
            last = extra.expand(len(parts[i]), 1, -1)
            parts[i] = torch.cat([parts[i], last], dim=1)
        if add_zero_attn:
            parts[i] = F.pad(parts[i], (0, 0, 0, 1))
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts)
    mask = _mask(q, k, attn_mask, key_padding_mask)
    dropout = dropout_p if training else 0.0
    attention = None
    if need_weights:
        scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
        attention = (scores if mask is None else scores + mask).softmax(-1)
        attention = F.dropout(attention, dropout) if dropout else attention
        mixed = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = F.linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    # laid out as by PyTorch, so that a later dropout draws the same mask
    return out.transpose(0, 1).contiguous(), attention


def _thirds(weight: Tensor | None) -> list[Any]:
    """Return the parts of a stacked weight for queries, keys and values."""
    if weight is None:
        return [None] * 3
    n = weight.shape[0] // 3
    return [weight[i * n : (i + 1) * n] for i in range(3)]


def _mask(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor | None:
    """Return what is added to the scores [B, heads, T, S]; None for nothing."""
    total = None
    if attn_mask is not None:  # [T, S] or [B·heads, T, S]
        total = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, q.shape[1]))
        total = _padded(_added(total, q), k.shape[2])
    if key_padding_mask is not None:
        padding = _padded(_added(key_padding_mask[:, None, None], q), k.shape[2])
        total = padding if total is None else total + padding
    return total


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """Return a mask, in which True excludes a key, as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))


def _padded(mask: Tensor, keys: int) -> Tensor:
    """Return a mask that admits the keys which the layer has added."""
    return F.pad(mask, (0, keys - mask.shape[-1])) if keys > mask.shape[-1] else mask


@both(F.scaled_dot_product_attention)
def attention_with_bias(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *options: Any, **named: Any
) -> Tensor:
    """Return the attention with a per-example bias of its scores (positions in a window)."""
    if direct := [x for x in (query, key, value) if is_per_example(x)]:
        raise missing(F.scaled_dot_product_attention, direct, {})
    mask = written_out(attn_mask).beside(query).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, *options, **named)
