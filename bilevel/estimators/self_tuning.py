"""Classifier and regressor of scikit-learn that tune their regularization while they train."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from bilevel import validate
from bilevel.data.global_rng import seeded
from bilevel.data.tensor_stream import TensorStream
from bilevel.domains import Domain, Interval, Positive
from bilevel.errors import BilevelError
from bilevel.estimators.tabular_network import TabularNetwork
from bilevel.params import squared_norm
from bilevel.solver import Solver
from bilevel.space import Space
from bilevel.text import near
from bilevel.tuner.attach import attach
from bilevel.tuner.tuner import Tuner

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn below 1.6

    def validate_data(estimator: Any, *arrays: Any, **options: Any) -> Any:
        """Return the checked arrays."""
        return estimator._validate_data(*arrays, **options)


TUNABLE = ("decay", "dropout", "input_noise")


class _SelfTuning(BaseEstimator):
    """The shared part of classifier and regressor; see `SelfTuningClassifier`."""

    def __init__(
        self,
        hidden: Sequence[int] = (64,),
        *,
        tune: Sequence[str] = TUNABLE,
        decay: float = 1e-3,
        dropout: float = 0.1,
        input_noise: float = 0.1,
        solver: str = "delta_stn",
        epochs: int = 100,
        warmup: float = 0.1,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        tuning_rate: float = 0.03,
        valid_fraction: float = 0.2,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.tune = tune
        self.decay = decay
        self.dropout = dropout
        self.input_noise = input_noise
        self.solver = solver
        self.epochs = epochs
        self.warmup = warmup
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.tuning_rate = tuning_rate
        self.valid_fraction = valid_fraction
        self.random_state = random_state

    def _fit(
        self, X: np.ndarray, y: Tensor, outputs: int, loss: Callable[[Tensor, Any], Tensor]
    ) -> None:
        """Train and tune on standardized data, and keep the network of the best epoch."""
        self._check_settings(len(X))
        self._mean, self._std = _moments("X", X)
        self._std[self._std < 1e-12] = 1.0
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(X), generator=draws)
        held = max(1, round(self.valid_fraction * len(X)))
        x = self._standardized(X).float()
        valid, train = ((x[rows], y[rows]) for rows in (order[:held], order[held:]))
        with seeded(draws):
            network = TabularNetwork([x.shape[1], *self.hidden, outputs])
        warmup = round(self.warmup * self.epochs)
        batches = [self._stream(split, draws) for split in (train, valid)]
        tuner = attach(
            network,
            self._space(),
            loss=loss,
            penalty=self._penalty,
            inputs=self._inputs,
            optimizer=torch.optim.Adam(network.parameters(), lr=self.learning_rate),
            solver=self._solver(),
            example=(batches[0].peek(), batches[1].peek()),
            warmup_steps=warmup * batches[0].steps_per_epoch,
            seed=seed,
        )
        for epoch in range(1, self.epochs + 1):
            _train_an_epoch(tuner, *batches)
            if epoch > warmup or epoch == self.epochs:  # before, nothing is tuned
                tuner.evaluate(valid)
        result = tuner.result()
        found = {name: float(leaf) for name, leaf in result.solution().hypers.items()}
        self.best_params_ = {name: found[name] for name in self.tune if name in found}
        self.schedule_ = result.schedule if found else None
        # float64: a row must not depend, in its last digits, on the rows beside it
        self.network_ = result.module().double()

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            outputs: np.ndarray = self.network_(self._standardized(X)).numpy()
        return outputs

    def _standardized(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self._mean) / self._std)

    # --- the problem ---

    def _space(self) -> Space:
        """Return every hyperparameter that is not 0; those outside `tune` are frozen."""
        kinds: dict[str, Callable[..., Domain]] = {
            "decay": Positive,
            "dropout": partial(Interval, low=0.0, high=0.9),
            "input_noise": Positive,
        }
        if not self.hidden:
            kinds.pop("dropout")  # a linear model has no hidden units
        found: dict[str, Domain] = {}
        for name, kind in kinds.items():
            if (value := getattr(self, name)) == 0:
                continue
            try:
                found[name] = kind(init=value, frozen=name not in self.tune)
            except BilevelError as error:
                raise BilevelError(f"{name}: {error}") from None
        return Space(**found)

    def _penalty(self, hypers: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
        weights = {name: p for name, p in params.items() if name.endswith("weight")}
        return hypers.get("decay", torch.zeros(())) * squared_norm(weights)

    @staticmethod
    def _inputs(
        hypers: dict[str, Tensor], batch: Any, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[0], hypers.get("input_noise"), hypers.get("dropout")), {}

    def _solver(self) -> Solver:
        known = {entry.name: entry for entry in entry_points(group="bilevel.solvers")}
        if self.solver not in known:
            raise BilevelError(
                f"solver={self.solver!r} is unknown{near(str(self.solver), known)}; choose "
                f"{', '.join(sorted(known))}"
            )
        made: Any = known[self.solver].load()()
        if hasattr(made, "outer_optimizer"):
            made.outer_optimizer = partial(torch.optim.RMSprop, lr=self.tuning_rate)
        solver: Solver = made
        return solver

    def _stream(self, split: tuple[Tensor, Tensor], draws: torch.Generator) -> TensorStream:
        return TensorStream(split, min(self.batch_size, len(split[0])), draws)

    def _check_settings(self, examples: int) -> None:
        validate.whole(1, epochs=self.epochs, batch_size=self.batch_size)
        for name, example in (("hidden", "(64,)"), ("tune", "('decay',)")):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise validate.wrong(name, value, "must be a list", f"write {name}={example}")
        for width in self.hidden:
            validate.whole(1, hidden=width)
        for name in self.tune:
            validate.one_of(TUNABLE, tune=name)
        validate.between(0, 1, warmup=self.warmup)
        validate.positive(learning_rate=self.learning_rate, tuning_rate=self.tuning_rate)
        if not (validate.is_number(self.valid_fraction) and 0 < self.valid_fraction < 1):
            raise validate.wrong(
                "valid_fraction", self.valid_fraction, "must be between 0 and 1", "choose 0.2"
            )
        if examples < 2:
            raise ValueError(
                f"n_samples={examples} cannot be split into training and validation examples; "
                "give at least 2"
            )


class SelfTuningClassifier(ClassifierMixin, _SelfTuning):
    """A neural classifier that tunes weight decay, dropout and input noise in one training.

    It sets a part of the examples aside and trains on the others, while a solver moves the
    hyperparameters along the loss on that part. The network of the best epoch after warm-up stays.

    Args:
        hidden: the numbers of units of the hidden layers; () for a linear model.
        tune: the hyperparameters to tune: `decay`, `dropout`, `input_noise`.
        decay: the initial coefficient of ‖W‖² in the training loss; 0 leaves the penalty out.
        dropout: the initial rate of Gaussian dropout, below 0.9; 0 for none.
        input_noise: the initial standard deviation of the noise on standardized features; 0 for
            none.
        solver: the name of a solver that works batch by batch, such as `delta_stn`.
        epochs: passes over the training examples.
        warmup: the part of the epochs before the hyperparameters move.
        batch_size: examples in a step.
        learning_rate: of Adam, for the weights.
        tuning_rate: of RMSprop, for the hyperparameters.
        valid_fraction: the part of the examples that is set aside.
        random_state: a seed or a `RandomState`, for the split, the weights and all draws.

    Attributes:
        best_params_: the tuned hyperparameters of the best epoch, by name.
        schedule_: the values of all hyperparameters by inner step, after warm-up.
        classes_: the labels.
        network_: the trained network, on standardized features.

    Example:
        >>> from sklearn.datasets import make_moons
        >>> X, y = make_moons(100, noise=0.2, random_state=0)
        >>> model = SelfTuningClassifier([16], epochs=40, random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.8, sorted(model.best_params_)
        (True, ['decay', 'dropout', 'input_noise'])

    Raises:
        BilevelError: a setting is wrong, when `fit` is called.
    """

    def fit(self, X: Any, y: Any) -> "SelfTuningClassifier":
        """Train and tune on features [n, features] and labels [n]; return the estimator."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has 1 class, {self.classes_[0]}; give labels of at least 2 classes"
            )
        self._fit(X, torch.from_numpy(labels.astype(np.int64)), len(self.classes_), _cross_entropy)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes, [n, classes]."""
        logits = torch.from_numpy(self._outputs(X))
        probabilities: np.ndarray = logits.softmax(1).numpy()
        return probabilities

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable labels, [n]."""
        chosen = self._outputs(X).argmax(1)
        labels: np.ndarray = self.classes_[chosen]
        return labels


