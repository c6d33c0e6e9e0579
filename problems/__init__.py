"""Problems to tune, and to learn from: closed forms first, then real data."""

from problems.classification import Classification, digits, mnist
from problems.elastic import ElasticNet
from problems.language import Language, language
from problems.networks import MLP
from problems.quadratic import Quadratic
from problems.regression import Ridge

__all__ = ["MLP", "Classification", "ElasticNet", "Language", "Quadratic", "Ridge", "digits", "language", "mnist"]
