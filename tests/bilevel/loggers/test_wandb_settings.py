"""Settings of W&B from the user and the environment; and no network at all when offline."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bilevel import BilevelError
from bilevel.cli.app import main
from bilevel.loggers.logger import Place
from bilevel.loggers.wandb_logger import WandB
from bilevel.loggers.wandb_settings import id_from_environment
from tests.support import runs
from tests.support.wandb_files import of_kind, read_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # third parties

QUICK = (
    "problem=quadratic",
    "solver=fixed",
    "runner.progress=none",
    "runner.picture=false",
    "runner.epochs=1",
    "runner.warmup_epochs=0",
)


@pytest.fixture(autouse=True)
def new_session(monkeypatch):
    """W&B reads the environment once a session."""
    import wandb

    for name in list(os.environ):
        if name.startswith("WANDB_") and name != "WANDB_SERVICE":  # its process may end in between
            monkeypatch.delenv(name)
    monkeypatch.setattr("bilevel.loggers.wandb_settings._used_ids", set())
    yield
    wandb.teardown()


def begun(directory):
    """Return what W&B's files hold about the beginning of each run, in order of time."""
    files = sorted(directory.rglob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    deadline = time.monotonic() + 10
    while not all(of_kind(read_file(file), "exit") for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [of_kind(read_file(file), "run")[0] for file in files]


def run(directory, logger=None, **settings):
    import wandb

    wandb.teardown()
    runs.run(directory, loggers=[logger or WandB()], epochs=2, **settings)
    return begun(directory)[-1]


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("baseline", ["baseline"]),
        ("first, second", ["first", "second"]),
        ([1, 2.5], ["1", "2.5"]),
        (7, ["7"]),
        (("one", "one"), ["one"]),
        (None, []),
    ],
)
def test_tags_arrive_as_they_were_meant(tmp_path, tags, wanted):
    found = list(run(tmp_path, WandB(tags=tags)).tags)
    assert [tag for tag in found if tag not in ("FakeProblem", "FakeSolver")] == wanted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tags": {"a": 1}}, r"wandb\.tags={'a': 1} must be a list of tags; write wandb\.tags=\["),
        ({"tags": [True]}, r"wandb\.tags=True must be text or a number; write"),
        ({"tags": [["a"]]}, r"wandb\.tags=\['a'\] must be text or a number"),
        ({"tags": ["a", ""]}, r"wandb\.tags='' must have 1 to 64 characters"),
        ({"tags": ["x" * 65]}, r"must have 1 to 64 characters; choose a shorter tag"),
        ({"tags": True}, r"wandb\.tags=True must be a list of tags"),
        (
            {"project": "team/project"},
            r"wandb\.project='team/project' must be the name of a project alone; "
            r"set wandb\.entity=team and wandb\.project=project",
        ),
        ({"project": "a:b"}, r"wandb\.project='a:b' must not contain any of / \\ # \? % :"),
        ({"project": "/a/"}, r"must not contain any of"),
        ({"project": ""}, r"wandb\.project='' must have 1 to 128 characters"),
        ({"project": ["a"]}, r"wandb\.project=\['a'\] must be text"),
        ({"entity": "team/project"}, r"wandb\.entity='team/project' must be the name of a user"),
        ({"name": "x" * 129}, r"wandb\.name=.* must have 1 to 128 characters"),
        ({"group": {}}, r"wandb\.group={} must be text; give a name, or null"),
        ({"job_type": False}, r"wandb\.job_type=False must be text"),
    ],
)
def test_a_setting_that_wandb_does_not_take_is_one_sentence(settings, words):
    with pytest.raises(BilevelError, match=words):
        WandB(**settings)


def test_the_remedy_of_a_team_in_the_project_works(tmp_path):
    found = run(tmp_path, WandB(entity="team", project="project"))
    assert (found.entity, found.project) == ("team", "project")


def test_numbers_are_names(tmp_path):
    found = run(tmp_path, WandB(project=2026, name=7, group=1, job_type=2))
    names = found.project, found.display_name, found.run_group, found.job_type
    assert names == ("2026", "7", "1", "2")


