"""Problems to tune, and to learn from: closed forms first, then real data."""

from problems.architecture import Architecture, architecture_images, architecture_tabular
from problems.augmented import augmented_images
from problems.classification import Classification, digits, mnist
from problems.cleaning import HyperCleaning
from problems.distillation import Distillation, distillation
from problems.elastic import ElasticNet
from problems.few_shot import FewShot
from problems.generalized_ridge import GeneralizedRidge
from problems.images import images
from problems.input_dropout import InputDropout
from problems.language import Language, language
from problems.linear_network import LinearNetwork
from problems.networks import MLP, SimpleCNN
from problems.quadratic import Quadratic
from problems.regression import Ridge
from problems.reweighting import LossWeights

__all__ = [
    "MLP",
    "Architecture",
    "Classification",
    "Distillation",
    "ElasticNet",
    "FewShot",
    "GeneralizedRidge",
    "HyperCleaning",
    "InputDropout",
    "Language",
    "LinearNetwork",
    "LossWeights",
    "Quadratic",
    "Ridge",
    "SimpleCNN",
    "architecture_images",
    "architecture_tabular",
    "augmented_images",
    "digits",
    "distillation",
    "images",
    "language",
    "mnist",
]
