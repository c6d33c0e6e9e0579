"""Run the code and check the commands and links of README and docs; build the site."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

import bilevel
from bilevel import problems, solvers
from bilevel.cli import input_errors, targets
from bilevel.cli.app import OPEN_GROUPS, add_resolvers, prepared
from bilevel.cli.compare import parser
from bilevel.solvers.response import per_example_weight
from tests.mutants import MUTANTS, table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # A page may register a rule that other tests expect to be missing.
    monkeypatch.setattr(per_example_weight, "RULES", dict(per_example_weight.RULES))
    shared = {"__name__": page.stem}
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), start=1
    ):
        exec(compile(block, f"{page.name}, block {number}", "exec"), shared)


def test_a_script_is_tuned_by_at_most_ten_lines_outside_its_model():
    _, script, tuned, *_ = re.findall(
        r"```python\n(.*?)```", (DOCS / "from-my-script.md").read_text(), re.DOTALL
    )
    new = [line for line in tuned.splitlines() if line not in script.splitlines()]
    assert 0 < len(new) <= 10
    model = script[script.index("class Net") : script.index("with open")]
    assert model in tuned


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_symlinks_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command line, without those that have a place to fill in.

    Command lines stand in indented blocks and in fences marked `sh`.
    """
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    command = r"((?:bilevel|bilevel-compare|make|python -m)(?: .*)?)$"
    for line in (
        *re.findall(rf"^    {command}", indented, re.MULTILINE),
        *re.findall(rf"^ *{command}", fenced, re.MULTILINE),
    ):
        line = re.sub(r"\s+#.*$", "", line)
        if not any(place in line for place in ("…", "DIR")):
            yield shlex.split(re.sub(r"\[-.*?\]", "", line))


def composed(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the configurations of a command line: each value of a sweep at least once."""
    add_resolvers()
    given = [
        input_errors.parse(argument)
        for argument in prepared(arguments)
        if not argument.startswith("-")
    ]
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in given
    ]
    first = [each[0] for each in values]
    for overrides in {
        tuple(first),
        *((*first[:i], v, *first[i + 1 :]) for i, each in enumerate(values) for v in each[1:]),
    }:
        config = compose("config", overrides=list(overrides))
        yield {
            node: OmegaConf.to_container(config[node], resolve=True)
            for node in OPEN_GROUPS
            if node in config
        }


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if list(commands(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_exist(page):
    """Each name exists, and the constructors take every setting of a `bilevel` line."""
    targets_of_make = re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    with initialize_config_module("bilevel.conf", version_base="1.3"):
        for program, *words in commands(page):
            if program == "make":
                assert words[0] in " ".join(targets_of_make).split(), words
            elif program == "python":
                assert importlib.util.find_spec(words[1]), words
            elif program == "bilevel-compare":
                parser().parse_args(words)
            elif words[:1] == ["log"]:
                assert list(composed([word for word in words[1:] if "=" in word]))
            elif "--help" not in words:
                for config in composed(words):
                    for node, value in config.items():
                        targets.check(value, node)


def test_the_help_opens_with_ten_overrides_that_compose():
    """Each line has one command; its names exist, and the constructors take its settings.

    The digits need no download, so this problem is made too: it checks the names in its space.
    """
    config = OmegaConf.load(ROOT / "bilevel" / "conf" / "config.yaml")
    text = OmegaConf.to_container(config)["hydra"]["help"]["template"]
    opening, listed = text.split("Ten overrides that people use")
    lines = re.findall(r"^  bilevel (.*?)(?:  .*)$", listed.partition("More")[0], re.MULTILINE)
    assert len(lines) == 10
    assert opening.count("\n") < 6
    with initialize_config_module("bilevel.conf", version_base="1.3"):
        for line in lines:
            for made in composed(shlex.split(line)):
                for node, value in made.items():
                    targets.check(value, node)
                if made["problem"]["_target_"] == "bilevel.problems.digits":
                    instantiate(made["problem"], _convert_="all")


def test_a_wrong_command_is_seen():
    with initialize_config_module("bilevel.conf", version_base="1.3"):
        assert len(list(composed(["-m", "solver=fixed,stn,delta_stn", "seed=0,1"]))) == 4
        (config,) = composed(["solver=stn", "solver.speed=3"])
        with pytest.raises(bilevel.BilevelError, match="speed"):
            targets.check(config["solver"], "solver")


def test_the_list_of_mutants_is_complete():
    assert table() in (DOCS / "mutants.md").read_text(), "python -m tests.mutants --table prints it"


def test_no_mutant_is_out_of_date():
    """The text of each mutant stands once in its file, and its tests exist."""
    assert [
        mutant.name for mutant in MUTANTS if (ROOT / mutant.file).read_text().count(mutant.old) != 1
    ] == []
    tests = {test for mutant in MUTANTS for test in mutant.tests.split()}
    assert [test for test in tests if not (ROOT / "tests" / test).is_file()] == []


def leaves(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation: lists of pages, and of titles with a page or a list."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(part)


def test_every_page_is_in_the_navigation_once():
    listed = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = [page for kind in ("md", "ipynb") for page in DOCS.glob(f"**/*.{kind}")]
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in pages)


@pytest.mark.parametrize(
    "package", [bilevel, problems, solvers], ids=lambda package: package.__name__
)
def test_every_public_name_is_in_the_reference(package):
    page = (DOCS / "api" / f"{package.__name__.rpartition('.')[2]}.md").read_text()
    listed = re.findall(rf"^::: ({package.__name__}\.[\w.]+)$", page, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert set(package.__all__) - {path.rpartition(".")[2] for path in listed} == set()


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    """Check links, pictures, navigation and every `Args:` section; no other host is used."""
    pytest.importorskip("material", reason="needs the `docs` extra")
    pytest.importorskip("mkdocstrings", reason="needs the `docs` extra")
    # not --quiet: warnings that are not shown are not counted, and strict mode would let them pass
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.glob("**/*.html"):
        text = page.read_text()
        assert (
            re.findall(
                r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?((?:https?:)?//[^\" ]+)", text
            )
            == []
        ), page
        assert not re.search(
            r"<p>(?:::: |&gt;&gt;&gt; |--8&lt;--)|<blockquote>\s*<blockquote>", text
        ), page
    reference = (tmp_path / "api" / "solvers.html").read_text()
    assert 'id="bilevel.solvers.delta_stn"' in reference
    assert "w₀ trained apart" in reference
