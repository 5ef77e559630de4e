"""Folders that somebody else made: looking at one, or going on from one, runs, contacts and overwrites nothing of its choosing unasked."""

import io
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nlray.actors import local_clusters
from nlray.actors.local_clusters import own_raylet, take_token
from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.clusters.cli import main
from nlray.config.loading import config_to_yaml, load_config
from nlray.errors import UserError
from nlray.extensions import is_installed
from nlray.metrics import warn_once
from nlray.models.lm import build_model
from nlray.terminal import clean, clean_lines
from nlray.trust import read_bounded, read_object, require_regular

SMALL = [
    "model.dim=16",
    "model.layers=1",
    "model.heads=2",
    "model.seq_len=32",
    "model.titans.chunk_size=8",
    "run.name=hostile",
    "run.steps=9",
]
NUMBERS = itertools.count()
MODULE = """
from pathlib import Path

from nlray.models.level import SiluLevel
from nlray.optimizers import AdamW

Path({marker!r}).write_text("ran")


class Level(SiluLevel):
    pass


class Optimizer(AdamW):
    @classmethod
    def gradient_memories(cls, shapes, options):
        return AdamW.gradient_memories(shapes, options)
"""


class Hostile:
    """A run's folder that names code beside it. dir: the folder; has_run: whether that code was imported."""

    def __init__(self, folder: Path, kind: str = "hope") -> None:
        self.dir, self._marker = folder, folder / "marker"
        config = load_config("tiny", [*SMALL, f"model.kind={kind}", f"run.dir={folder}"])
        parameters = {f"param/{name}": p for name, p in build_model(config, 257, seed=1).named_parameters()}
        self.checkpoint = checkpoint_dir(str(folder), 3)
        write_manifest(self.checkpoint, 3, [write_part(self.checkpoint, "0.safetensors", parameters)], {})
        self._text = config_to_yaml(config)
        self.change("", "")

    def change(self, old: str, new: str) -> None:
        """Write config.yaml with one text replaced."""
        assert old in self._text
        (self.dir / "config.yaml").write_text(self._text.replace(old, new, 1))

    def module(self) -> str:
        """Return the name of a module in the folder that was never imported."""
        name = f"hostile_{next(NUMBERS)}"
        (self.dir / f"{name}.py").write_text(MODULE.format(marker=str(self._marker)))
        self._marker.unlink(missing_ok=True)
        return name

    @property
    def has_run(self) -> bool:
        return self._marker.exists()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """A hostile run in the current folder, as after unpacking an archive and looking inside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    return Hostile(tmp_path)


COMMANDS = {
    "generate": ["generate", ".", "ab", "--tokens", "2"],
    "a checkpoint": ["generate", "checkpoints/step_000000003", "ab", "--tokens", "2"],
    "levels": ["levels", "init=."],
    "train": ["train", "init=.", "run.dir=new", "run.steps=1"],
    "resume": ["resume", "."],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("cms.mlp", "mlp: silu", "mlp: {}:Level"),
        ("sequence.optimizer.name", "sequence:\n", "sequence: {{optimizer: {{name: '{}:Optimizer'}}}}\nnothing:\n"),
        ("cms.levels.fast.optimizer.name", "name: adamw", "name: {}:Optimizer"),
    ],
    ids=["level", "sequence", "optimizer"],
)
def test_code_beside_a_run_is_not_imported_unasked(command, key, old, new, hostile, capsys):
    name = hostile.module()
    if key == "sequence.optimizer.name":
        _, _, rest = hostile._text.partition("\nsequence:\n")
        old = "\nsequence:\n" + rest.partition("name: adamw")[0] + "name: adamw"
        new = old.replace("name: adamw", "name: {}:Optimizer")
    hostile.change(old, new.format(name))
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert not hostile.has_run and out == "" and not Path("new").exists()
    assert f"the class {name}:" in err and f"({key}" in err and "--trust" in err and err.count("\n") == 1


def test_code_beside_a_run_is_imported_with_trust(hostile, capsys):
    hostile.change("mlp: silu", f"mlp: {hostile.module()}:Level")
    for command in (COMMANDS["generate"], COMMANDS["levels"]):
        assert main([*command, "--trust"]) == 0, capsys.readouterr().err
    assert hostile.has_run and "ab" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("yes\n", 0), ("n\n", 2), ("\n", 2), ("", 2)])
def test_in_a_terminal_the_classes_are_named_and_asked_for(answer, status, hostile, capsys, monkeypatch):
    name = hostile.module()
    hostile.change("mlp: silu", f"mlp: {name}:Level")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(COMMANDS["levels"]) == status
    err = capsys.readouterr().err
    assert f"the class {name}:Level (cms.mlp)" in err and "[y/N]" in err and hostile.has_run == (status == 0)


def test_what_the_user_types_is_the_users_own(hostile, capsys):
    name = hostile.module()
    assert main(["levels", "init=.", f"cms.mlp={name}:Level"]) == 0, capsys.readouterr().err
    assert hostile.has_run
    hostile.change("mlp: silu", f"mlp: {name}:Level")
    assert main(["levels", "init=.", f"cms.mlp={name}:Level"]) == 0
    assert main(["levels", "init=."]) == 2


def test_stacking_a_run_asks_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hostile = Hostile(tmp_path, kind="transformer")
    assert main(["stack", ".", "--out", "plain", "cms.layout=chain"]) == 0, capsys.readouterr().err
    hostile.change("tokenizer: bytes", "tokenizer: http://127.0.0.1:9/t.json")
    assert main(["stack", ".", "--out", "out", "cms.layout=chain"]) == 2
    assert "the address http://127.0.0.1:9/t.json (data.tokenizer)" in capsys.readouterr().err and not Path("out").exists()


def test_installed_means_site_packages_or_an_editable_project_and_nothing_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_installed("nlray.models.level") and is_installed("torch.optim") and is_installed("yaml")
    assert not any(map(is_installed, ("os", "sys", "pip_that_is_not_there", "torch.__main__", "nlray_evil")))
    # A folder that says of itself that it is an installed package, with its own path first.
    (tmp_path / "evil.py").write_text("")
    (tmp_path / "torch.py").write_text("")
    folder = tmp_path / "evil-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (folder / "top_level.txt").write_text("evil\ntorch\n")
    (folder / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    assert not is_installed("evil")
    # The same in site-packages is what pip leaves.
    site = tmp_path / "venv" / "site-packages"
    site.mkdir(parents=True)
    folder.rename(site / folder.name)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert is_installed("evil") and not is_installed("evil2")


def test_the_current_folder_is_looked_in_only_for_a_class_that_is_nowhere_else(hostile, capsys):
    """Not on the path of every command: an optional import of some library would be found there."""
    assert main(COMMANDS["levels"]) == 0 and str(hostile.dir) not in sys.path
    assert main(["levels", "tiny", f"cms.mlp={hostile.module()}:Level"]) == 0, capsys.readouterr().err
    assert str(hostile.dir) in sys.path


# Addresses.


@pytest.fixture
def server() -> socket.socket:
    """Something that listens and answers nobody."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        found.setblocking(False)
        yield found


