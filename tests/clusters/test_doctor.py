"""`nlray doctor`: its exit status follows the required checks. (`test_package` runs the real one.)"""

import json

import pytest

from nlray.clusters import doctor
from nlray.clusters.cli import main


def broken():
    raise RuntimeError("not\nthere")


@pytest.mark.parametrize(("is_required", "status", "mark"), [(True, 1, "FAIL"), (False, 0, "no")])
def test_only_a_required_check_that_fails_is_status_1(is_required, status, mark, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_CHECKS", {"good": (lambda: {"version": "1", "extra": None}, True), "bad": (broken, is_required)})
    assert main(["doctor"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "good", "version", "1"]
    assert lines[1].split(maxsplit=2) == [mark, "bad", "RuntimeError: not there"]


def test_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_CHECKS", {"gpus": (list, False), "bad": (broken, True)})
    assert main(["doctor", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is False
    assert data["checks"][0] == {"name": "gpus", "is_ok": True, "is_required": False, "value": []}


def test_checks_without_ray_find_this_machine_fit(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_CHECKS", {name: check for name, check in doctor._CHECKS.items() if name != "ray"})
    assert main(["doctor"]) == 0
    assert not (tmp_path / "runs").exists()
