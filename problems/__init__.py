"""Problems to tune, and to learn from: closed forms first, then real data."""

from bilevel.problems.architecture.problem import (
    Architecture,
    architecture_images,
    architecture_tabular,
)
from bilevel.problems.classification.any_network import images
from bilevel.problems.classification.learned_augmentation import augmented_images
from bilevel.problems.classification.problem import Classification, digits, mnist
from bilevel.problems.cleaning import HyperCleaning
from bilevel.problems.closed_form.elastic_net import ElasticNet
from bilevel.problems.closed_form.generalized_ridge import GeneralizedRidge
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.problems.closed_form.linear_network import LinearNetwork
from bilevel.problems.closed_form.quadratic import Quadratic
from bilevel.problems.closed_form.ridge import Ridge
from bilevel.problems.dataset_distillation import Distillation, distillation
from bilevel.problems.few_shot.problem import FewShot
from bilevel.problems.language_modeling.problem import Language, language
from bilevel.problems.networks.mlp_cnn import MLP, SimpleCNN
from bilevel.problems.reweighting import LossWeights

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
