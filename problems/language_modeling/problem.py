"""Word-level language modeling by a recurrent network, with tuned dropout rates and penalties."""

import math
from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from bilevel import (
    Batch,
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
from bilevel.dropout.kinds import DropoutKind, dropout_by_name
from bilevel.problems.language_modeling.corpus import Corpus
from bilevel.problems.language_modeling.windows import Windows
from bilevel.problems.networks.recurrent import RecurrentNetwork, Site
from bilevel.problems.space_checks import SpaceChanges, require_per_batch, require_within
from bilevel.validate import whole

RATES = (
    "input_dropout",
    "hidden_dropout",
    "output_dropout",
    "embedding_dropout",
    "weight_dropout",
)

PER_BATCH = ("embedding_dropout", "weight_dropout")
"""Rates whose masks apply to weights, which all examples share."""


@final
class Language(Problem):
    """Predict the next word by truncated back-propagation.

        L_T = mean over tokens of CE + mean over rows of ar ‖m ∘ h‖² + tar ‖h_t − h_{t−1}‖²
        L_V = mean over tokens of CE

    h are the outputs of the last layer, m is its dropout, and ‖·‖² is a mean over steps and units.
    A batch is a window of the text, and the state is carried to the next window. Tuned are

    - `input_dropout`, `hidden_dropout` (with several layers) and `output_dropout` of activations,
      with one mask for all steps of a row;
    - `embedding_dropout` of whole words, and `weight_dropout`, which is DropConnect of the
      hidden-to-hidden matrices, with one mask for the batch;
    - `ar` and `tar`, penalties on activations and on their change.

    A prediction is {logits, raw, dropped}. An example is a row of the batch, and metrics count
    tokens. Validation windows continue each other too.

    Args:
        corpus: the text.
        embedding: length of the vector of a word.
        hidden: number of units per layer.
        layers: number of layers.
        cell: `lstm` or `gru`.
        tied: whether the decoder shares the table of the embedding.
        dropout: `bernoulli`, `gaussian` or `concrete`, as in `bilevel.dropout.kinds`.
        temperature: temperature of concrete dropout, 0.1 by default.
        batch_size: number of rows in training and in validation.
        bptt: number of tokens in a window.
        evaluation_batch_size: number of rows in evaluation.
        space: changes of the space, as in `Space.override`.
        dtype: floating-point type of the weights.

    Source: Merity, Keskar & Socher, ICLR 2018 (the places of dropout); Merity, McCann & Socher,
    2017 (AR and TAR); MacKay et al., ICLR 2019 (tuning them).

    Raises:
        BilevelError: a size is below 1, the text is too short for one window, or a rate of weights
            is perturbed per example.
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
        dropout: DropoutKind = "bernoulli",
        temperature: float | None = None,
        batch_size: int = 20,
        bptt: int = 35,
        evaluation_batch_size: int = 10,
        space: SpaceChanges | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        whole(2, "choose 2 or more, because TAR compares two steps", bptt=bptt)
        with torch.device("meta"):  # only shapes: every call has its own weights
            self.network = RecurrentNetwork(
                len(corpus.vocabulary),
                embedding=embedding,
                hidden=hidden,
                layers=layers,
                cell=cell,
                tied=tied,
            )
        self.corpus = corpus
        self.dtype = dtype
        self.batch_size = batch_size
        self.bptt = bptt
        self.evaluation_batch_size = evaluation_batch_size
        self._drop = dropout_by_name(dropout, temperature)
        domains: dict[str, Domain] = {
            name: Interval(
                low=0.0,
                high=0.95,
                init=0.05,
                differentiable=dropout != "bernoulli",
                per_example=name not in PER_BATCH,
            )
            for name in RATES
            if name != "hidden_dropout" or layers > 1
        }
        domains |= {"ar": Positive(init=0.05), "tar": Positive(init=0.05)}
        tuned = Space(**domains).override(space or {})
        require_within(tuned, dict.fromkeys(RATES, (0.0, 1.0)))
        reason = "masks weights, which all examples share"
        self.space = require_per_batch(tuned, dict.fromkeys(PER_BATCH, reason))

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        params = self.network.initial(generator, self.dtype)
        return params, self.network.fresh(self.batch_size, params["bias"])

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Return windows in the order of the text, for any generator."""

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
        """Return the weights under DropConnect, the dropout function, and a factor per word."""
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
        """Return the cross-entropy of every token, `loss` [B·T]."""
        return {
            "loss": F.cross_entropy(
                prediction["logits"].flatten(0, 1), batch[1].flatten(), reduction="none"
            )
        }

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return `perplexity` = e^loss with the mean loss over all tokens."""
        return {"perplexity": math.exp(means["loss"]) if means["loss"] < 700 else math.inf}

    def fresh_carry(self, carry: Carry, batch: Batch) -> Carry:
        return self.network.fresh(len(batch[0]), next(iter(carry.values())))

    def outer_carry(self, carry: Carry, last: Carry | None, batch: Batch) -> Carry:
        return self.fresh_carry(carry, batch) if last is None else last
