"""This session enforces annotations of shape, and leaves other bad input to the code's own errors (tests/conftest.py)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from bilevel import BilevelError, Space
from bilevel.problems.networks.dropout import dropout


def test_a_wrong_shape_is_an_error_in_tests():
    with pytest.raises(TypeCheckError, match="rate"):
        dropout(torch.ones(4, 3), torch.full((3,), 0.5), torch.Generator())


def test_a_wrong_type_reaches_the_code():
    with pytest.raises(BilevelError, match="`rate` is a float"):
        Space(rate=0.5)  # type: ignore[arg-type]
