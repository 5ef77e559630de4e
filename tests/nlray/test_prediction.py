"""The guess at an update that has not come yet."""

from itertools import pairwise

import pytest
import torch

from nlray.config_loading import config_from_dict, load_config
from nlray.errors import UserError
from nlray.nested_system import NestedSystem, level_plans
from nlray.prediction import Prediction


def versions(count: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(3, 2, generator=generator), torch.randn(5, generator=generator)] for _ in range(count)]


def take(prediction: Prediction, version: list[torch.Tensor], *, is_next: bool = True) -> None:
    prediction.keep_(is_next=is_next)
    torch._foreach_copy_(prediction.parameters, version)


def assert_equal(parameters, expected) -> None:
    assert [p.tolist() for p in parameters] == [e.tolist() for e in expected]


def test_a_share_of_the_last_change_is_added_once():
    made = versions(4)
    prediction = Prediction([p.clone() for p in made[0]], 0.7)
    prediction.predict_()
    assert_equal(prediction.parameters, made[0])
    for before, version in pairwise(made):
        take(prediction, version)
        assert_equal(prediction.parameters, version)
        for _ in range(2):
            prediction.predict_()
            assert_equal(prediction.parameters, [v + 0.7 * (v - b) for v, b in zip(version, before, strict=True)])
    slow = [v.double() + 0.7 * (v.double() - b.double()) for v, b in zip(made[3], made[2], strict=True)]
    for parameter, exact in zip(prediction.parameters, slow, strict=True):
        torch.testing.assert_close(parameter.double(), exact, rtol=0, atol=1e-6)


def test_versions_that_are_not_predicted_in_between_predict_alike():
    """With D < C a level is predicted in a part of each period only, and a version is the base of a prediction or not."""
    made = versions(4)
    prediction = Prediction([p.clone() for p in made[0]], 1.0)
    for version in made[1:3]:
        take(prediction, version)
    take(prediction, made[3])
    prediction.predict_()
    assert_equal(prediction.parameters, [v + (v - b) for v, b in zip(made[3], made[2], strict=True)])


def test_nothing_is_predicted_across_a_version_that_was_left_out():
    made = versions(3)
    prediction = Prediction([p.clone() for p in made[0]], 1.0)
    take(prediction, made[1])
    prediction.predict_()
    take(prediction, made[2], is_next=False)
    prediction.predict_()
    assert_equal(prediction.parameters, made[2])


def test_the_true_parameters_come_and_go():
    made = versions(2)
    prediction = Prediction([p.clone() for p in made[0]], 1.0)
    take(prediction, made[1])
    for is_predicted in (False, True):
        if is_predicted:
            prediction.predict_()
        used = [p.clone() for p in prediction.parameters]
        with prediction.true_parameters():
            assert_equal(prediction.parameters, made[1])
        assert_equal(prediction.parameters, used)


def test_a_level_without_a_delay_predicts_nothing_and_holds_nothing_for_it():
    costs = {}
    for delay in (0, 1):
        config = load_config("tiny", [f"memory.levels.fast.delay={delay}", "memory.levels.fast.predict=1"])
        assert level_plans(config, 16)[0].predict == delay
        costs[delay] = {cost.name: cost.buffers for cost in NestedSystem.build(config, 16).actors}
    size = 4 * level_plans(config, 16)[0].num_parameters
    assert costs[1] == costs[0] | {"sequence": costs[0]["sequence"] + size, "fast": costs[0]["fast"] + size}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"predict": -0.5}, r"memory\.levels\.a.*predict is -0\.5; allowed: 0 to 10"),
        ({"predict": 1}, r"memory\.levels\.a\.predict is 1.*; allowed for variant nested: 0 but in the slowest level"),
    ],
)
def test_what_cannot_be_predicted_is_refused(setting, message):
    levels = {"a": {"update_period": 2, **setting}, "b": {"update_period": 4, "predict": 1}}
    with pytest.raises(UserError, match=message):
        config_from_dict({"memory": {"variant": "nested", "levels": levels}})
