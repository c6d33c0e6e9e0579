"""Tests of folders of images: splits, sizes, memory and bad folders."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from bilevel import DataWarning
from bilevel.cli.app import main
from bilevel.problems.datasets import free_memory, labelled_images
from bilevel.problems.datasets.duplicate_files import warn_of_duplicates
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.image_folder import class_files, load_image_folder
from bilevel.problems.datasets.labelled_images import Images
from tests.support.image_data import pixels, refused, save


def test_a_folder_is_split_by_class_and_read_bit_for_bit(pngs):
    images = load_image_folder(str(pngs), valid_fraction=0.25, test_fraction=0.2)
    assert isinstance(images, Images)
    counts = [labels.bincount(minlength=3).tolist() for _, labels in images[:3]]
    assert counts == [[12, 7, 5], [4, 2, 2], [4, 3, 1]] or [sum(c) for c in counts] == [24, 8, 8]
    assert [sum(column) for column in zip(*counts, strict=True)] == [20, 12, 8]
    theirs = torchvision.datasets.ImageFolder(str(pngs))
    known = {
        bytes(np.asarray(image).transpose(2, 0, 1).tobytes()): label for image, label in theirs
    }
    read = [
        (bytes(x.numpy().tobytes()), int(y))
        for part in images[:3]
        for x, y in zip(*part, strict=True)
    ]
    assert dict(read) == known
    assert len(read) == len(known) == 40
    assert images.mean == labelled_images.channel_moments(images.train[0])[0]
    assert (images.classes, images.shape, images.brightest) == (3, (3, 10, 10), 255.0)
    assert not torch.equal(
        load_image_folder(str(pngs), split_seed=1).train[1], load_image_folder(str(pngs)).train[1]
    )


def test_folders_of_their_own_are_taken_as_they_are(pngs, tmp_path):
    parted = tmp_path / "parted"
    for part in ("train", "val", "test"):
        shutil.copytree(pngs, parted / part)
    with pytest.warns(DataWarning, match=r"occur in more than one split \(80 copies\)"):
        images = load_image_folder(str(parted))
    assert [len(labels) for _, labels in images[:3]] == [40, 40, 40]
    assert len(set(images.train[1][:12].tolist())) == 3  # in random order
    shutil.rmtree(parted / "val")
    shutil.rmtree(parted / "test")
    images = load_image_folder(str(parted), valid_fraction=0.2)
    assert ([len(images.train[1]), len(images.valid[1])], images.test) == ([32, 8], None)
    assert load_image_folder(str(pngs), test_fraction=0.0).test is None


def test_images_are_brought_to_a_size(tmp_path):
    save(tmp_path / "wide", pixels(4, 3, 12, 30))
    save(tmp_path / "tall", pixels(4, 3, 20, 15))
    with refused(r"has \d+ × \d+ pixels of 3 channels, and .* set size=PIXELS"):
        load_image_folder(str(tmp_path))
    images = load_image_folder(str(tmp_path), size=8, test_fraction=0.0, valid_fraction=0.25)
    assert images.shape == (3, 8, 8)
    import torchvision.transforms.functional as TF

    with Image.open(tmp_path / "wide" / "000.png") as image:
        wanted = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 8), 8))
    assert any(torch.equal(x, wanted) for part in images[:2] for x in part[0])


def test_folders_are_decoded_where_they_fit(pngs, monkeypatch):
    nbytes = 40 * 300
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2 * nbytes)
    assert isinstance(load_image_folder(str(pngs)), Images)
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2 * nbytes - 1)
    assert isinstance(load_image_folder(str(pngs)), ImageFiles)
    with refused(
        r"in_memory=true needs 11\.7 KiB for the images of .*animals, .* lower size, or set"
    ):
        load_image_folder(str(pngs), in_memory=True)
    with refused("in_memory='yes' is unknown; choose auto, true or false"):
        load_image_folder(str(pngs), in_memory="yes")


def test_a_bad_folder_is_one_sentence(pngs, tmp_path):
    with refused(r"path='.*nowhere' is not a folder; give a folder with one subfolder per class"):
        load_image_folder(str(tmp_path / "nowhere"))
    with refused(r"ant has no subfolder; put the images of each class into one"):
        load_image_folder(str(pngs / "ant"))
    (pngs / "dog").mkdir()
    with refused(r"dog is a class without an image \(\.bmp, .*add images, or delete the folder"):
        load_image_folder(str(pngs))
    (pngs / "dog").rmdir()
    with refused(r"channels=2 is not possible; choose 1 \(grey\), 3"):
        load_image_folder(str(pngs), channels=2)
    with refused("size=0 must be a whole number of at least 1; choose a number of pixels"):
        load_image_folder(str(pngs), size=0)
    with refused(r"test_fraction=1.0 must be between 0 and 1"):
        load_image_folder(str(pngs), test_fraction=1.0)
    with refused(r"size=1000000 needs 9,313\.2 GiB to read an image"):
        load_image_folder(str(pngs), size=10**6)
    with refused("workers=-1 must be a whole number of at least 0"):
        load_image_folder(str(pngs), workers=-1)
    for part in ("train", "test"):
        shutil.copytree(pngs, tmp_path / "parted" / part)
    shutil.rmtree(tmp_path / "parted" / "test" / "bee")
    with refused(r"train has 3 classes and .*test has 2, and `bee` is only in train; give all"):
        load_image_folder(str(tmp_path / "parted"))


def test_what_stands_beside_the_parts_is_no_class(pngs, tmp_path):
    parted = tmp_path / "parted"
    for part in ("train", "val", "notes"):
        shutil.copytree(pngs, parted / part)
    with refused(
        r"holds train, with one folder per class, and notes, which is not one of val, valid"
    ):
        load_image_folder(str(parted))
    (parted / "notes").rename(parted / "valid")
    with refused(r"holds validation images in val and in valid; keep one"):
        load_image_folder(str(parted))
    save(pngs / "train", pixels(4, 3, 10, 10, seed=9))  # a class that is called so
    assert load_image_folder(str(pngs)).classes == 4


@pytest.mark.parametrize(
    ("link", "target"), [("ant/up", ".."), ("bee/in", "../bee"), ("bee/other", "../bee/more")]
)
def test_a_folder_that_would_be_read_twice_is_one_sentence(pngs, link, target):
    (pngs / "bee" / "more").mkdir()
    (pngs / link).symlink_to(target)
    with refused(r"is the same folder as \S+, so its images would count twice; delete the link"):
        load_image_folder(str(pngs))


def test_the_command_trains_on_a_folder(pngs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "problem=image_folder",
        f"data.root={pngs}",
        "problem.network=mlp",
        "problem.network_options={hidden: [6]}",
    ]
    arguments += [
        "problem.batch_size=4",
        "runner.epochs=1",
        "runner.warmup_epochs=0",
        "runner.progress=none",
        "logger=jsonl",
    ]
    assert main([*arguments, "runner.picture=false", "hydra.run.dir=it"]) == 0
    assert (tmp_path / "it" / "summary.json").exists()


HIDDEN = ["ant/.ipynb_checkpoints", "ant/deep/.cache", "ant/@eaDir", "__MACOSX/ant", ".git/ant"]


@pytest.mark.parametrize("place", HIDDEN)
@pytest.mark.parametrize("parted", [False, True])
def test_hidden_folders_and_files_are_passed_over(pngs, tmp_path, place, parted):
    root = tmp_path / "parted" / "train" if parted else pngs
    if parted:
        shutil.copytree(pngs, root)
    (root / place).mkdir(parents=True)
    for path in sorted((root / "ant").glob("*.png")):
        shutil.copy(path, root / place / f"{path.stem}-checkpoint.png")
        shutil.copy(path, root / "ant" / f"._{path.name}")
    (root / "._.png").write_text("a leftover")
    images = load_image_folder(str(root.parent if parted else root))
    assert sum(len(part[1]) for part in images[:3] if part is not None) == 40
    assert images.classes == 3


def test_a_hidden_folder_makes_no_class_of_train(pngs, tmp_path):
    (pngs / "train").mkdir()
    shutil.copy(pngs / "ant" / "000.png", pngs / "train" / "it.png")
    (pngs / "train" / ".ipynb_checkpoints").mkdir()
    assert sorted(class_files(pngs)) == ["ant", "bee", "cat", "train"]


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "test"), ("val", "test")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_equal_files_of_two_splits_are_warned_of(tmp_path, parts, in_memory):
    for i, part in enumerate(("train", "val", "test")):
        for j, name in enumerate(("ant", "bee")):
            save(tmp_path / part / name, pixels(6, 3, 8, 8, seed=2 * i + j))
    load_image_folder(str(tmp_path), in_memory=in_memory)  # no warning
    one, other = (tmp_path / part / "ant" for part in parts)
    shutil.copy(one / "003.png", other / "renamed.png")
    with pytest.warns(DataWarning, match=r"occur in more than one split \(1 copies\)") as caught:
        load_image_folder(str(tmp_path), in_memory=in_memory)
    assert len(caught) == 1
    assert "003.png" in str(caught[0].message)
    assert "renamed.png" in str(caught[0].message)


def test_files_of_one_size_and_head_may_differ(tmp_path):
    for i in range(4):
        path = tmp_path / f"{i}.bmp"
        path.write_bytes(b"0" * 5000 + bytes([i // 2]))
    paths = [str(tmp_path / f"{i}.bmp") for i in range(4)]
    warn_of_duplicates({"train": paths[:2], "valid": paths[2:]})
    with pytest.warns(DataWarning, match=r"\(2 copies\), such as .*0\.bmp in train and .*1\.bmp"):
        warn_of_duplicates({"train": paths[::2], "valid": paths[1::2]})
