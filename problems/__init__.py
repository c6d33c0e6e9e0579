"""Bilevel problems: closed forms, image classification, language, few-shot learning, and others."""

if __name__ != "bilevel.problems":
    raise ImportError("`problems` is the source folder of bilevel.problems; import it by that name")

from bilevel.problems.architecture.problem import Architecture
from bilevel.problems.architecture.recipes import architecture_images, architecture_tabular
from bilevel.problems.classification.problem import Classification
from bilevel.problems.classification.recipes import augmented_images, digits, images, mnist
from bilevel.problems.closed_form.elastic_net import ElasticNet
from bilevel.problems.closed_form.generalized_ridge import GeneralizedRidge
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.problems.closed_form.linear_network import LinearNetwork
from bilevel.problems.closed_form.quadratic import Quadratic
from bilevel.problems.closed_form.ridge import Ridge
from bilevel.problems.dataset_distillation.problem import Distillation
from bilevel.problems.dataset_distillation.recipes import distillation
from bilevel.problems.few_shot.problem import FewShot
from bilevel.problems.few_shot.recipes import sinusoid
from bilevel.problems.hyper_cleaning import HyperCleaning
from bilevel.problems.language_modeling.problem import Language
from bilevel.problems.language_modeling.recipes import language, transformer
from bilevel.problems.language_modeling.transformer import TransformerLanguage
from bilevel.problems.loss_weights import LossWeights
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.networks.simple_cnn import SimpleCNN

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
    "TransformerLanguage",
    "architecture_images",
    "architecture_tabular",
    "augmented_images",
    "digits",
    "distillation",
    "images",
    "language",
    "mnist",
    "sinusoid",
    "transformer",
]
