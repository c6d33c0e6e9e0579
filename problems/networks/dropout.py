"""The kinds of dropout, by their former place; `bilevel.dropout.kinds` defines them."""

from bilevel.dropout.kinds import (
    Dropout,
    DropoutKind,
    concrete_dropout,
    dropout,
    dropout_by_name,
    gaussian_dropout,
)

__all__ = [
    "Dropout",
    "DropoutKind",
    "concrete_dropout",
    "dropout",
    "dropout_by_name",
    "gaussian_dropout",
]