def was_contacted(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("command", [COMMANDS["generate"], COMMANDS["levels"], COMMANDS["train"], COMMANDS["resume"]], ids=lambda c: c[0])
def test_the_address_of_a_tokenizer_is_not_contacted_unasked(command, hostile, server, capsys):
    url = f"http://127.0.0.1:{server.getsockname()[1]}/t.json"
    hostile.change("tokenizer: bytes", f"tokenizer: {url}")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"the address {url} (data.tokenizer)" in err and err.count("\n") == 1 and not was_contacted(server)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/a.jsonl", "simplecache::http://127.0.0.1:{}/a.jsonl", "reference::file://{}/r.json"])
def test_the_address_of_a_source_is_not_contacted_when_a_run_is_resumed(url, hostile, server, capsys):
    url = url.format(server.getsockname()[1])
    hostile.change("path: 'stdlib:'", f"path: {url}")
    assert main(["resume", "."]) == 2
    assert f"the address {url} (data.sources[0].path)" in capsys.readouterr().err and not was_contacted(server)
    # What only goes on from the parameters reads other data.
    assert main(COMMANDS["generate"]) == 0


def test_an_address_cannot_carry_an_environment_variable(hostile, capsys, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    hostile.change("tokenizer: bytes", "tokenizer: http://127.0.0.1:9/${oc.env:SECRET}")
    for command in (COMMANDS["generate"], COMMANDS["levels"], COMMANDS["resume"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "${...} is not replaced" in err and err.count("\n") == 1 and "s3cr3t" not in err


# Links.


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "tensorboard", "config.yaml.part", "checkpoints/step_000000001"])
def test_a_resume_does_not_write_through_a_link_unasked(name, hostile, capsys, tmp_path_factory):
    target = tmp_path_factory.mktemp("home") / "mine"
    target.write_text("mine")
    (hostile.dir / name).symlink_to(target)
    assert main(["resume", "."]) == 2
    err = capsys.readouterr().err
    assert f"the link {hostile.dir / name} -> {target}" in err and err.count("\n") == 1 and target.read_text() == "mine"


# Files that are not as nlray writes them.

DEEP = "[" * 100_000 + "]" * 100_000


SHAPES = {
    "list": "[]",
    "null": "null",
    "number": "3",
    "string": '"x"',
    "empty": "",
    "torn": "{",
    "very deep": '{"a": ' + DEEP + "}",
    "deep": '{"status": "completed", "steps": 9, "address": "h:1", "a": ' + "[" * 300 + "]" * 300 + "}",
    "no keys": '{"status": []}',
    "long number": "9" * 5000,
    "no JSON": "\\ud83d",
}
LOOKS = [["status"], ["status", "--json"], ["stop"], ["scale", "slow=2"], ["chaos"]]


@pytest.mark.parametrize("content", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
def test_a_state_of_another_shape_is_one_line(command, content, hostile, capsys):
    (hostile.dir / "state.json").write_text(content)
    assert main([command[0], ".", *command[1:]]) == 2
    err = capsys.readouterr().err
    assert "run hostile cannot be asked: state.json is damaged" in err and err.count("\n") == 1 and len(err) < 500


CHANGES = [
    {"status": {}},
    {"status": None},
    {"steps": "9"},
    {"steps": 10**400},
    {"loss_first": "x"},
    {"tokens": [1]},
    {"digest": 3},
    {"error": ["x"]},
    {"recoveries": "many"},
    {"checkpoint": {}},
]


@pytest.mark.parametrize(
    "content",
    [*SHAPES.values(), *(json.dumps({"status": "completed", "steps": 9} | c) for c in CHANGES)],
    ids=[*SHAPES, *map(str, CHANGES)],
)
def test_a_summary_of_another_shape_is_none(content, hostile, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (hostile.dir / "summary.json").write_text(content)
    state = {"status": "completed", "address": "127.0.0.1:9"}
    for summary in ({}, {"summary": "x"}, {"summary": {"status": "completed", "steps": "9"}}):
        (hostile.dir / "state.json").write_text(json.dumps(state | summary))
        for command in ("status", "stop"):
            assert main([command, "."]) == 2
            err = capsys.readouterr().err
            assert "run hostile is not going on" in err and err.count("\n") == 1 and len(err) < 700


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"text": 3, "time": 1.0}', '{"text": "x", "time": 1e300}', '{"text": "x", "time": NaN}', '{"text": "x"}', DEEP]
)
def test_an_event_of_another_shape_is_left_out_and_told(line, hostile, capsys, caplog):
    (hostile.dir / "summary.json").write_text(json.dumps({"status": "completed", "steps": 9}))
    (hostile.dir / "events.jsonl").write_text(line + '\n{"text": "well", "time": 1.7e9}\n')
    warn_once.cache_clear()
    assert main(["logs", "."]) == 0
    assert capsys.readouterr().out.endswith("  well\n") and len(caplog.messages) == 1 and "left out" in caplog.text


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12))


