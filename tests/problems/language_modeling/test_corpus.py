"""Tests of texts, vocabularies and windows, and of their errors."""

import hashlib
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import bilevel.problems.language_modeling.texts
from bilevel import BilevelError
from bilevel.problems.language_modeling.corpus import load_corpus, number_words
from bilevel.problems.language_modeling.texts import SPLITS, Text, read_file, read_text, split_prose
from bilevel.problems.language_modeling.windows import Windows

LINES = "the cat sat .\nthe dog sat <unk> N\n\nThe end\n"


def written(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return folder


def words(corpus, split):
    return [corpus.vocabulary[i] for i in getattr(corpus, split)]


# --- reading


def test_the_embedded_text_is_split_by_position():
    text = read_text("python")
    sizes = [sum(map(len, lines)) for lines in text[:3]]
    assert [size / sum(sizes) for size in sizes] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert sum(sizes) > 200_000
    assert not text.tokenized


def test_prose_keeps_every_word_in_order():
    text = "\n\n".join(f"a{i} b{i}\nc{i}" for i in range(50))
    parts = split_prose(text, "it")
    assert " ".join(" ".join(lines) for lines in parts[:3]).split() == text.split()
    assert "a1 b1 c1" in parts.train  # a paragraph is a line


def test_the_vocabulary_is_of_the_training_split_alone():
    made = number_words(Text(["The cat, the dog."], ["the cow"], ["Dog"], tokenized=False))
    assert made.vocabulary[:3] == ("<unk>", "<eos>", "the")
    assert sorted(made.vocabulary[3:]) == [",", ".", "cat", "dog"]
    assert words(made, "train") == ["the", "cat", ",", "the", "dog", ".", "<eos>"]
    assert words(made, "valid") == ["the", "<unk>", "<eos>"]
    assert words(made, "test") == ["dog", "<eos>"]


def test_a_tokenized_text_is_cut_at_spaces_and_keeps_its_case_and_its_unknowns(tmp_path):
    made = load_corpus(str(written(tmp_path, train=LINES, valid="the cow\n", test="N\n")))
    assert (
        " ".join(words(made, "train"))
        == "the cat sat . <eos> the dog sat <unk> N <eos> <eos> The end <eos>"
    )
    assert words(made, "valid") == ["the", "<unk>", "<eos>"]
    assert made.train[8] == 0


def test_a_mark_of_byte_order_and_other_line_ends_are_no_words(tmp_path):
    folder = written(tmp_path, valid="the\n", test="the\n")
    (folder / "train.txt").write_bytes("\ufeffthe cat\r\nthe \u2028 dog\r\n".encode())
    made = load_corpus(str(folder))
    assert " ".join(words(made, "train")) == "the cat <eos> the dog <eos>"


def test_the_most_frequent_words_stay_and_ties_do_not_depend_on_the_order():
    lines = ["b a c c d d"]
    first, other = (
        number_words(Text(split, lines, lines, tokenized=True), 5)
        for split in (lines, ["d c b a d c"])
    )
    assert first.vocabulary == other.vocabulary == ("<unk>", "<eos>", "c", "d", "a")
    assert words(first, "train")[0] == "<unk>"


def test_the_embedded_corpus_has_the_size_that_was_asked_for():
    assert len(load_corpus(vocabulary_size=100).vocabulary) == 100
    assert len(load_corpus(vocabulary_size=None).vocabulary) > 2000


# --- windows


def text_of(stream, steps):
    """Return the tokens of a stream and the tokens that follow them, row by row."""
    batches = [stream.next() for _ in range(steps)]
    return (
        torch.cat([b[0] for b in batches], 1),
        torch.cat([b[1] for b in batches], 1),
        [b[2].tolist() for b in batches],
    )


def test_windows_are_consecutive_and_begin_anew_with_the_rows():
    stream = Windows(torch.arange(50), 3, 5)
    assert (stream.steps_per_epoch, stream.size) == (3, 9)
    for _ in range(2):
        tokens, targets, begins = text_of(stream, 3)
        assert tokens.tolist() == [list(range(16 * row, 16 * row + 15)) for row in range(3)]
        assert torch.equal(targets, tokens + 1)
        assert begins == [[True] * 3, [False] * 3, [False] * 3]
    assert stream.examples == 18


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_evaluation_predicts_every_token_but_the_rest_of_a_column_once(rows):
    stream = Windows(torch.arange(101), 2, 6, evaluation_batch_size=rows)
    batches = list(stream.once())
    seen = torch.cat([targets.flatten() for _, targets, _ in batches])
    assert len(seen) == len(set(seen.tolist())) > 100 - min(rows, 100 // 6)
    assert seen.min() == 1
    assert all(torch.equal(targets, tokens + 1) for tokens, targets, _ in batches)
    assert [bool(begins.all()) for *_, begins in batches] == [True] + [False] * (len(batches) - 1)


def test_evaluation_stops_at_its_limit_and_leaves_the_position():
    stream = Windows(torch.arange(101), 2, 5, evaluation_batch_size=2)
    first = stream.next()
    assert len(list(stream.once(limit=5))) == 3
    assert torch.equal(stream.peek()[0], first[0])
    assert stream.next()[0][0, 0] == 5


def test_a_resumed_stream_goes_on_where_it_was():
    whole, stopped, resumed = (Windows(torch.arange(101), 2, 7, vocabulary=["a"]) for _ in range(3))
    text_of(stopped, 9)
    resumed.load_state_dict(stopped.state_dict())
    text_of(whole, 9)
    for _ in range(8):
        for ours, theirs in zip(resumed.next(), whole.next(), strict=True):
            assert torch.equal(ours, theirs)
    assert resumed.examples == whole.examples


# --- published corpora


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve both corpora locally, with their own checksums."""
    source = tmp_path / "served"
    source.mkdir()
    for split in SPLITS:
        (source / f"ptb.{split}.txt").write_text(LINES)
    with zipfile.ZipFile(source / "wikitext-2-v1.zip", "w") as archive:
        for split in SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", f"\n = {split} = \n\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(source)))
    address = f"http://127.0.0.1:{server.server_port}/"
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in source.iterdir()}
    monkeypatch.setattr(bilevel.problems.language_modeling.texts, "PTB", address)
    monkeypatch.setattr(
        bilevel.problems.language_modeling.texts,
        "PTB_MD5",
        {split: md5[f"ptb.{split}.txt"] for split in SPLITS},
    )
    monkeypatch.setattr(
        bilevel.problems.language_modeling.texts, "WIKITEXT2", f"{address}wikitext-2-v1.zip"
    )
    monkeypatch.setattr(
        bilevel.problems.language_modeling.texts, "WIKITEXT2_MD5", md5["wikitext-2-v1.zip"]
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield source
    server.shutdown()
    thread.join()
    server.server_close()


def test_corpora_are_fetched_once(served, tmp_path):
    root = tmp_path / "data"
    first = read_text("ptb", root=root), read_text("wikitext2", root=root)
    assert first[0].train == ["the cat sat .", "the dog sat <unk> N", "", "The end"]
    assert first[1].valid == ["", "= valid =", ""]
    shutil.rmtree(served)
    assert (
        read_text("ptb", root=root, download=False),
        read_text("wikitext2", root=root, download=False),
    ) == first


def test_a_download_with_another_checksum_is_refused(served, tmp_path):
    (served / "ptb.valid.txt").write_text("forged")
    with pytest.raises(
        BilevelError, match=r"valid\.txt .* is missing and .* could not be downloaded"
    ):
        read_text("ptb", root=tmp_path / "data")


def test_a_damaged_file_is_found_and_ones_own_is_taken_as_it_is(served, tmp_path):
    root = tmp_path / "data"
    read_text("ptb", root=root)
    (root / "ptb" / "ptb.test.txt").write_text("cut off")
    with pytest.raises(
        BilevelError, match=r"ptb\.test\.txt has another MD5 than the published file"
    ):
        read_text("ptb", root=root)
    written(root / "ptb", test="my own\n")
    assert read_text("ptb", root=root).test == ["my own"]


@pytest.mark.parametrize(
    ("text", "wanted"), [("ptb", "train.txt"), ("wikitext2", "wiki.train.tokens")]
)
def test_a_corpus_that_is_missing_offline_says_where_it_belongs(text, wanted, tmp_path):
    with pytest.raises(
        BilevelError, match=rf"{wanted}.* is missing and download is off; put it there"
    ):
        read_text(text, root=tmp_path, download=False)


# --- bad input: one sentence each


def test_a_text_that_is_not_there(tmp_path):
    with pytest.raises(
        BilevelError, match=r"text='pyton' does not exist \(did you mean `python`\?\); choose"
    ):
        read_text("pyton")
    with pytest.raises(BilevelError, match=r"valid\.txt cannot be read: No such file"):
        read_text(str(written(tmp_path, train=LINES)))


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "it.txt").write_text(content)
    with pytest.raises(BilevelError, match=r"it\.txt is empty"):
        read_text(str(tmp_path / "it.txt"))


def test_another_encoding(tmp_path):
    (tmp_path / "it.txt").write_bytes("die Brücke".encode("latin1"))
    with pytest.raises(
        BilevelError, match="is not UTF-8, because byte 6 is 0xfc; convert it first"
    ):
        read_file(tmp_path / "it.txt")


def test_a_text_too_short_to_split():
    with pytest.raises(BilevelError, match="it is too short, because its valid split has no word"):
        split_prose("a few words alone", "it")


def test_a_vocabulary_without_room():
    with pytest.raises(BilevelError, match="vocabulary_size=2 leaves no place"):
        number_words(Text(["a"], ["a"], ["a"], tokenized=True), 2)


def test_a_sequence_shorter_than_the_batch():
    with pytest.raises(
        BilevelError, match="the valid split has 20 tokens, which is too few for 5 rows of 4"
    ):
        Windows(torch.arange(20), 5, 4, name="valid")
    Windows(torch.arange(21), 5, 4)


@pytest.mark.parametrize(("options", "name"), [((0, 5), "batch_size"), ((5, 0), "bptt")])
def test_sizes_below_one(options, name):
    with pytest.raises(BilevelError, match=f"{name}=0 must be a whole number of at least 1"):
        Windows(torch.arange(50), *options)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "sentence"),
    [
        (["a", "b"], 50, "checkpoint has 3 words and this text 2"),
        (["a", "b", "d"], 50, "checkpoint has other words"),
        (["a", "b", "c"], 40, "has 50 tokens, and this one has 40"),
    ],
)
def test_a_checkpoint_of_another_text(vocabulary, tokens, sentence):
    state = Windows(torch.arange(50), 2, 5, vocabulary=["a", "b", "c"]).state_dict()
    with pytest.raises(BilevelError, match=sentence):
        Windows(torch.arange(tokens), 2, 5, vocabulary=vocabulary).load_state_dict(state)
