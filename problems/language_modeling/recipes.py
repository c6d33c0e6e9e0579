"""Language models of a text, by default of the text that Python ships."""

from pathlib import Path
from typing import Any

from bilevel.problems.language_modeling.corpus import load_corpus
from bilevel.problems.language_modeling.problem import Language


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