@pytest.mark.parametrize("text", ["a: " + DEEP, BOMB, "a: [", "[]", "a: !!python/object/apply:os.system ['true']", "nobody: 1"])
def test_a_configuration_of_another_shape_is_one_line(text, hostile, capsys):
    (hostile.dir / "config.yaml").write_text(text)
    for command in (["status", "."], *COMMANDS.values()):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("nlray: error: ") and err.count("\n") == 1 and len(err) < 500


def test_what_is_no_regular_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "state.json")
    for read in (read_object, read_bounded, require_regular):
        with pytest.raises(UserError, match="not a regular file"):
            read(str(tmp_path / "state.json"))
    with open(tmp_path / "config.yaml", "wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(UserError, match="larger than 16 MiB"):
        read_bounded(str(tmp_path / "config.yaml"))


# Clusters.


@pytest.mark.parametrize("command", [["status"], ["logs", "--follow"], ["stop"], ["scale", "slow=2"], ["chaos"]], ids=" ".join)
def test_a_cluster_that_a_folder_names_is_not_contacted(command, hostile, server, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address = f"127.0.0.1:{server.getsockname()[1]}"
    (hostile.dir / "state.json").write_text(json.dumps({"status": "running", "address": address}))
    assert main([command[0], ".", *command[1:]]) == 2
    err = capsys.readouterr().err
    assert not was_contacted(server)
    assert "run hostile is not going on in a Ray cluster of yours on this machine" in err
    assert f"--address {address} joins" in err and err.count("\n") == 1


@pytest.mark.parametrize("address", [3, None, [], "x", "auto", "local", "ray://127.0.0.1:10001", "127.0.0.1:9 $(reboot)", "a" * 999])
def test_an_address_of_another_form_is_one_line(address, hostile, capsys):
    (hostile.dir / "state.json").write_text(json.dumps({"status": "running", "address": address}))
    assert main(["status", "."]) == 2
    err = capsys.readouterr().err
    assert "state.json is damaged" in err and "$(" not in err and err.count("\n") == 1


@pytest.fixture
def raylet(tmp_path: Path) -> str:
    """The address of a cluster of which a process of this user runs here, by its name and arguments, with a token."""
    program = tmp_path / "raylet"
    program.symlink_to(getattr(sys, "_base_executable", sys.executable))
    address = "127.0.0.1:9"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}
    command = [program, "-c", "print(flush=True); import time; time.sleep(600)", f"--gcs-address={address}"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield address
        process.kill()


def test_only_a_cluster_with_a_raylet_of_this_user_here_is_ones_own(raylet, monkeypatch):
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(key, "before")  # put back at the end, whatever is set between
    monkeypatch.setattr(local_clusters, "RayConfig", SimpleNamespace(initialize=lambda _: None))
    assert own_raylet("127.0.0.1:99") is None and own_raylet("127.0.0.1") is None
    take_token(own_raylet(raylet))
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("token", "secret")
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert own_raylet(raylet) is None


def test_the_cluster_of_the_environment_is_joined_and_not_that_of_the_folder(hostile, server, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    address = f"127.0.0.1:{server.getsockname()[1]}"
    (hostile.dir / "state.json").write_text(json.dumps({"status": "running", "address": address}))
    assert main(["status", "."]) == 2
    assert "run hostile is not going on: 127.0.0.1:9: no Ray cluster answers there" in capsys.readouterr().err
    assert not was_contacted(server)


# What is printed.

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\ud83d"


def test_what_a_folder_says_does_not_move_the_cursor(hostile, capsys):
    assert clean(f"a\tb\nc\r{ESCAPES}") == "a b c \\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e\\ud83d"
    assert clean_lines("a\tb\n\x1b") == "a\tb\n\\x1b"
    summary = {"status": "failed", "steps": 9, "digest": ESCAPES, "error": f"{ESCAPES}\nstate completed", "checkpoint": None}
    (hostile.dir / "summary.json").write_text(json.dumps(summary))
    (hostile.dir / "events.jsonl").write_text(json.dumps({"time": 1.7e9, "text": f"{ESCAPES}\nstep 9: all is well"}) + "\n")
    hostile.change("name: hostile", 'name: "\\e]0;owned\\a"')
    for command in (["status", "."], ["logs", "."], ["logs", ".", "--follow"], ["resume", ".", f"run.steps={ESCAPES[:4]}"]):
        main(command)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\x9b" not in out + err and out + err
    (hostile.dir / "summary.json").unlink()
    (hostile.dir / "state.json").write_text(json.dumps({"address": ESCAPES}))
    assert main(["status", "."]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_generated_text_is_shown_without_control_characters_and_piped_as_it_is(hostile, capsys, monkeypatch):
    monkeypatch.setattr("nlray.clusters.generate.stream_text", lambda *_, **__: iter(["a\n", ESCAPES[:4]]))
    assert main(["generate", ".", "a"]) == 0
    assert capsys.readouterr().out == f"a\n{ESCAPES[:4]}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", ".", "a"]) == 0
    assert capsys.readouterr().out == "a\n\\x1b]0;\n"
