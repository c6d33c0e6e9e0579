"""Word-level language modeling by a transformer, with tuned dropout rates and weight decay."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import (
    Batch,
    Data,
    Domain,
    Hypers,
    Interval,
    Metrics,
    ModuleProblem,
    Params,
    Positive,
    Prediction,
    Space,
    squared_norm,
)
from bilevel.problems.language_modeling.corpus import Corpus
from bilevel.problems.language_modeling.windows import Windows
from bilevel.problems.networks.dropout import DropoutKind, dropout_by_name
from bilevel.problems.networks.transformer import Decoder
from bilevel.problems.space_checks import SpaceChanges, require_within
from bilevel.validate import whole


@final
class TransformerLanguage(ModuleProblem):
    """Predict the next word of a window from the earlier words of the window.

        L_T = mean over tokens of CE + ½ decay ‖w‖²        L_V = mean over tokens of CE

    Tuned are `input_dropout` of the embedded words, `dropout1`, `dropout2`, … of the attention and
    the MLP of each block, `output_dropout`, and `weight_decay`. A prediction is the logits
    [B, T, words]. An example is a window in a row of the batch, and metrics count tokens. Windows
    share no state.

    Args:
        corpus: the text.
        width: length of the vector of a token.
        depth: number of blocks.
        heads: number of heads.
        dropout: `bernoulli`, `gaussian` or `concrete`, as in `bilevel.problems.networks.dropout`.
        temperature: temperature of concrete dropout, 0.1 by default.
        batch_size: number of rows in training and in validation.
        length: number of tokens in a window.
        evaluation_batch_size: number of rows in evaluation.
        space: changes of the space, as in `Space.override`.

    Raises:
        BilevelError: a size is below 1, `heads` does not divide `width`, or the text is too short
            for one window.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        width: int,
        depth: int,
        heads: int,
        dropout: DropoutKind = "bernoulli",
        temperature: float | None = None,
        batch_size: int = 20,
        length: int = 32,
        evaluation_batch_size: int = 10,
        space: SpaceChanges | None = None,
    ) -> None:
        whole(1, length=length, batch_size=batch_size)
        self.corpus = corpus
        self.length = length
        self.evaluation_batch_size = evaluation_batch_size
        self._drop = dropout_by_name(dropout, temperature)
        sizes = {"length": length, "width": width, "depth": depth, "heads": heads}
        words = len(corpus.vocabulary)
        super().__init__(
            partial(Decoder, words, **sizes), Space(), None, None, batch_size=batch_size
        )
        names = ["input_dropout", *(f"dropout{i + 1}" for i in range(2 * depth)), "output_dropout"]
        rate = Interval(low=0.0, high=0.95, init=0.05, differentiable=dropout != "bernoulli")
        domains: dict[str, Domain] = dict.fromkeys(names, rate)
        domains["weight_decay"] = Positive(init=1e-4)
        tuned = Space(**domains).override(space or {})
        self.space = require_within(tuned, dict.fromkeys(names, (0.0, 1.0)))
        self._rates = names

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Return windows in the order of the text, for any generator."""

        def windows(name: str, batch_size: int) -> Windows:
            return Windows(
                getattr(self.corpus, name),
                batch_size,
                self.length,
                vocabulary=self.corpus.vocabulary,
                device=device,
                name=name,
                evaluation_batch_size=self.evaluation_batch_size,
            )

        rows = self.batch_size or 1
        return Data(windows("train", rows), windows("valid", rows), windows("test", 1))

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def drop(site: int, x: Tensor) -> Tensor:
            return self._drop(x, hypers[self._rates[site]], generator)

        return (batch[0], drop) if train else (batch[0],), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        penalty = 0.5 * (hypers["weight_decay"] * squared_norm(params)).mean()
        return self.outer_objective(hypers, params, prediction, batch) + penalty

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction.flatten(0, 1), batch[1].flatten())

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Return the cross-entropy of every token, `loss` [B·T]."""
        tokens = prediction.flatten(0, 1), batch[1].flatten()
        return {"loss": F.cross_entropy(*tokens, reduction="none")}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return `perplexity` = e^loss with the mean loss over all tokens."""
        return {"perplexity": math.exp(means["loss"]) if means["loss"] < 700 else math.inf}
