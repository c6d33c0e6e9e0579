"""Attention in evaluation mode: PyTorch's fused paths for inference, and masks of all kinds."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from bilevel import BilevelError
from bilevel.solvers import SelfTuning, Unrolled, implicit_cg, unrolled_forward
from bilevel.solvers.response.per_example_weight import ResponseWeight
from tests.support.solver_cases import Dropped, ready

B, T = 3, 5
HIDDEN = torch.arange(T) >= torch.tensor([T, 4, 2])[:, None]
FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")


def per_example_and_oracle(module, call):
    """Return the output at per-example weights, and that of the dense weights of each example."""
    draws = torch.Generator().manual_seed(0)

    def like(p, *shape):
        return torch.randn(*shape or p.shape, generator=draws, dtype=torch.float64)

    base = {name: like(p) for name, p in module.named_parameters()}
    response = {name: like(p) for name, p in base.items()}
    scale = {name: like(p, B, len(p)) for name, p in base.items()}
    ours = call({n: ResponseWeight.of(base[n], response[n], scale[n], label=n) for n in base})
    oracle = [
        call(
            {n: w + torch.einsum("n,n...->n...", scale[n][b], response[n]) for n, w in base.items()}
        )
        for b in range(B)
    ]
    return ours, torch.stack([y[b] for b, y in enumerate(oracle)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_evaluation_of_an_encoder_is_exact(monkeypatch, masked, gradients):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.1, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(B, T, 4, dtype=torch.float64)
    mask = HIDDEN if masked else None

    def call(params):
        if any(isinstance(p, ResponseWeight) for p in params.values()):
            with monkeypatch.context() as patched:
                forbid(patched)
                return functional_call(module, params, (x,), {"src_key_padding_mask": mask})
        return functional_call(module, params, (x,), {"src_key_padding_mask": mask})

    with torch.set_grad_enabled(gradients):
        ours, oracle = per_example_and_oracle(module, call)
    if masked:  # the fused path writes zeros where nothing is looked at
        ours, oracle = (y.masked_fill(HIDDEN[..., None], 0.0) for y in (ours, oracle))
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def forbid(patched):
    def fused(*_):
        raise AssertionError("a fused path of PyTorch for inference")

    for name in FUSED:
        patched.setattr(torch, name, fused)


def test_a_plain_evaluation_takes_a_fused_path(monkeypatch):
    forbid(monkeypatch)
    with torch.no_grad(), pytest.raises(AssertionError, match="a fused path"):
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval()(torch.zeros(B, T, 4))


@pytest.mark.parametrize(
    "make",
    [SelfTuning, lambda: SelfTuning(per_example=False), implicit_cg, Unrolled, unrolled_forward],
    ids=["per example", "per batch", "implicit", "unrolled", "unrolled forward"],
)
def test_no_step_takes_a_fused_path_for_inference(monkeypatch, make):
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.1, batch_first=True)
    problem = Dropped(nn.Sequential(layer, nn.Linear(4, 3)), (6, T, 4))
    if not isinstance(make(), SelfTuning):
        problem.space = problem.space.override({"rate": {"frozen": True}})
    solver = ready(problem, make())
    forbid(monkeypatch)
    assert all(torch.isfinite(value) for value in solver.step().values())


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_all_kinds_are_those_of_pytorch(boolean, per_head, need_weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(B, T, 4, dtype=torch.float64)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    if not boolean:
        mask = torch.randn(T, T, dtype=torch.float64).masked_fill(mask, float("-inf"))
    if per_head:
        mask = mask.expand(2 * B, T, T)
    padding = HIDDEN if boolean else torch.zeros(B, T, dtype=torch.float64)

    def call(params):
        options = {"need_weights": need_weights, "key_padding_mask": padding, "attn_mask": mask}
        found = functional_call(module, params, (x, x, x), options)
        return torch.cat(found, dim=-1) if need_weights else found[0]

    ours, oracle = per_example_and_oracle(module, call)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_attention_without_an_example_axis_is_refused():
    module = nn.MultiheadAttention(4, 2).double()
    x = torch.randn(T, 4, dtype=torch.float64)
    with pytest.raises(BilevelError, match=r"shape \(5, 4\).*batch_first=True"):
        per_example_and_oracle(module, lambda params: functional_call(module, params, (x, x, x))[0])
