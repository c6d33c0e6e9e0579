"""Language models of a text, by default of the text that Python ships."""

from pathlib import Path
from typing import Any

from bilevel.problems.language_modeling.corpus import load_corpus
from bilevel.problems.language_modeling.problem import Language
from bilevel.problems.language_modeling.transformer import TransformerLanguage


def language(
    text: str = "python",
    root: str | Path = "data",
    download: bool = True,
    vocabulary_size: int | None = 1000,
    embedding: int = 64,
    hidden: int = 64,
    layers: int = 2,
    *,
    bptt: int = 20,
    **options: Any,
) -> Language:
    """Return a language model of a text; by default a small LSTM on the text that Python ships.

    Tuned are five dropout rates, AR and TAR.

    Args:
        text: as in `bilevel.problems.language_modeling.texts.read_text`.
        root: folder for the published corpora.
        download: whether missing files of these are downloaded.
        vocabulary_size: number of words; None takes all words of the training split.
        embedding: length of the vector of a word.
        hidden: number of units per layer.
        layers: number of layers.
        bptt: number of tokens in a window.
        options: other arguments of `Language`.

    Example:
        >>> [name for name in language().space if name.endswith("dropout")]
        ['input_dropout', 'hidden_dropout', 'output_dropout', 'embedding_dropout', 'weight_dropout']
    """
    return Language(
        load_corpus(text, vocabulary_size=vocabulary_size, root=root, download=download),
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        bptt=bptt,
        **options,
    )


def transformer(
    text: str = "python",
    root: str | Path = "data",
    download: bool = True,
    vocabulary_size: int | None = 1000,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    **options: Any,
) -> TransformerLanguage:
    """Return a language model by a small transformer, on the same texts as `language`.

    Tuned are the dropout rates of the words, of each branch and of the output, and weight decay.

    Args:
        text: as in `bilevel.problems.language_modeling.texts.read_text`.
        root: folder for the published corpora.
        download: whether missing files of these are downloaded.
        vocabulary_size: number of words; None takes all words of the training split.
        width: length of the vector of a token.
        depth: number of blocks.
        heads: number of heads.
        options: other arguments of `TransformerLanguage`.

    Example:
        >>> list(transformer(width=16, depth=1, heads=2).space)
        ['input_dropout', 'dropout1', 'dropout2', 'output_dropout', 'weight_decay']
    """
    return TransformerLanguage(
        load_corpus(text, vocabulary_size=vocabulary_size, root=root, download=download),
        width=width,
        depth=depth,
        heads=heads,
        **options,
    )
