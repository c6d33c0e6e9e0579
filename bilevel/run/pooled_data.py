"""A problem that trains on its training and validation examples together."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.data.tensor_stream import Data, TensorStream
from bilevel.errors import BilevelError
from bilevel.problem_wrapper import ProblemWrapper


class PooledData(ProblemWrapper):
    """`problem`, whose training split also holds its validation split.

    It is for a last training at fixed hyperparameters. The validation loss is then one of training
    examples, so only the test split measures the result.

    Example:
        >>> from bilevel.problems import digits
        >>> problem, draws = digits(hidden=[8]), torch.Generator()
        >>> before = problem.data(torch.device("cpu"), draws)
        >>> after = PooledData(problem).data(torch.device("cpu"), draws)
        >>> after.train.size == before.train.size + before.valid.size
        True
    """

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Return the streams of the problem, with the pooled one for training.

        Raises:
            BilevelError: the examples are not tensors in memory.
        """
        data = self.problem.data(device, generator)
        train, valid = data.train, data.valid
        if not (isinstance(train, TensorStream) and isinstance(valid, TensorStream)):
            kind = type(train if not isinstance(train, TensorStream) else valid).__name__
            raise BilevelError(
                f"on=train+valid cannot join a {kind}, whose examples are not tensors in memory; "
                "use on=train, or join the splits in the problem"
            )
        pooled = TensorStream(
            pytree.tree_map(_joined, train.tensors, valid.tensors),
            train.batch_size,
            train.generator,
            device=device,
        )
        return Data(pooled, valid, data.test)


def _joined(one: object, other: object) -> object:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.cat([one, other])
    return one
