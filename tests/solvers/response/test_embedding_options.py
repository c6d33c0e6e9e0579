"""Options of embeddings are exact under every solver, or refused with a remedy that works."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import BilevelError, ModuleProblem, Positive, Refused, Space, squared_norm
from bilevel.solvers import SAMA, Dense, Fixed, Unrolled, delta_stn, implicit_cg, stn
from bilevel.solvers.response.embedding_bag import embedding_bag
from bilevel.solvers.response.per_example_weight import ResponseWeight
from tests.support.solver_cases import ready, sgd
from tests.support.solver_list import DIRECT_ONLY, SOLVERS

WORDS, PADDING = 12, 11


def tokens():
    ids = torch.randint(PADDING, (20, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(1, 6, (20, 1), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(6) < lengths, ids, PADDING)


IDS = tokens()
LABELS = IDS.sum(1) % 2


class Lookup(nn.Module):
    """Sums what `look_up` returns for a table, [B, n, d], or takes it as it is, [B, d]."""

    def __init__(self, look_up=None, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Embedding(WORDS, 4, padding_idx=PADDING) if layer is None else layer
        self.out, self.look_up = nn.Linear(4, 2), look_up
        self.double()

    def forward(self, ids):
        e = self.layer(ids) if self.look_up is None else self.look_up(ids, self.layer.weight)
        return self.out(torch.tanh(e.sum(1) if e.ndim == 3 else e))


class Decayed(ModuleProblem):
    def __init__(self, module, *, per_example=True):
        split = (IDS, LABELS)
        space = Space(decay=Positive(init=0.05, per_example=per_example))
        super().__init__(module, space, split, split, batch_size=10)

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction, batch[1]) + penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


PADDED = {
    "a layer": lambda: Lookup(),
    "a negative index": lambda: Lookup(layer=nn.Embedding(WORDS, 4, padding_idx=-1)),
    "a function": lambda: Lookup(lambda ids, table: F.embedding(ids, table, padding_idx=PADDING)),
    "torch.embedding": lambda: Lookup(lambda ids, table: torch.embedding(table, ids, PADDING)),
}


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in DIRECT_ONLY])
@pytest.mark.parametrize("kind", PADDED)
def test_the_row_of_the_padding_stays_zero(kind, name):
    problem = Decayed(PADDED[kind](), per_example=kind != "torch.embedding")
    solver = ready(problem, SOLVERS[name](inner_optimizer=sgd(0.03)))
    for _ in range(8):
        solver.step()
    table = solver.solution().params["layer.weight"]
    assert table.isfinite().all()
    assert not table[PADDING].any()
    assert table[:PADDING].all()


@pytest.mark.parametrize("make", [delta_stn, stn, lambda **o: delta_stn(response=Dense(), **o)])
def test_the_response_of_the_padding_is_zero(make):
    solver = ready(Decayed(Lookup()), make(inner_optimizer=sgd(0.1)))
    for _ in range(8):
        solver.step()
    moved = (solver.method.respond(torch.tensor([t]).double()) for t in (0.0, 1.0))
    start, end = (params["layer.weight"].detach() for params in moved)
    assert not (end - start)[PADDING].any()
    assert (end - start)[:PADDING].any(1).all()


class Own(nn.Embedding):
    """A user's subclass."""


SPARSE = {
    "Embedding": lambda sparse: nn.Embedding(WORDS, 4, sparse=sparse),
    "a subclass": lambda sparse: Own(WORDS, 4, padding_idx=PADDING, sparse=sparse),
    "EmbeddingBag": lambda sparse: nn.EmbeddingBag(WORDS, 4, mode="sum", sparse=sparse),
}


@pytest.mark.parametrize("make", [delta_stn, stn, SAMA, implicit_cg, Unrolled, Fixed])
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_layers_train_as_dense_ones_bit_for_bit(kind, make):
    ends = []
    for sparse in (False, True):
        solver = ready(Decayed(lambda s=sparse: Lookup(layer=SPARSE[kind](s))), make())
        for _ in range(3):
            solver.step()
        ends.append(solver.solution().params)
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


OPTIONS = {
    "max_norm": 1.0,
    "scale_grad_by_freq": True,
    "sparse": True,
}


