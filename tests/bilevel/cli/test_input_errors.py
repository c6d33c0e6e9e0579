"""Every kind of bad input gives one sentence on the standard error, status 1, and no files."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import MissingConfigException

from bilevel.cli.app import main
from bilevel.cli.input_errors import sentence

QUICK = (
    "wandb.mode=disabled",
    "runner.progress=none",
    "runner.picture=false",
    "problem=quadratic",
    "runner.epochs=2",
)

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to be resumed; tests that spoil it take a copy."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert main([*QUICK, "solver=fixed", f"hydra.run.dir={directory}"]) == 0
    return directory


def refused(capfd, *arguments: str) -> str:
    """The sentence that the command line ends with."""
    assert main(list(arguments)) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("bilevel: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["problem=null"], "`problem=null` is not the name of a choice; write problem=NAME"),
        (["logger=1"], "`logger=1` is not the name of a choice"),
        (["+experiment=null"], "`+experiment=null` is not the name of a choice"),
        (
            ["solver.inner_optimizer._partial_=maybe"],
            "solver.inner_optimizer._partial_='maybe' is a str",
        ),
        (
            ["solver._target_=builtins.dict"],
            "solver._target_=builtins.dict makes a dict; give the dotted path of a Solver",
        ),
        (
            ["solver=unrolled", "solver.mode={_target_: bilevel.solvers.Reverse, _partial_: true}"],
            "solver.mode makes a partial; give Mode",
        ),
        (
            ["experiment=mnist_mlp"],
            "no experiment is chosen by default, so that the override adds one; write +exp",
        ),
        (["epochs=10"], "`epochs` is not a key at the top level; write runner.epochs=…"),
        (["lr=0.1"], "group of settings; set lr.inner for w, or lr.outer for λ"),
        (["solver.lr=0.1"], "of its target; set lr.inner for w, or lr.outer for λ"),
        (["wandb=disabled"], "write wandb.mode=offline, online or disabled"),
        (["--epochs", "10"], "--epochs is not a flag; settings have the form key=value, write run"),
        (["--lr=0.1"], "write lr.inner=… or lr.outer=…"),
        (["--mulitrun"], "--mulitrun is not a flag (did you mean `multirun`?)"),
        (["solver.inner_optimizer=adan"], "is no optimizer of PyTorch (did you mean"),
        (["problem=digit"], "problem=digit does not exist (did you mean `digits`"),
        (["seed=18446744073709551616"], "has more than 64 bits; choose a seed"),
        (["~solver=true"], "is not the name of a choice; write ~solver"),
        (["solver=delta-stn"], "solver=delta-stn does not exist (did you mean `delta_stn`"),
        (["sed=3"], "`sed` is not a key (did you mean `seed`"),
        (["data.rot=here"], "`rot` is not a key of data (did you mean `root`"),
        (
            ["solver.linearise=false"],
            "solver.linearise is not a setting of its target (did you mean `linearize`",
        ),
        (["runner.epoch=3"], "runner.epoch is not a setting of its target (did you mean `epochs`"),
        (["wandb.mod=online"], "wandb.mod is not a setting of its target (did you mean `mode`"),
        (
            ["solver.inner_optimizer.learning_rate=1"],
            "solver.inner_optimizer.learning_rate is not a setting of its target",
        ),
        (
            ["solver._target_=bilevel.solvers.delta_stn", "solver.linearise=false"],
            "did you mean `linearize`",
        ),
        (["problem.space.hypr.init=1"], "hyperparameter `hypr` is unknown (did you mean `hyper`"),
        (["problem.space.hyper.ini=1"], "ini=1 is an unknown field (did you mean `init`"),
        (["problem.space.hyper=0.5"], "write hyper.init=0.5"),
        (["problem.space.hyper.shape=3"], "the problem fixes the shape [3]"),
        (["problem.space.hyper.frozen=maybe"], "frozen='maybe' must be true or false"),
        (["problem.space=0.5"], "must map names of hyperparameters to changes"),
        (["foo"], "`foo` is not an override; write key=value"),
        (["seed==3"], "`seed==3` is not an override"),
        (["seed=1,2"], "add -m to run each"),
        (["~nothing"], "does not exist"),
        (["seed=abc"], "seed='abc' is a str; give int"),
        (["seed=true"], "seed=True is a bool; give int"),
        (["seed=null"], "seed=null must have a value; give int"),
        (["runner.epochs=many"], "runner.epochs='many' is a str; give float or null"),
        (["solver.linearize=maybe"], "solver.linearize='maybe' is a str; give bool"),
        (["solver.inner_optimizer.lr=fast"], "solver.inner_optimizer.lr='fast' is a str"),
        (["solver.inner_steps=-1"], "solver.inner_steps=-1 must be a whole number of at least 1"),
        (
            ["solver=unrolled", "solver.mode=0"],
            "solver.mode=0 is an int; give Mode, as {_target_: …}",
        ),
        (["solver=unrolled", "~solver.mode._target_"], "solver.mode makes a dict; give Mode"),
        (
            ["solver=unrolled", "solver.mode.truncate=[1]"],
            "solver.mode.truncate=[1] is a list; give int or null",
        ),
        (
            ["solver=unrolled", "solver.clip_norm=nan"],
            "solver.clip_norm=nan must be positive and finite",
        ),
        (
            ["solver=implicit_cg", "solver.linear_solve=neumann"],
            "solver.linear_solve='neumann' is a str; give LinearSolve",
        ),
        (
            [
                "solver=implicit_cg",
                "solver.curvature={_target_: bilevel.solvers.Identity, damping: 1}",
            ],
            "solver.curvature.damping is not a setting",
        ),
        (
            ["solver=implicit_cg", "solver.linear_solve._target_=bilevel.solvers.Neumann"],
            "or remove it with '~solver.linear_solve.iterations'",
        ),
        (["solver=implicit_cg", "solver.batches=true"], "solver.batches=True is a bool"),
        (
            ["solver=implicit_cg", "solver.stationarity=nan"],
            "solver.stationarity=nan must be at least 0",
        ),
        (["solver=implicit_neumann", "solver.linear_solve.step=1e30"], "is above 2/L"),
        (["solver=sama", "solver.alpha=inf"], "solver.alpha=inf must be positive and finite"),
        (["solver=es", "solver.spread=0"], "solver.spread=0 must be positive and finite"),
        (["solver=pbt", "solver.interval=inf"], "solver.interval=inf must be positive and finite"),
        (["solver=pbt", "solver.resample=2"], "solver.resample=2 must be between 0 and 1"),
        (
            ["solver=random_search", "solver.sampler={_target_: bilevel.solvers.Median}"],
            "solver.sampler makes a Median; give Sampler",
        ),
        (
            [
                "solver=unrolled",
                *(f"problem.space.{m}={{optimizer: momentum, init: 0.5}}" for m in "ab"),
            ],
            "`a` and `b` both set the momentum of the inner optimizer",
        ),
        (["solver.centered=false"], "solver.linearize=True needs centered=True"),
        (["runner.epochs=0"], "runner.epochs=0 must be positive and finite"),
        (["runner.device=abacus"], "abacus"),
        (["wandb.mode=offlin"], "(did you mean `offline`"),
        (["problem.space.hyper.scale=-1"], "scale=-1 must be positive"),
        (["problem._target_=bilevel.problems.Quadradic"], "cannot be imported"),
        (["problem._target_=nowhere.Toy"], "No module named 'nowhere'"),
        (["problem._target_=torch.pi"], "is a float; give the dotted path"),
        (["~problem._target_"], "problem has no _target_; give problem._target_="),
        (["--config-dir", "nowhere"], "not found; give --config-dir a directory that exists"),
        (["hydra.run.dir=file/run"], "file/run cannot be used (Not a directory)"),
        (["hydra.run.dir=/proc/run"], "/proc/run cannot be used"),
        (["-m", "resume=file"], "leave -m out"),
        (["seed=${sed}"], "'sed' not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_sentence_and_nothing_left(capfd, arguments, words):
    Path("file").touch()
    assert words in refused(capfd, *QUICK, *arguments)
    left = [path for path in Path.cwd().rglob("*") if path.name not in ("file", "runs")]
    assert not left


def test_an_initial_value_on_the_edge_of_its_interval(capfd):
    assert "lies on the edge" in refused(capfd, "problem=digits", "problem.space.dropout1.init=0")


def test_a_frozen_value_outside_its_domain(capfd):
    override = "problem.space.dropout1={init: 7, frozen: true}"
    assert "init=7 lies outside (0, 0.95)" in refused(capfd, "problem=digits", override)


def test_a_site_that_the_network_has_not(capfd):
    said = refused(
        capfd, "problem=digits", "problem.hidden=[64]", "problem.space.dropout2.init=0.1"
    )
    assert "hyperparameter `dropout2` is unknown (did you mean `dropout1`" in said


def test_a_batch_larger_than_the_split(capfd):
    assert "batch_size=100000 must be between 1 and" in refused(
        capfd, "problem=digits", "problem.batch_size=100000", *QUICK[:3]
    )


def test_a_constructor_that_fails_is_named(capfd):
    Path("conf/problem").mkdir(parents=True)
    Path("conf/problem/broken.yaml").write_text("_target_: brokenbox.Broken\n")
    Path("brokenbox.py").write_text("def Broken():\n    raise ValueError('no data here')\n")
    said = refused(capfd, "--config-dir", "conf", "problem=broken")
    sys.modules.pop("brokenbox", None)
    assert "problem._target_=brokenbox.Broken raised ValueError: no data here" in said


def test_a_module_that_fails_to_import_is_not_called_missing(capfd):
    Path("halfbox.py").write_text("import nowhere_to_be_found\n")
    assert "No module named 'nowhere_to_be_found'" in refused(
        capfd, *QUICK, "problem._target_=halfbox.Toy"
    )


def test_the_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="lineraize"):
        main([*QUICK, "solver.lineraize=true"])


def test_an_error_that_nothing_explains_is_a_sentence_with_its_place(capfd):
    Path("bugbox.py").write_text(
        "from bilevel.problems import Quadratic\n"
        "def Buggy():\n"
        "    problem = Quadratic.random(weights=2, hypers=1)\n"
        "    problem.outer_objective = None\n"
        "    return problem\n"
    )
    said = refused(
        capfd, *QUICK, "~problem", "+problem={_target_: bugbox.Buggy}", "names.problem=buggy"
    )
    sys.modules.pop("bugbox", None)
    assert "TypeError: 'NoneType' object is not callable" in said
    assert "line " in said
    assert "HYDRA_FULL_ERROR=1" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seed=1"], "seed=1 differs from 0 in"),
        (["solver=stn"], "solver=stn differs from fixed in"),
        (["solver.inner_steps=7"], "solver.inner_steps=7 differs from 5 in"),
        (
            ["problem.space.hyper.init=0.5"],
            "problem.space.hyper.init=0.5 differs from its default in",
        ),
        (
            ["runner.threads=2"],
            "runner.threads=2 differs from its default in",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_resumed_run_keeps_its_settings(capfd, finished, arguments, words):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    said = refused(capfd, f"resume={finished}", "problem=quadratic", *arguments)
    assert words in said
    assert str(finished) in said
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def no_checkpoint(run: Path) -> None:
    for file in run.glob("checkpoint*.pt"):
        file.unlink()


def truncated(run: Path) -> None:
    for file in run.glob("checkpoint*.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(run: Path) -> None:
    for file in run.glob("checkpoint*.pt"):
        torch.save({"w": torch.zeros(3)}, file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_checkpoint, "is not a run, since it has no checkpoint.pt"),
        (truncated, "is truncated"),
        (foreign, "is not a checkpoint of bilevel"),
        (shutil.rmtree, "is not a directory"),
    ],
)
def test_what_is_no_run_is_not_resumed(capfd, finished, spoil, words):
    run = Path(shutil.copytree(finished, "copy"))
    spoil(run)
    before = {path.name: path.read_bytes() for path in run.iterdir()} if run.exists() else None
    assert words in refused(capfd, "resume=copy")
    assert (
        {path.name: path.read_bytes() for path in run.iterdir()} if run.exists() else None
    ) == before


def test_a_directory_that_holds_a_run_is_not_overwritten(capfd, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert "already holds a run" in refused(capfd, *QUICK, f"hydra.run.dir={finished}")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_problem_in_a_folder_with_our_name_is_told_why_it_is_not_found(capfd):
    Path("bilevel").mkdir()
    Path("bilevel/mine.py").touch()
    assert "rename " in refused(capfd, *QUICK, "problem._target_=bilevel.mine.Toy")


@pytest.mark.parametrize(
    ("launcher", "extra"), [("joblib", "joblib"), ("submitit_slurm", "submitit")]
)
def test_a_launcher_that_is_not_installed_names_its_extra(launcher, extra):
    name = f"hydra/launcher/{launcher}"
    error = MissingConfigException("not found", missing_cfg_file=name, options=["basic"])
    said = sentence(error)
    assert said == (
        f"hydra/launcher={launcher} is not installed; run `pip install 'bilevel[{extra}]'`"
    )
