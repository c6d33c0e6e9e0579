"""The code of the README and of the documentation runs, and the links lead somewhere."""

import re
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = {"__name__": page.stem}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), shared)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_list_of_mutants_is_complete():
    page = (ROOT / "docs" / "mutants.md").read_text()
    listed = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| ")]
    assert [["| " + mutant.name, f"`{mutant.file}`"] for mutant in MUTANTS] == listed[1:]


def test_no_mutant_is_out_of_date():
    assert [mutant.name for mutant in MUTANTS if (ROOT / mutant.file).read_text().count(mutant.old) != 1] == []