@pytest.mark.parametrize("make", [delta_stn, Fixed, implicit_cg, Unrolled, SAMA])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag], ids=["embedding", "bag"])
def test_an_option_of_a_function_is_refused_by_name_and_nothing_is_rewritten(
    function, option, make
):
    def look_up(ids, table):
        return function(ids, table, **{option: OPTIONS[option]})

    problem = Decayed(Lookup(look_up))
    params, carry = problem.init(torch.Generator())
    problem.init = lambda generator: (params, carry)
    before = params["layer.weight"].clone()
    with pytest.raises(Refused, match=rf"{option}=\S+ of the embedding `layer.weight`.* set"):
        ready(problem, make())
    assert torch.equal(params["layer.weight"], before)


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_option_of_a_layer_is_refused_by_name(kind, option):
    layer = kind(WORDS, 4, **{option: OPTIONS[option]})
    with pytest.raises(Refused, match=rf"{option}=\S+ of the embedding `layer.weight`"):
        ready(Decayed(Lookup(layer=layer)))


def test_the_remedy_for_max_norm_runs_and_predicts_the_same():
    def shortened(ids, table):
        e = F.embedding(ids, table)
        return e * (1.0 / e.norm(dim=-1, keepdim=True).clamp(min=1.0))

    layer = nn.Embedding(WORDS, 4, max_norm=1.0)
    ours, theirs = Lookup(shortened, layer), Lookup(None, layer)
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    ready(Decayed(ours)).step()


def test_a_row_of_padding_that_is_not_zero_is_refused_and_the_remedies_run():
    network = Lookup()
    nn.init.ones_(network.layer.weight)
    with pytest.raises(Refused, match=r"row 11 of the embedding `layer.weight`.*set this row to 0"):
        ready(Decayed(network), Fixed())
    with torch.no_grad():
        network.layer.weight[PADDING] = 0
    ready(Decayed(network), Fixed()).step()
    ready(Decayed(Lookup(layer=nn.Embedding(WORDS, 4))), Fixed()).step()
    ready(Decayed(Lookup(layer=nn.EmbeddingBag(WORDS, 4, padding_idx=PADDING))), Fixed()).step()


@pytest.mark.parametrize("padding", [None, PADDING, PADDING - WORDS])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_a_bag_equals_its_kernel_and_its_rule_equals_dense_weights(mode, padding):
    draws = torch.Generator().manual_seed(2)
    table, response = torch.randn(2, WORDS, 4, generator=draws, dtype=torch.float64)
    scale = torch.randn(20, 4, generator=draws, dtype=torch.float64)
    ids = IDS.clone()
    ids[0] = PADDING  # an empty bag
    options = {"mode": mode, "padding_idx": padding}
    if mode == "weighted":
        factors = torch.rand(20, 6, generator=draws, dtype=torch.float64)
        options |= {"mode": "sum", "per_sample_weights": factors}
    torch.testing.assert_close(
        embedding_bag(ids, table, **options), F.embedding_bag(ids, table, **options)
    )
    weight = ResponseWeight.of(table, response, scale, 1)
    rows = []
    for b in range(20):
        own = {k: v[b : b + 1] if k == "per_sample_weights" else v for k, v in options.items()}
        rows.append(F.embedding_bag(ids[b : b + 1], table + response * scale[b], **own))
    torch.testing.assert_close(F.embedding_bag(ids, weight, **options), torch.cat(rows))


@pytest.mark.parametrize("per_example", [True, False])
def test_a_bag_runs_linearized_and_has_an_implicit_hypergradient(per_example):
    def make(layer):
        return Decayed(Lookup(layer=layer), per_example=per_example)

    bag = nn.EmbeddingBag(WORDS, 4, mode="sum", padding_idx=PADDING)
    summed = nn.Embedding.from_pretrained(bag.weight.detach(), freeze=False, padding_idx=PADDING)
    ready(make(bag)).step()
    ours, theirs = (ready(make(layer), implicit_cg()).hypergradient() for layer in (bag, summed))
    torch.testing.assert_close(ours, theirs)


def test_ragged_bags_are_refused_and_a_named_solver_takes_them():
    starts = torch.arange(0, 60, 6)

    def ragged(ids, table):
        return F.embedding_bag(ids.reshape(-1), table, starts, mode="sum")

    with pytest.raises(BilevelError, match="bags of several lengths"):
        ready(Decayed(Lookup(ragged)))
    ready(Decayed(Lookup(ragged)), Fixed()).step()
    ready(Decayed(Lookup(ragged)), SAMA()).step()
