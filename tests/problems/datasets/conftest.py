"""Provide a folder of images to the tests of the data sets."""

import pytest

from tests.support.image_data import pixels, save


@pytest.fixture
def pngs(tmp_path):
    """Write three classes of 20, 12 and 8 color images of 10 × 10 pixels, without loss."""
    root = tmp_path / "animals"
    for label, (name, count) in enumerate({"ant": 20, "bee": 12, "cat": 8}.items()):
        save(root / name, pixels(count, 3, 10, 10, seed=label))
    return root
