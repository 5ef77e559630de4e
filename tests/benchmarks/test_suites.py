"""The suites' command line, and what they compare: correctness gates that can fail, models of equal size, bytes by hand."""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import layer, peers, recovery, streaming, train
from benchmarks import step as steps
from benchmarks.__main__ import SUITES, main
from benchmarks.measure import Report
from nlray.errors import UserError
from nlray.models.lm import build_model

ROOT = Path(__file__).parents[2]
SMALL = argparse.Namespace(dim=32, layers=2, threads=1)


def test_an_unknown_suite_is_one_line_with_the_nearest_name(capsys):
    assert main(["strem"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'strem'" in error and "nearest: stream" in error and all(name in error for name in SUITES)


def test_without_a_suite_they_are_listed(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in SUITES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--repeats", "0"], "--repeats"),
        (["layer", "--memories", "matrix,cube"], "--memories has 'cube'; allowed: matrix, mlp"),
        (["layer", "--phases", "still"], "--phases has 'still'; allowed: self_modifying, static"),
        (["step", "--parts", "all"], "--parts has 'all'; allowed: models, train, streaming"),
        (["step", "--shapes", "4by512"], "--shapes is '4by512'"),
        (["step", "--turn"], "--turn"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("phase", layer.PHASES)
def test_the_gate_of_the_layer_passes_and_sees_a_memory_that_is_wrong(phase, monkeypatch):
    assert all(layer.error_of(memory, phase) < layer.TOLERANCE for memory in layer.DEPTHS)
    right = layer.memory_of

    def wrong(model):
        return right(replace(model, titans=replace(model.titans, read="chunk_start" if model.titans.read == "token" else "token")))

    monkeypatch.setattr(layer, "memory_of", wrong)
    assert layer.error_of("matrix", phase) > 100 * layer.TOLERANCE


def test_the_work_of_the_layer_leaves_gradients_and_is_the_same_each_time():
    model = layer.ModelConfig(dim=16, heads=2, layers=1, seq_len=12, titans={"chunk_size": 4})
    torch.manual_seed(0)
    built = layer.build_layer(model)
    assert all(p.isfinite().all() for p in built.parameters())
    work = layer.layer_work(model, 2)
    first = layer.count_flops(work)
    assert first == layer.count_flops(work) > 3 * 2 * (2 * 12) * 16 * 16 * 3


def test_the_transformer_has_as_many_parameters_as_hope():
    hope = steps.hope_config(SMALL, (2, 16))
    like = steps.transformer_like(hope)
    counts = [sum(p.numel() for p in build_model(c, 257, device="meta", seed=None).parameters()) for c in (hope, like)]
    assert [steps.num_parameters(c) for c in (hope, like)] == counts
    assert like.model.kind == "transformer" and abs(counts[1] / counts[0] - 1) < steps.ALIKE


def test_the_gate_of_the_step_passes_and_sees_a_model_that_does_not_learn(monkeypatch):
    report, config = Report("step", ""), steps.hope_config(SMALL, (2, 16))
    steps.check_learning(config, report)
    monkeypatch.setattr(steps.BareLoop, "step", lambda self, step, blocks: torch.tensor(float(step)))
    with pytest.raises(SystemExit, match="no time is measured"):
        steps.check_learning(config, report)


def test_shapes_are_read():
    assert steps.shapes_of("4x512, 1x2048") == [(4, 512), (1, 2048)]
    for text in ("4x", "0x5", "4x5x6"):
        with pytest.raises(UserError, match="--shapes"):
            steps.shapes_of(text)


def test_a_stream_is_read_from_either_context_with_a_state_of_one_size(capsys):
    report, args = Report("step", ""), argparse.Namespace(context=2000, window=300, repeats=1)
    streaming.run(args, steps.hope_config(SMALL, (1, 64)), report)
    printed = capsys.readouterr().out
    # 2000 tokens are 8 parts.
    assert "values after 1024 and after 2048 tokens" in printed and "one token at a time" in printed


def test_activations_are_what_the_backward_is_kept_for():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 6))

        def token_losses(self, x):
            h = x @ self.weight
            # The product keeps x, the sine h, the square of it the sine; the weight is a parameter.
            return h.sin().square(), None

    assert train.activation_bytes(Square(), torch.randn(5, 4)) == 4 * (5 * 4 + 2 * 5 * 6)


class Handle:
    """A run that has ended, as `launch` returns it."""

    def __init__(self, rows, recoveries=()):
        self.rows, self.recoveries, self.client, self.polls = rows, list(recoveries), self, 0

    def poll(self):
        self.polls += 1
        return SimpleNamespace(state="running" if self.recoveries else "completed", rows=self.rows, message=None)

    def describe(self):
        # A recovery more at every look but the first two.
        return SimpleNamespace(
            state="running", actors=[], step=40 * self.polls, recoveries=self.recoveries[: max(0, self.polls - 2)], pid=0
        )

    def close(self):
        pass


def test_of_a_run_the_first_steps_are_left_out_and_the_stall_is_the_share_of_the_others(monkeypatch, tmp_path):
    config = steps.hope_config(SMALL, (2, 16))
    first = [{"tokens_per_second": 1.0, "stall_s": 30.0}] * train.WARM_UP_STEPS
    rows = [{"tokens_per_second": 32 / s, "stall_s": 0.1 * s} for s in (1.0, 2.0, 6.0)]
    monkeypatch.setattr(train, "launch", lambda config, behaviours: Handle(first + rows))
    assert train.trained(config, tmp_path / "weights") == (2.0, pytest.approx(0.1))


def test_a_fault_has_a_row_with_the_seconds_of_each_phase(monkeypatch, tmp_path):
    monkeypatch.setattr(
        recovery, "launch", lambda config, behaviours: Handle([], [{"at": time.time() + 5, "restore_s": 2.0, "replay_s": 3.0}])
    )
    (row,) = recovery.measure_faults(steps.hope_config(SMALL, (2, 16)), ["raise"], 1, tmp_path)
    assert row["fault"] == "raise" and row["roles started, s more"].values == (2.0,) and row["where it had been, s more"].values == (3.0,)
    assert 4.0 < row["seen, s"].median <= 5.0 and (tmp_path / "trigger").exists()


def test_the_cost_of_recovery_points_is_a_ratio_of_neighbouring_blocks(monkeypatch, tmp_path):
    config, began, now = steps.hope_config(SMALL, (2, 16)), [], 0.0
    for step in range(5 * recovery.BLOCK_STEPS + 2):
        began.append(f"{step} {now}")
        # Every other block, from the second on, has points; they make a step 10 % longer; from the fourth on all steps take twice as long.
        now += (1.1 if step // recovery.BLOCK_STEPS % 2 == 1 else 1.0) * (2 if step >= 3 * recovery.BLOCK_STEPS else 1)
    (tmp_path / "times").write_text("\n".join(began))
    monkeypatch.setattr(recovery, "launch", lambda config, behaviours: Handle([]))
    points, none = recovery.measure_cost(config, tmp_path / "times", 2)
    assert len(points["tokens/s"].values) == len(none["tokens/s"].values) == 2
    assert none["tokens/s"].values == pytest.approx((32.0, 16.0)) and points["with / without"].values == pytest.approx((1 / 1.1, 1 / 1.1))


class Process:
    """Runs another program in the place of a peer's venv: this Python, with a work of its own."""

    WORK = """
import sys, types
sys.path.insert(0, {root!r})
from benchmarks import peer_work
def work(turns, options):
    print("noise on stdout")
    turns.wait()
    for turn in range(options["turns"]):
        turns.end(lambda: {{"is_right": True, "turn": turn}})
    raise ValueError("no more turns")
peer_work.titans_pytorch = work
peer_work.main()
"""


def test_a_peer_does_a_turn_when_asked_and_says_in_a_line_why_it_stops(tmp_path, monkeypatch):
    script = tmp_path / "work.py"
    script.write_text(Process.WORK.format(root=str(ROOT)))
    monkeypatch.setattr(peers, "WORK", script)
    monkeypatch.setattr(peers, "install", lambda package, folder: Path(sys.executable))
    with peers.Peer("titans-pytorch", tmp_path, threads=1, turns=2) as peer:
        assert peer.description["turn"] == 0
        assert peer.turn() >= 0.0 and peer.description["turn"] == 1
        with pytest.raises(peers.PeerError, match=r"titans-pytorch 0\.5\.5 stopped: ValueError: no more turns"):
            peer.turn()


def test_a_peer_that_cannot_be_installed_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found for titans-pytorch==0.5.5\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(peers.PeerError, match=r"titans-pytorch==0\.5\.5 cannot be installed in .*: ERROR: No matching distribution"):
        peers.install("titans-pytorch", tmp_path)
