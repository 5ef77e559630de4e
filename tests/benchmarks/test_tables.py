"""What the benchmarks rest on: rows that are there are not made again, and every variant is a configuration that is allowed."""

import math

import pytest

from benchmarks.bare import BareLoop
from benchmarks.table import Runs, spread
from experiments import delays
from experiments.memories import CONTROLS, VARIANTS
from experiments.stacking import FROZEN, LEVELS, STEPS
from nlray.config.loading import load_config, parse_config
from nlray.errors import UserError
from nlray.stacking.stack import DEFAULTS


def test_a_row_that_is_there_is_not_made_again(tmp_path):
    made = []

    def row(lr: float, result: float) -> float:
        def make() -> dict[str, float]:
            made.append(lr)
            return {"loss": result}

        return Runs(tmp_path / "folder" / "runs.jsonl", ("lr", "seed")).row({"lr": lr, "seed": 0, "note": "no key"}, make)["loss"]

    assert [row(0.1, 1.5), row(0.2, 2.5), row(0.1, 3.5), row(0.2, 4.5)] == [1.5, 2.5, 1.5, 2.5]
    assert made == [0.1, 0.2] and len((tmp_path / "folder" / "runs.jsonl").read_text().splitlines()) == 2


def test_a_run_that_broke_down_is_no_number_in_the_mean():
    assert spread([1.0, 2.0, 4.5], ".1f") == "2.5 (1.0..4.5)"
    assert math.isnan(float(spread([1.0, None]).split()[0]))


@pytest.mark.parametrize("label", VARIANTS)
def test_every_memory_of_the_table_is_allowed_and_differs_from_the_default(label):
    config = parse_config(label, "model: {kind: titans}", list(VARIANTS[label]))
    assert (config.model != parse_config("", "model: {kind: titans}").model) == (label != "self_modifying")
    assert set(CONTROLS) <= set(VARIANTS) and len(set(VARIANTS.values())) == len(VARIANTS)


def test_every_delay_of_the_table_is_allowed_and_each_is_another_one():
    configs = [load_config("tiny", [*delays.NO_DELAY, *settings]) for settings in delays.VARIANTS.values()]
    assert all(config not in configs[:index] for index, config in enumerate(configs))
    assert {name: level.update_period for name, level in configs[0].levels.items()} == delays.LEVELS
    assert {level.visible_delay for level in configs[0].levels.values()} == {0}


def test_differences_are_taken_seed_by_seed():
    rows, base = [{"loss": 2.5}, {"loss": 1.25}], [{"loss": 2.0}, {"loss": 1.0}]
    assert delays.paired(rows, base, "loss") == "+0.3750 (+0.2500..+0.5000)"
    assert delays.paired([{"loss": None}, rows[1]], base, "loss").startswith("+nan")


def test_frozen_levels_are_not_updated_within_the_run_and_keep_their_order():
    assert tuple(DEFAULTS["cms"]["levels"]) == LEVELS
    periods = [int(change.rpartition("=")[2]) for change in FROZEN]
    assert STEPS < periods[0] < periods[1]


def test_the_bare_loop_refuses_states_that_it_would_not_carry():
    with pytest.raises(UserError, match=r"model\.titans\.carry_state is true; allowed for the bare loop"):
        BareLoop(load_config("tiny", ["model.titans.carry_state=true", "model.vocab_size=31"]))
