"""The usual problem: an `nn.Module`, two objectives on its output, and data."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.data.global_rng import GlobalDraws, seeded
from bilevel.data.in_memory import in_memory, is_single
from bilevel.data.tensor_stream import Data, streams
from bilevel.dropout.kinds import DropoutKind
from bilevel.dropout.tuned import Groups, tuned_dropout
from bilevel.embedding_options import use_dense_gradients
from bilevel.errors import BilevelError
from bilevel.module_call import ModuleCall, arguments
from bilevel.module_checks import check_module, own_copy, without_weights
from bilevel.norm_statistics import Evaluated, Moments
from bilevel.params import Batch, Carry, Hypers, Params, Prediction
from bilevel.problem import Problem
from bilevel.space import Space, require_space

ONE_VALUE = "Expected more than 1 value per channel"
"""Begins PyTorch's message about batch norm in training on one example."""


class ModuleProblem(Problem):
    """A problem around an `nn.Module`.

    A subclass adds the two objectives, and `inputs` where λ acts on the input of the module. w
    holds the module's trainable parameters. The carry holds the rest of its state: buffers
    (batch-norm statistics) and parameters with `requires_grad=False`. A submodule that is passed in
    evaluation mode (a frozen batch norm) stays in it, unless the whole module is in evaluation
    mode. Draws of the module from PyTorch's global generator in training (`nn.Dropout`) follow from
    the generator that `predict` receives, and the global generator keeps its state.

    Args:
        module: a module with the initial w, which is never changed, or a function that returns a
            new module for every `init`.
        space: the hyperparameters.
        train: a pytree of tensors or NumPy arrays (for example a tuple of inputs and labels), a
            `TensorDataset`, a DataLoader or a `Stream`. Whole numbers in arrays become int64, save
            uint8 with several axes. float64 becomes float32 only where the module is float32.
        valid: the same for the outer objective.
        test: the same for the final report, or None.
        batch_size: batch size for tensors and arrays; None takes a whole split at every step.
        dropout: patterns of the dropout layers whose rates λ holds, as in `tuned_dropout`: `"*"`
            for one rate `dropout`, or `{"attention": "*.attn.*", "mlp": "*.mlp.*"}`. `space` may
            declare these hyperparameters; those that it lacks are added. None for constant rates.
        dropout_kind: `bernoulli`, or `gaussian` or `concrete` for a derivative in the rate.

    Attributes:
        aliases: the further names of tied weights, each with the name that w has.
        tuned_dropout: the tuned rates; None without any.

    Example:
        >>> import torch.nn.functional as F
        >>> from bilevel import Positive, squared_norm
        >>> class Decayed(ModuleProblem):
        ...     def inner_objective(self, hypers, params, prediction, batch):
        ...         penalty = 0.5 * hypers["decay"] * squared_norm(params)
        ...         return F.cross_entropy(prediction, batch[1]) + penalty.mean()
        ...
        ...     def outer_objective(self, hypers, params, prediction, batch):
        ...         return F.cross_entropy(prediction, batch[1])
        >>> x, labels = torch.randn(8, 3), torch.arange(8) % 2
        >>> train, valid = (x[:6], labels[:6]), (x[6:], labels[6:])
        >>> space = Space(decay=Positive(init=1e-3))
        >>> problem = Decayed(nn.Linear(3, 2), space, train=train, valid=valid)
        >>> params, carry = problem.init(torch.Generator())
        >>> hypers = space.constrain(space.init())
        >>> loss, carry = problem.outer_loss(hypers, params, carry, (x, labels))
        >>> sorted(params), loss.shape
        (['bias', 'weight'], torch.Size([]))

    Raises:
        BilevelError: `module` is neither a module nor a function that returns one, it has no
            trainable parameter, or its weights cannot be replaced (`bilevel.module_checks`).
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        space: Space,
        train: Any,
        valid: Any,
        test: Any = None,
        *,
        batch_size: int | None = None,
        dropout: Groups | None = None,
        dropout_kind: DropoutKind = "bernoulli",
    ) -> None:
        require_space(space)
        self.space = space
        self.batch_size = batch_size
        own: nn.Module | None = None
        if isinstance(module, nn.Module):
            check_module(module)
            own = own_copy(module)
        self._build: Any = module if own is None else lambda: own
        with seeded(torch.Generator()):
            made = self._build() if callable(self._build) else module
        if not isinstance(made, nn.Module):
            raise BilevelError(
                f"module={made!r} must be an nn.Module, or a function that returns one; pass one "
                "of the two"
            )
        if own is None:
            check_module(made)
        self._splits = (train, valid, test)
        self._single = is_single(made)
        with seeded(torch.Generator()):
            self._module = without_weights(made, self._build)
        use_dense_gradients(self._module)
        self.tuned_dropout = None
        if dropout is not None:
            self.tuned_dropout = tuned_dropout(self._module, dropout, dropout_kind)
            self.space = self.tuned_dropout.join(space)
        self._in_evaluation = (
            [m for m in self._module.modules() if not m.training] if made.training else []
        )
        self._flagged = _only_flagged(self._module)
        self._switch(train=True)
        self._call = ModuleCall(self._module)
        self._draws = GlobalDraws(self._module)
        self.aliases = _aliases(made)
        self._trained = frozenset(name for name, p in made.named_parameters() if p.requires_grad)
        self._buffers = frozenset(name for name, _ in made.named_buffers())
        if not self._trained:
            raise BilevelError(
                f"module={type(made).__name__} has no trainable parameter, so w is empty; set "
                "requires_grad on some parameters"
            )

    @property
    def module(self) -> nn.Module:
        """Return the module of every call; its weights have no values."""
        return self._module

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        with seeded(generator):
            module = self._build()
        state = {
            name: t.detach().clone()
            for name, t in (*module.named_parameters(), *module.named_buffers())
        }
        params = {name: t for name, t in state.items() if name in self._trained}
        return params, {name: t for name, t in state.items() if name not in self._trained}

    def module_with(self, params: Params, carry: Carry) -> nn.Module:
        """Return a new module with given weights and buffers, on the CPU.

        Args:
            params: w, by the names of the module; tied weights under one of theirs.
            carry: the rest of its state.
        """
        with seeded(torch.Generator()):
            module = copy.deepcopy(self._build()).cpu()
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, value in {**params, **carry}.items():
                tensors[name].copy_(value)
        return module

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        own = zip(self._splits, Data._fields, strict=True)
        train, valid, test = (in_memory(split, name, single=self._single) for split, name in own)
        return streams(
            train, valid, test, batch_size=self.batch_size, device=device, generator=generator
        )

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the module, positional and by keyword; `batch[0]` by default.

        Override it for augmentation and for dropout with a tuned rate, with draws from `generator`.

        Raises:
            BilevelError: the batch is one tensor, whose `batch[0]` is its first example.
        """
        if isinstance(batch, Tensor):
            raise BilevelError(
                f"a batch is one tensor {list(batch.shape)}, whose batch[0] is one example; give a "
                "tuple, (x,) or (x, y), or override `inputs`"
            )
        return (batch[0],), {}

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
        if self._module.training != train:
            self._switch(train=train)
        args, kwargs = arguments(self.inputs(hypers, batch, train=train, generator=generator))
        if not train:
            if any(t.requires_grad for t in carry.values()):
                with Evaluated():
                    return self._call({**params, **carry}, args, kwargs), carry
            return self._call({**params, **carry}, args, kwargs), carry

        def run() -> tuple[Prediction, Carry]:
            tensors = self._tensors(params, carry)
            with self._dropping(hypers, generator):
                prediction = self._call(tensors, args, kwargs)
            return prediction, {name: tensors[name] for name in carry}

        try:
            return self._draws(run, generator)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise BilevelError(
                "batch norm cannot normalize a training batch of one example; set drop_last=True "
                "in the DataLoader, choose another batch_size, or keep the layer in evaluation "
                "mode with eval()"
            ) from error

    def statistics(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> Carry:
        """Return mean and unbiased variance of `batch` for each batch norm, by one training pass.

        A norm in evaluation mode, without running statistics, or with momentum 0, has none.
        """
        if not self._buffers:
            return {}
        if not self._module.training:
            self._switch(train=True)
        args, kwargs = arguments(self.inputs(hypers, batch, train=True, generator=generator))

        def run() -> Carry:
            tensors = self._tensors(params, carry)
            found = Moments({name: tensors[name] for name in carry})
            with found as moments, self._dropping(hypers, generator):
                self._call(tensors, args, kwargs)
            return moments.found

        return self._draws(run, generator)

    def _dropping(
        self, hypers: Hypers, generator: torch.Generator | None
    ) -> AbstractContextManager[Any]:
        """Return a context in which dropout layers have the rates that λ holds."""
        return self.tuned_dropout(hypers, generator) if self.tuned_dropout else nullcontext()

    def _tensors(self, params: Params, carry: Carry) -> Params:
        """Return w and the carry for a training pass.

        Batch norm writes its statistics in place, so buffers are cloned. A module that assigns new
        ones instead leaves them in these tensors.
        """
        tensors = dict(params)
        for name, t in carry.items():
            tensors[name] = t.clone() if name in self._buffers else t
        return tensors

    def _switch(self, *, train: bool) -> None:
        if self._flagged is None:
            self._module.train(train)
        else:
            for submodule in self._flagged:
                submodule.__dict__["training"] = train
        if train:
            for submodule in self._in_evaluation:
                submodule.training = False


def _only_flagged(module: nn.Module) -> list[nn.Module] | None:
    """Return all submodules if `train` only sets a flag of each, else None."""
    modules = list(module.modules())
    plain = all(
        type(m).train is nn.Module.train
        and type(m).__setattr__ is nn.Module.__setattr__
        and "train" not in vars(m)
        for m in modules
    )
    return modules if plain else None


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return the further names of tied weights and buffers, each with the name that is kept."""
    first: dict[int, str] = {}
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {
        name: kept for name, tensor in named if (kept := first.setdefault(id(tensor), name)) != name
    }