def test_variables_of_the_environment_give_what_is_not_set(tmp_path, monkeypatch):
    given = {
        "PROJECT": "theirs",
        "ENTITY": "team",
        "NAME": "named",
        "RUN_GROUP": "grouped",
        "JOB_TYPE": "typed",
        "TAGS": "one,two",
        "NOTES": "noted",
        "SILENT": "true",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found = run(tmp_path / "theirs")
    names = found.project, found.entity, found.display_name, found.run_group, found.job_type
    assert names == ("theirs", "team", "named", "grouped", "typed")
    assert list(found.tags) == ["FakeProblem", "FakeSolver", "one", "two"]
    assert found.notes == "noted"
    own = run(tmp_path / "own", WandB(project="ours", name="mine", group="g", tags="three"))
    assert (own.project, own.display_name, own.run_group) == ("ours", "mine", "g")
    assert list(own.tags) == ["FakeProblem", "FakeSolver", "three", "one", "two"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WANDB_PROJECT", "team/project", "WANDB_PROJECT='team/project' must be the name of a"),
        ("WANDB_TAGS", "a," + "x" * 65, "WANDB_TAGS='x+' must have 1 to 64 characters"),
        ("WANDB_RUN_ID", "a/b", "WANDB_RUN_ID='a/b' must have at most 64 characters and none of"),
        ("WANDB_RESUME", "perhaps", "W&B does not take its settings .*WANDB_… variables"),
    ],
)
def test_a_variable_that_wandb_does_not_take_is_one_sentence(
    tmp_path, monkeypatch, name, value, words
):
    monkeypatch.setenv(name, value)
    with pytest.raises(BilevelError, match=words):
        run(tmp_path)


def test_a_variable_without_effect_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_MODE", "online")
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        run(tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if record.name.startswith("bilevel")]
    assert [message.split(" ")[0].split("=")[0] for message in told] == ["WANDB_MODE", "WANDB_DIR"]
    assert not (tmp_path / "elsewhere").exists()


def test_an_id_of_the_environment_is_that_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert run(tmp_path / "first").run_id == "mine"
    second = run(tmp_path / "second").run_id
    assert second != "mine"
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    monkeypatch.setenv("WANDB_RESUME", "must")
    assert run(tmp_path / "second", resume=True, checkpoint_every=1).run_id == second


@pytest.mark.parametrize("resume", ["must", "never", "auto", "allow"])
def test_an_id_of_its_own_needs_no_setting_of_resumption(tmp_path, monkeypatch, resume):
    monkeypatch.setenv("WANDB_RESUME", resume)
    assert run(tmp_path / "first").run_id != run(tmp_path / "second").run_id


def test_runs_of_a_sweep_have_ids_of_their_own(monkeypatch, elsewhere):
    monkeypatch.setenv("WANDB_RUN_ID", "shared")
    assert main(["-m", *QUICK, "seed=0,1", "wandb.tags=baseline"]) == 0
    found = begun(Path("sweeps"))
    assert len({record.run_id for record in found} - {"shared"}) == 2
    assert all("baseline" in record.tags for record in found)


def test_a_process_for_each_run_of_a_sweep_takes_no_shared_id(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "shared")
    assert id_from_environment(in_sweep=Place("s", 1, 2) is not None) is None
    assert id_from_environment(in_sweep=False) == "shared"
    assert id_from_environment(in_sweep=False) is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("wandb.project=team/project", "set wandb.entity=team and wandb.project=project"),
        ("wandb.tags={a: 1}", "must be a list of tags"),
    ],
)
def test_the_command_line_ends_with_the_sentence(capfd, elsewhere, setting, words):
    assert main([*QUICK, setting]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("setting", "wanted"), [("wandb.tags=baseline", "baseline"), ("wandb.tags=[1,2]", "1")]
)
def test_the_command_line_takes_a_tag(elsewhere, setting, wanted):
    assert main([*QUICK, setting]) == 0
    (found,) = begun(Path("runs"))
    assert wanted in found.tags


class Recording(BaseHTTPRequestHandler):
    """Records the paths that are asked for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Stand in for W&B's server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recording)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_offline_run_touches_no_network(tmp_path, server):
    """Telemetry is sent by W&B's own process, which swallows what fails."""
    script = f"""
        import json, socket
        from pathlib import Path

        asked, inside = [], ("localhost", "127.0.0.1", "::1", None, "")
        look_up, connect = socket.getaddrinfo, socket.socket.connect

        def getaddrinfo(host, *rest, **more):
            if host not in inside:
                asked.append(str(host))
                raise socket.gaierror("no network")
            return look_up(host, *rest, **more)

        def checked(self, address):
            if isinstance(address, tuple) and address[0] not in inside:
                asked.append(str(address))
                raise OSError("no network")
            return connect(self, address)

        socket.getaddrinfo, socket.socket.connect = getaddrinfo, checked
        from bilevel.loggers.wandb_logger import WandB
        from tests.support import runs

        runs.run(Path({str(tmp_path)!r}) / "run", loggers=[WandB()], epochs=2)
        import wandb

        wandb.teardown()
        Path({str(tmp_path)!r}, "asked.json").write_text(json.dumps(asked))
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    url = f"http://127.0.0.1:{server.server_port}"
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        cwd=Path(__file__).parents[3],
        env={**own, "HOME": str(tmp_path), "WANDB_BASE_URL": url, "WANDB_API_KEY": 40 * "a"},
    )
    assert json.loads((tmp_path / "asked.json").read_text()) == []
    assert server.asked == []
    assert len(begun(tmp_path)) == 1