class SelfTuningRegressor(RegressorMixin, _SelfTuning):
    """A neural regressor that tunes weight decay, dropout and input noise in one training.

    The arguments and attributes are those of `SelfTuningClassifier`; the loss is the squared error
    of the standardized target.

    Example:
        >>> from sklearn.datasets import make_regression
        >>> X, y = make_regression(100, 5, random_state=0)
        >>> model = SelfTuningRegressor([16], epochs=40, random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.8
        True

    Raises:
        BilevelError: a setting is wrong, when `fit` is called.
    """

    def fit(self, X: Any, y: Any) -> "SelfTuningRegressor":
        """Train and tune on features [n, features] and targets [n]; return the estimator."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        if y.dtype.kind not in "biuf":
            raise ValueError(f"y holds {y.dtype.name} and no numbers; convert it, y.astype(float)")
        mean, std = _moments("y", y)
        self._target_mean, self._target_std = float(mean), float(std) or 1.0
        target = torch.from_numpy((y - self._target_mean) / self._target_std).float()
        self._fit(X, target[:, None], 1, _squared_error)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the predicted targets, [n]."""
        return self._outputs(X)[:, 0] * self._target_std + self._target_mean


def _moments(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation along the first axis."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise ValueError(
            f"{name} holds values up to {abs(values).max():.3g}, whose variance is not a float64; "
            "scale them"
        )
    return mean, std


def _train_an_epoch(tuner: Tuner, train: TensorStream, valid: TensorStream) -> None:
    both = "valid" in tuner.solver.inner_takes
    for _ in range(train.steps_per_epoch):
        tuner.step(train.next(), valid.next() if both else None)
        while tuner.due:
            tuner.outer_step(valid.next() if tuner.solver.outer_takes else None)


def _cross_entropy(prediction: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(prediction, batch[1])


def _squared_error(prediction: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(prediction, batch[1])
