"""TensorBoard's event files, read back with its own reader; and loggers chosen together."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel import BilevelError, Runner
from bilevel.cli.app import main
from bilevel.loggers.records import read_metrics
from tests.support.fakes import FakeProblem, FakeSolver

pytest.importorskip("tensorboard")

from bilevel.loggers.tensorboard_logger import TensorBoard

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # third parties: tensorboard

QUICK = (
    "problem=quadratic",
    "solver=fixed",
    "solver.inner_steps=1",
    "runner.epochs=6",
    "runner.warmup_epochs=1",
    "runner.evaluate_every=2",
)
QUIET = ("runner.progress=none", "runner.picture=false", "runner.device=cpu")


class Pictured(FakeProblem):
    def pictures(self, hypers, generator):
        return {"augmented": torch.rand(3, 3, 70, 70, generator=generator)}


def run(directory, resume=False, problem=None, solver=None, **settings):
    runner = Runner(
        **{
            "epochs": 3,
            "warmup_epochs": 1,
            "progress": "none",
            "picture": False,
            "device": "cpu",
            **settings,
        }
    )
    return runner.run(
        problem or FakeProblem(),
        solver or FakeSolver(),
        directory=directory,
        names=("fake", "walk"),
        config={"solver": {"rate": 0.05, "names": ["a"]}},
        loggers=[TensorBoard()],
        resume=resume,
    )


def events(directory):
    """Every event that TensorBoard's own loader finds, in the order of its files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((directory / "tensorboard").iterdir())
    return [event for file in files for event in EventFileLoader(str(file)).Load()]


def scalars(directory, tag):
    """Return (step, wall time, value) of every event with the tag."""
    return [
        (event.step, event.wall_time, value.tensor.float_val[0])
        for event in events(directory)
        for value in event.summary.value
        if value.tag == tag
    ]


def tags(directory):
    return {value.tag for event in events(directory) for value in event.summary.value}


def test_a_run_is_there_with_its_axes(tmp_path):
    summary = run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    losses = scalars(tmp_path, "valid/loss")
    assert [step for step, _, _ in losses] == [line["step"] for line in lines]
    assert [value for _, _, value in losses] == pytest.approx(
        [line["valid_loss"] for line in lines]
    )
    relative = [wall - losses[0][1] for _, wall, _ in losses]
    assert relative == pytest.approx(
        [line["seconds"] for line in lines], abs=1e-5
    )  # RELATIVE is training time
    by_examples = scalars(tmp_path, "by_examples/valid_loss")
    assert [step for step, _, _ in by_examples] == [line["examples"] for line in lines]
    assert {
        "hypers/decay",
        "scales/drop",
        "train/accuracy",
        "solver/inner_loss",
        "seconds/evaluation",
        "epoch",
    } <= tags(tmp_path)
    ((_, _, best),) = scalars(tmp_path, "outcome/best/test_loss")
    assert best == pytest.approx(summary["best"]["test_loss"])


