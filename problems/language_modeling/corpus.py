"""Texts as numbers of words, with the vocabulary of the training split.

Every line of a text ends in `<eos>`.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel.problems.language_modeling.texts import Text, read_text
from bilevel.validate import wrong

UNKNOWN, END = "<unk>", "<eos>"


class Corpus(NamedTuple):
    """Three splits as word numbers, and the words.

    Attributes:
        train: word numbers of the training split.
        valid: word numbers of the validation split.
        test: word numbers of the test split.
        vocabulary: the words by number.
    """

    train: Int[Tensor, " n"]
    valid: Int[Tensor, " n"]
    test: Int[Tensor, " n"]
    vocabulary: tuple[str, ...]


def load_corpus(
    text: str = "python",
    *,
    vocabulary_size: int | None = None,
    root: str | Path = "data",
    download: bool = True,
) -> Corpus:
    """Read a text and number its words.

    Args:
        text: as in `bilevel.problems.language_modeling.texts.read_text`.
        vocabulary_size: as in `number_words`.
        root: folder for the published corpora.
        download: whether missing files of these are downloaded.

    Example:
        >>> python = load_corpus(vocabulary_size=2000)
        >>> python.vocabulary[:2], len(python.vocabulary), len(python.train) > 50_000
        (('<unk>', '<eos>'), 2000, True)
    """
    return number_words(read_text(text, root=root, download=download), vocabulary_size)


def number_words(text: Text, vocabulary_size: int | None = None) -> Corpus:
    """Number the most frequent words of the training split; all other words become `<unk>`.

    Args:
        text: prose is converted to lower case and cut into words and punctuation; a tokenized text
            is cut at spaces.
        vocabulary_size: number of words, `<unk>` and `<eos>` included; None takes all words of the
            training split.

    Raises:
        BilevelError: `vocabulary_size` is below 3.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.trainers import WordLevelTrainer

    if vocabulary_size is not None and not vocabulary_size > 2:
        reason = f"leaves no place for a word, because {UNKNOWN} and {END} count"
        raise wrong("vocabulary_size", vocabulary_size, reason, "choose 3 or more")
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    if not text.tokenized:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit() if text.tokenized else pre_tokenizers.Whitespace()
    )
    most = 2**31 if vocabulary_size is None else vocabulary_size
    trainer = WordLevelTrainer(vocab_size=most, special_tokens=[UNKNOWN, END], show_progress=False)
    # The trainer would give a special token of the text a second number.
    counted = (re.sub(f"{UNKNOWN}|{END}", " ", line) for line in text.train)
    tokenizer.train_from_iterator(counted, trainer)
    end = tokenizer.token_to_id(END)

    def numbers(lines: list[str]) -> Tensor:
        return torch.tensor(
            [token for line in tokenizer.encode_batch(lines) for token in (*line.ids, end)]
        )

    words = tokenizer.get_vocab()
    vocabulary = tuple(sorted(words, key=words.__getitem__))
    return Corpus(numbers(text.train), numbers(text.valid), numbers(text.test), vocabulary)
