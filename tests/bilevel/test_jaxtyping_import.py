"""A folder with the name of an optional package lies beside the user."""

import subprocess
import sys

import pytest

from bilevel.jaxtyping_import import _is_installed


@pytest.mark.skipif(_is_installed("typeguard"), reason="typeguard is installed")
def test_a_folder_named_typeguard_is_no_package(tmp_path):
    (tmp_path / "typeguard").mkdir()
    (tmp_path / "typeguard" / "notes.txt").touch()
    code = "import sys, bilevel; assert 'typeguard' not in sys.modules; import typeguard"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