def test_settings_stand_beside_the_outcome(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run(tmp_path)
    settings = {}
    for event in events(tmp_path):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                settings |= dict(data.session_start_info.hparams)
    assert settings["solver/rate"].number_value == 0.05
    assert (
        settings["problem"].string_value,
        settings["solver"].string_value,
        settings["seed"].number_value,
    ) == ("fake", "walk", 0)


def test_no_step_of_a_resumed_run_is_there_twice(tmp_path):
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        run(tmp_path, epochs=8, checkpoint_every=4, solver=FakeSolver(hooks={45: fail}))
    killed = [step for step, _, _ in scalars(tmp_path, "valid/loss")]
    run(tmp_path, resume=True, epochs=8)
    losses = scalars(tmp_path, "valid/loss")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [step for step, _, _ in losses] == [line["step"] for line in lines]
    assert len(killed) > 5  # beyond the checkpoint after the fifth evaluation
    relative = [wall - losses[0][1] for _, wall, _ in losses]
    assert relative == pytest.approx([line["seconds"] for line in lines], abs=1e-5)
    assert len(scalars(tmp_path, "outcome/best/valid_loss")) == 1


def test_a_run_that_goes_on_has_its_outcome_once(tmp_path):
    run(tmp_path, epochs=2)
    run(tmp_path, resume=True, epochs=3)
    assert [step for step, _, _ in scalars(tmp_path, "outcome/best/valid_loss")] == [18]
    assert [step for step, _, _ in scalars(tmp_path, "valid/loss")] == [0, 6, 12, 18]


def test_pictures(tmp_path):
    run(tmp_path, problem=Pictured(), epochs=4)
    shown = {
        event.step: value.tensor.string_val  # width, height and the file
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag == "pictures/augmented"
    }
    assert list(shown) == [0, 6, 18]
    pixels = np.asarray(Image.open(io.BytesIO(shown[18][2])))
    draws = torch.rand(3, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    assert pixels.shape == (74, 3 * 72 + 2, 3)
    assert (
        np.abs(pixels[2:72, 74:144].astype(float) - 255 * draws[1].permute(1, 2, 0).numpy()).max()
        <= 1
    )


def test_a_missing_tensorboard_is_one_error(monkeypatch):
    monkeypatch.setattr("bilevel.loggers.tensorboard_logger.find_spec", lambda name: None)
    with pytest.raises(BilevelError, match=r"pip install 'bilevel\[tensorboard\]'"):
        TensorBoard()


# --- loggers chosen together, on the command line ---


def left():
    (directory,) = Path("runs").iterdir()
    return {name for name in ("wandb", "tensorboard") if (directory / name).exists()}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ([], {"wandb"}),
        (["logger=tensorboard"], {"tensorboard"}),
        (["logger=[wandb,tensorboard]"], {"wandb", "tensorboard"}),
        (["logger=jsonl"], set()),
        (["logger=[]"], set()),
        (
            ["logger=[wandb,tensorboard]", "wandb.mode=disabled", "tensorboard.flush_seconds=5"],
            {"tensorboard"},
        ),
        (["loggers.wandb=false"], set()),
    ],
)
def test_loggers_compose(choice, names):
    assert main([*QUICK, *QUIET, *choice]) == 0
    assert left() == names
    (directory,) = Path("runs").iterdir()
    assert len(read_metrics(directory / "metrics.jsonl")) == 4


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            ["logger=tensorboard", "wandb.mode=online"],
            "add it, logger=[tensorboard,wandb], or leave wandb.… out",
        ),
        (["logger=tensorbord"], "(did you mean `tensorboard`"),
        (["logger=tensorboard", "tensorboard.flush_second=3"], "(did you mean `flush_seconds`"),
        (["loggers.mine=true"], "`mine` is not a key of loggers"),
        (["++loggers.mine=true"], "mine has no _target_"),
        (
            ["loggers=3"],
            "loggers=3 does not name loggers; write loggers.NAME=true or false",
        ),
        (["loggers.wandb=maybe"], "loggers.wandb='maybe' is a str; give bool"),
        (
            ["+mine._target_=tests.support.fakes.FakeProblem", "+loggers.mine=true"],
            "give the dotted path of a subclass of bilevel.loggers.logger.Logger",
        ),
    ],
)
def test_a_choice_of_loggers_that_cannot_be_is_one_sentence(choice, words, capfd):
    assert main([*QUICK, *QUIET, *choice]) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.usefixtures("elsewhere")
def test_a_resumed_run_may_have_other_loggers():
    assert main([*QUICK, *QUIET, "logger=jsonl", "hydra.run.dir=r"]) == 0
    assert main(["resume=r", "runner.epochs=8", "logger=tensorboard"]) == 0
    assert [step for step, _, _ in scalars(Path("r"), "valid/loss")] == [8]
    assert main(["resume=r", "runner.epochs=10"]) == 0
    assert [step for step, _, _ in scalars(Path("r"), "valid/loss")] == [8, 10]
    assert main(["resume=r", "runner.epochs=12", "logger=jsonl"]) == 0
    assert [step for step, _, _ in scalars(Path("r"), "valid/loss")] == [8, 10]
    assert [line["step"] for line in read_metrics("r/metrics.jsonl")] == [0, 2, 4, 6, 8, 10, 12]


def test_a_folder_named_tensorflow_is_no_package(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "notes.txt").touch()
    command = [*QUICK, *QUIET, "logger=tensorboard", "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "bilevel", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "run" / "tensorboard").iterdir())
