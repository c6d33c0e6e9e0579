"""Word-level language modelling by a recurrent network: dropout at five places and two penalties on activations are tuned."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from bilevel import (
    Batch,
    BilevelError,
    Carry,
    Data,
    Domain,
    Hypers,
    Interval,
    Metrics,
    Params,
    Positive,
    Prediction,
    Problem,
    Space,
)
from bilevel.problems.language_modeling.corpus import Corpus, corpus
from bilevel.problems.language_modeling.windows import Windows
from bilevel.problems.networks.dropout import Kind, named
from bilevel.problems.networks.recurrent import RecurrentNetwork, Site
from bilevel.problems.space_checks import shared, within

Changes: TypeAlias = Mapping[str, Mapping[str, Any]]

PER_BATCH = ("embedding_dropout", "weight_dropout")
"""Their masks are of weights, which all examples share."""


@final
class Language(Problem):
    """The next word, by truncated back-propagation: a batch is a window of the text, and the state is carried to the next one.

        L_T = mean over tokens of CE + mean over rows of ar ‖m ∘ h‖² + tar ‖h_t − h_{t−1}‖²,    L_V = mean over tokens of CE

    with h the outputs of the last layer, m its dropout, and ‖·‖² a mean over steps and units. Tuned are

    - `input_dropout`, `hidden_dropout` (of several layers), `output_dropout`: of activations, one mask for all steps of a row;
    - `embedding_dropout`: of whole words, and `weight_dropout`: DropConnect of the hidden-to-hidden matrices, one mask for the
      batch;
    - `ar` and `tar`: penalties on activations and on their change.

    A prediction is {logits, raw, dropped}; an example is a row of the batch, and metrics count tokens. Validation windows
    continue each other too.

    Args:
        corpus: the text.
        embedding: numbers per word.
        hidden: units per layer.
        layers: how many.
        cell: `lstm` or `gru`.
        tied: whether the decoder is the embedding's table.
        dropout: `bernoulli`, `gaussian` or `concrete`, as in `bilevel.problems.networks.dropout`.
        temperature: of concrete dropout, 0.1 by default.
        batch_size: rows, of training and of validation.
        bptt: tokens of a window.
        evaluation_batch_size: rows in evaluation.
        space: changes to the space, as in `Space.override`.
        dtype: of the weights.

    Sources: Merity, Keskar & Socher, ICLR 2018 (the places of dropout); Merity, McCann & Socher, 2017 (AR and TAR); MacKay et
    al., ICLR 2019 (tuning them).

    Raises:
        BilevelError: a size below 1, a text too short for one window, or a mask of weights per example.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        embedding: int,
        hidden: int,
        layers: int = 1,
        cell: str = "lstm",
        tied: bool = True,
        dropout: Kind = "bernoulli",
        temperature: float | None = None,
        batch_size: int = 20,
        bptt: int = 35,
        evaluation_batch_size: int = 10,
        space: Changes | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if bptt < 2:
            raise BilevelError(
                f"bptt={bptt} leaves no two steps of a window to compare; choose 2 or more"
            )
        with torch.device("meta"):  # shapes alone: every call brings its own weights
            self.network = RecurrentNetwork(
                len(corpus.vocabulary),
                embedding=embedding,
                hidden=hidden,
                layers=layers,
                cell=cell,
                tied=tied,
            )
        self.corpus, self.dtype = corpus, dtype
        self.batch_size, self.bptt, self.evaluation_batch_size = (
            batch_size,
            bptt,
            evaluation_batch_size,
        )
        self._drop = named(dropout, temperature)
        names = [
            "input_dropout",
            "hidden_dropout",
            "output_dropout",
            "embedding_dropout",
            "weight_dropout",
        ]
        domains: dict[str, Domain] = {
            name: Interval(
                low=0.0,
                high=0.95,
                init=0.05,
                differentiable=dropout != "bernoulli",
                per_example=name not in PER_BATCH,
            )
            for name in names
            if name != "hidden_dropout" or layers > 1
        }
        domains |= {"ar": Positive(init=0.05), "tar": Positive(init=0.05)}
        tuned = Space(**domains).override(space or {})
        self.space = shared(
            within(tuned, dict.fromkeys(names, (0.0, 1.0))),
            dict.fromkeys(PER_BATCH, "masks weights"),
        )

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        params = self.network.initial(generator, self.dtype)
        return params, self.network.fresh(self.batch_size, params["bias"])

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Windows in the order of the text, whatever the generator."""

        def windows(name: str, batch_size: int) -> Windows:
            return Windows(
                getattr(self.corpus, name),
                batch_size,
                self.bptt,
                vocabulary=self.corpus.vocabulary,
                device=device,
                name=name,
                evaluation_batch_size=self.evaluation_batch_size,
            )

        return Data(
            windows("train", self.batch_size), windows("valid", self.batch_size), windows("test", 1)
        )

    def predict(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        *,
        train: bool,
        generator: torch.Generator | None,
    ) -> tuple[Prediction, Carry]:
        tokens, _, begins = batch
        state = {name: s.masked_fill(begins[:, None], 0.0) for name, s in carry.items()}
        masks: tuple[Any, ...] = ()
        if train:
            params, masks = self._masked(hypers, params, next(iter(state.values())), generator)
        out = functional_call(self.network, params, (tokens, state, *masks))
        return {"logits": out.logits, "raw": out.raw, "dropped": out.dropped}, out.state

    def _masked(
        self, hypers: Hypers, params: Params, like: Tensor, generator: torch.Generator | None
    ) -> tuple[Params, tuple[Any, ...]]:
        """The weights under DropConnect, what happens at each dropout site, and a factor for every word."""
        matrices = {}
        for name in self.network.recurrent_weights():
            ones = like.new_ones(params[name].shape)
            matrices[name] = params[name] * self._drop(ones, hypers["weight_dropout"], generator)
        words = self._drop(
            like.new_ones(len(self.corpus.vocabulary)), hypers["embedding_dropout"], generator
        )

        def drop(site: Site, x: Tensor) -> Tensor:
            return x * self._drop(
                like.new_ones(len(x), 1, x.shape[-1]), hypers[f"{site}_dropout"], generator
            )

        return params | matrices, (drop, words)

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        raw = prediction["raw"]
        size = prediction["dropped"].square().mean((1, 2))
        change = (raw[:, 1:] - raw[:, :-1]).square().mean((1, 2))
        penalty = (hypers["ar"] * size).mean() + (hypers["tar"] * change).mean()
        return self.outer_objective(hypers, params, prediction, batch) + penalty

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction["logits"].flatten(0, 1), batch[1].flatten())

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Cross-entropy of every token, `loss` [B·T]."""
        return {
            "loss": F.cross_entropy(
                prediction["logits"].flatten(0, 1), batch[1].flatten(), reduction="none"
            )
        }

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """`perplexity` = e^loss, of the mean over all tokens."""
        return {"perplexity": math.exp(means["loss"]) if means["loss"] < 700 else math.inf}

    def fresh_carry(self, carry: Carry, batch: Batch) -> Carry:
        return self.network.fresh(len(batch[0]), next(iter(carry.values())))

    def outer_carry(self, carry: Carry, last: Carry | None, batch: Batch) -> Carry:
        return self.fresh_carry(carry, batch) if last is None else last


def language(
    text: str = "python",
    root: str | Path = "data",
    download: bool = True,
    vocabulary_size: int | None = 1000,
    embedding: int = 64,
    hidden: int = 64,
    layers: int = 2,
    cell: str = "lstm",
    tied: bool = True,
    dropout: Kind = "bernoulli",
    temperature: float | None = None,
    batch_size: int = 20,
    bptt: int = 20,
    evaluation_batch_size: int = 10,
    space: Changes | None = None,
) -> Language:
    """A text as in `bilevel.problems.language_modeling.corpus.read`, by default the embedded one with a small LSTM; tuned: five dropout rates, AR and TAR.

    Example:
        >>> list(language().space)
        ['input_dropout', 'hidden_dropout', 'output_dropout', 'embedding_dropout', 'weight_dropout', 'ar', 'tar']
    """
    return Language(
        corpus(text, vocabulary_size=vocabulary_size, root=root, download=download),
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        cell=cell,
        tied=tied,
        dropout=dropout,
        temperature=temperature,
        batch_size=batch_size,
        bptt=bptt,
        evaluation_batch_size=evaluation_batch_size,
        space=space,
    )
