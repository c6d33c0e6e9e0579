"""The session enforces annotations of shape; the code's own errors handle other bad input."""

import pytest
import torch
from jaxtyping import TypeCheckError

from bilevel import BilevelError, Space
from bilevel.problems.networks.dropout import dropout


def test_a_wrong_shape_is_an_error_in_tests():
    with pytest.raises(TypeCheckError, match="rate"):
        dropout(torch.ones(4, 3), torch.full((3,), 0.5), torch.Generator())


def test_a_wrong_type_reaches_the_code():
    with pytest.raises(BilevelError, match=r"rate=0\.5 must be a Domain"):
        Space(rate=0.5)  # type: ignore[arg-type]
