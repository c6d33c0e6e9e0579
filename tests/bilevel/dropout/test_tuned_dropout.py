"""Dropout rates of unmodified modules, found by name and tuned."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel
from bilevel import BilevelError, Interval, ModuleProblem, Positive, Space, tuned_dropout
from bilevel.checks.check_problem import ProblemWarning, check_setup
from bilevel.dropout import calls
from bilevel.dropout.sites import Rate, dropout_sites
from bilevel.solvers import centered_stn, delta_stn, implicit_cg

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


class Plain(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])

    outer_objective = inner_objective


def mlp(rate=0.1):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(rate), nn.Linear(8, 3))


def problem(module, space=None, kind=Plain, **options):
    return kind(module, space or Space(), (X, Y), (X, Y), **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Attention(nn.Module):
    """Self-attention as many libraries write it, with a functional dropout of the weights."""

    def __init__(self, rate=0.2):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.attention_dropout = rate

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = self.attention_dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x):
        return self.mlp(self.attn(x[:, None])[:, 0])


# --- the calls ---


def through(module, x, rate, training=True, kind="bernoulli", seed=0):
    tuned = tuned_dropout(module, kind=kind)
    with tuned({"dropout": torch.as_tensor(rate, dtype=x.dtype)}, generator(seed)):
        return module.train(training)(x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout(0.3), (500, 40)),
        (nn.Dropout(0.3, inplace=True), (500, 40)),
        (nn.Dropout1d(0.3), (500, 40, 2)),
        (nn.Dropout2d(0.3), (500, 40, 2, 3)),
        (nn.Dropout3d(0.3), (500, 40, 2, 3, 2)),
    ],
)
def test_layers_drop_with_the_rate_of_the_hyperparameter(layer, shape):
    out = through(layer, torch.ones(shape), 0.6).reshape(500, 40, -1)
    assert ((out == 0) | torch.isclose(out, torch.tensor(2.5))).all()
    assert (out[..., 0] == 0).float().mean().item() == pytest.approx(0.6, abs=0.02)
    assert torch.equal(out, out[..., :1].expand_as(out))  # whole channels
    assert torch.equal(through(layer, torch.ones(shape), 0.6, training=False), torch.ones(shape))


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])
def test_alpha_dropout_keeps_mean_and_variance_and_equals_pytorchs(layer):
    x = torch.randn(3000, 20, 4, generator=generator(), dtype=torch.float64)
    for rate in (0.3, 0.6):
        out, twin = through(copy.deepcopy(layer), x, rate), type(layer)(rate)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = twin(x)
        assert out.mean().item() == pytest.approx(0, abs=0.02)
        assert out.var().item() == pytest.approx(1, abs=0.02)
        # a dropped entry has one value, and a kept one is the same line of x
        dropped = theirs.flatten().mode().values
        torch.testing.assert_close(out.flatten().mode().values, dropped)
        torch.testing.assert_close((out - out.min()).unique()[:1], torch.zeros(1).double())
        kept, same = out != out.flatten().mode().values, theirs != dropped
        both = kept & same
        torch.testing.assert_close(out[both], theirs[both])


def test_each_example_has_its_own_rate_on_all_of_its_rows():
    rates = torch.tensor([0.1, 0.9])
    for shape in ((2, 3000), (2 * 3, 1000)):
        out = through(nn.Dropout(0.5), torch.ones(shape), rates).reshape(2, -1)
        assert (out == 0).float().mean(1).tolist() == pytest.approx([0.1, 0.9], abs=0.03)
    shared = through(nn.Dropout(0.5), torch.ones(1, 3000), rates)
    assert shared.shape == (2, 3000)
    with pytest.raises(BilevelError, match=r"\[3, 5\].*2 examples.*per_example=False on `dropout`"):
        through(nn.Dropout(0.5), torch.ones(3, 5), rates)


def test_one_rate_and_equal_rates_give_the_same_masks():
    for shape in ((4, 30), (4 * 3, 10), (1, 30)):
        one, each = (through(nn.Dropout(0.5), torch.ones(shape), r) for r in (0.4, [0.4] * 4))
        torch.testing.assert_close(each, one.expand_as(each))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_attention_layer_of_pytorch_drops_its_weights(weights, rate):
    layer = nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)
    x = torch.randn(3, 5, 4, generator=generator())
    twin = copy.deepcopy(layer).eval()
    tuned = tuned_dropout(layer)
    assert tuned.sites == {"dropout": "dropout"}
    with tuned({"dropout": torch.tensor(1e-7)}, generator()):
        out, _ = layer(x, x, x, need_weights=weights)
    torch.testing.assert_close(out, twin(x, x, x)[0])
    mean = torch.zeros(3, 5, 4)
    for seed in range(400):
        with torch.no_grad(), tuned({"dropout": torch.full((3,), 0.5)}, generator(seed)):
            mean += layer(x, x, x, need_weights=weights)[0] / 400
    assert not torch.equal(layer(x, x, x)[0], mean)
    torch.testing.assert_close(mean, twin(x, x, x)[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.1}, {"enable_gqa": True}])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_without_drops_equals_pytorchs(options, mask):
    if mask and options.get("is_causal"):
        return
    q, k, v = (torch.randn(2, 4, 5, 3, generator=generator(i)) for i in range(3))
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    masks = {"bool": torch.ones(5, 5).tril().bool(), "float": torch.randn(5, 5)}
    options = options | {"attn_mask": masks.get(mask)}
    tuned = tuned_dropout(Attention())
    p = Rate(0.5, "here", "dropout")
    with tuned({"dropout": torch.tensor(0.0)}, generator()):
        ours = F.scaled_dot_product_attention(q, k, v, dropout_p=p, **options)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **options))


def test_a_rate_survives_copies():
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        module = mlp()
        tuned = tuned_dropout(module)
        rate = copied(module)[2].p
        assert (rate, rate.site, rate.hyper) == (0.1, "2", "dropout")
        assert tuned.sites == {"2": "dropout"}


# --- names and groups ---


def test_patterns_make_groups_and_leave_the_rest():
    module = nn.Sequential(nn.Linear(4, 4), Block(), nn.Dropout(0.4))
    p = problem(module, dropout={"attention": "*.attn.*", "mlp": ["*.mlp.*"]})
    assert p.tuned_dropout.sites == {"1.attn.attention_dropout": "attention", "1.mlp.2": "mlp"}
    assert {n: (d.init, d.differentiable) for n, d in p.space.items()} == {
        "attention": (0.2, False),
        "mlp": (0.1, False),
    }
    assert type(module[1].attn.attention_dropout) is float  # the user's module is not touched
    params, carry = p.init(generator())
    hypers = {"attention": torch.tensor(0.0), "mlp": torch.tensor(0.0)}
    out, _ = p.predict(hypers, params, carry, (X, Y), train=True, generator=generator())
    twin = torch.func.functional_call(module.eval(), params, (X,)) / 0.6
    torch.testing.assert_close(out, torch.where(out == 0, out, twin))  # the last layer alone drops
    assert 0 < int((out == 0).sum()) < out.numel()


def test_a_declared_rate_keeps_its_range():
    space = Space(dropout=Interval(low=0.0, high=0.5, init=0.3), decay=Positive(init=1.0))
    p = problem(mlp(), space, dropout="*")
    assert list(p.space) == ["dropout", "decay"]
    rate = p.space["dropout"]
    assert (rate.init, rate.high, rate.differentiable) == (0.3, 0.5, False)
    relaxed = problem(mlp(), space, dropout="*", dropout_kind="gaussian").space["dropout"]
    assert relaxed.differentiable


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (Block, {"dropout": "*.atn.*"}, r"matches no dropout layer \(did you mean `attn`\?\); "
         r"choose among attn.attention_dropout, mlp.2"),
        (Block, {"dropout": {"a": "*.attn.*", "b": "*dropout"}},
         r"selects the dropout layer `attn.attention_dropout` twice; make the patterns disjoint"),
        (Block, {"dropout": True}, r"must be patterns of names; write '\*' for every"),
        (lambda: nn.Linear(4, 3), {"dropout": "*"}, "Linear has no dropout layer"),
        (lambda: nn.AlphaDropout(), {"dropout": "*", "dropout_kind": "gaussian"},
         "dropout_kind='gaussian' has no form for `p`, which is alpha dropout"),
        (mlp, {"dropout": "*", "dropout_kind": "gauss"}, "did you mean `gaussian`"),
        (mlp, {"dropout": "*", "space": Space(dropout=Positive(init=0.1))},
         r"space.dropout=Positive.*must be one number between 0 and 1; declare Interval"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_sentence(module, options, sentence):
    made = module() if module is not Block else Block()
    trained = nn.Sequential(made, nn.Linear(3, 3)) if isinstance(made, nn.AlphaDropout) else made
    if trained is not made:
        sentence = sentence.replace("`p`", "`0`")
    with pytest.raises(BilevelError, match=sentence):
        problem(trained, **options)


# --- what a check says ---


def warned(p):
    with pytest.warns() as record:
        check_setup(p, p.data(torch.device("cpu"), generator()), torch.device("cpu"))
    assert {w.category for w in record} == {ProblemWarning}
    return [str(w.message) for w in record]


def test_an_unused_rate_names_the_function():
    p = problem(mlp(), Space(dropout=Interval(low=0.0, high=0.9, init=0.1)))
    (found,) = warned(p)
    assert "changes neither objective; pass dropout={'dropout': '*'} to the problem" in found
    assert "the dropout layer of the module (bilevel.tuned_dropout)" in found
    assert found in str(bilevel.check_problem(p, solvers={}))
    (found,) = warned(problem(nn.Linear(4, 3), p.space))
    assert found.endswith("changes neither objective; use it, or remove it")


class Loose(nn.Module):
    """Dropout with a rate that no layer holds, and a rate that no function receives."""

    def __init__(self):
        super().__init__()
        self.inner, self.layer_drop = mlp(), 0.1

    def forward(self, x):
        return F.dropout(self.inner(x), 0.25, self.training)


def test_functional_dropout_that_no_layer_holds_is_named():
    (found,) = warned(problem(Loose(), dropout="*"))
    assert "a dropout in the module (Loose, line" in found
    assert "takes a rate of 0.25 that no layer holds" in found
    report = bilevel.check_problem(problem(Loose(), dropout={"rate": "inner.*"}), solvers={})
    assert report.ok, report
    assert "note: a dropout in the module" in str(report)
    report = str(bilevel.check_problem(problem(Loose(), dropout="*"), solvers={}))
    assert "the rate of `layer_drop` arrives at no dropout function" in report
    assert "the rate of `inner.2`" not in report


def test_dropout_inside_a_recurrent_layer_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return self.drop(self.lstm(x.reshape(-1, 2, 2))[0][:, -1])

    assert [site.name for site in dropout_sites(Recurrent())] == ["drop"]
    (found,) = warned(problem(Recurrent(), dropout="*"))
    assert "`lstm` (LSTM, line" in found
    assert "takes a rate of 0.5" in found


# --- solvers ---


def trained(p, solver, rounds=3):
    data = p.data(torch.device("cpu"), generator())
    solver.setup(p, data, torch.device("cpu"), generator(1))
    for _ in range(rounds):
        solver.step()
    return solver


@pytest.mark.parametrize("recipe", [delta_stn, centered_stn])
def test_self_tuning_tunes_the_rates_of_an_unmodified_module(recipe):
    p = problem(mlp(), dropout="*")
    before = torch.get_rng_state()
    solver = trained(p, recipe())
    assert torch.equal(torch.get_rng_state(), before)
    assert float(solver.solution().hypers["dropout"]) != pytest.approx(0.1, abs=1e-6)
    assert (
        float(solver.method.theta.tensors["0.weight.U"].abs().max()) > 0
        if ("0.weight.U" in solver.method.theta.tensors)
        else True
    )


def test_sampled_rates_are_refused_where_a_derivative_is_needed_and_relaxed_ones_are_not():
    with pytest.raises(bilevel.Refused, match="`dropout` is sampled or rounded"):
        trained(problem(mlp(), dropout="*"), implicit_cg())
    for kind in ("gaussian", "concrete"):
        solver = trained(problem(mlp(), dropout="*", dropout_kind=kind), implicit_cg())
        assert float(solver.solution().hypers["dropout"]) != pytest.approx(0.1, abs=1e-6)


def test_transformers_attention_takes_the_rate():
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertModel

    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
        attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.1,
    )  # fmt: skip
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        model = BertModel(config)
        tuned = tuned_dropout(
            model, {"attention": "*.attention.self.*", "rest": "*.output.dropout"}
        )
        assert set(tuned.sites.values()) == {"attention", "rest"}
        hypers = {"attention": torch.tensor(0.3), "rest": torch.tensor(0.3)}
        with tuned(hypers, generator()):
            model.train()(torch.arange(10).reshape(2, 5) % 11)
        assert any(tuned.sites[site] == "attention" for site in tuned.reached)


def test_no_call_is_looked_at_in_evaluation(monkeypatch):
    p = problem(mlp(), dropout="*")
    params, carry = p.init(generator())
    monkeypatch.setattr(calls.TunedCalls, "__torch_function__", None)
    p.predict({}, params, carry, (X, Y), train=False, generator=None)
