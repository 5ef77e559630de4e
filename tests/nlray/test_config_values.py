"""Every number of the configuration has a range: what is out of it is one line that names the key, what is in it works."""

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest
import torch

from nlray.config import Config, OptimizerConfig
from nlray.config.checks import LIMITS, SMALLEST, Range, Scalar, read
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.models.lm import build_model
from nlray.optimizers import OuterOptimizer
from nlray.optimizers.registry import CLASSES, OWN_KEYS, build_on_trial

BASE = [
    "run.steps=100",
    "cms.levels.slow.autoscale={max: 2, target_lag: 1}",
    "cms.levels.slow.in_context={chunk_size: 4, objective: l2}",
]
NOT_NUMBERS = ("nan", ".nan", "inf", "-inf", ".inf", "true", "yes", "0x10", "0o10", "1_000", "1:30", "2026-11-30", "3 4", "")
NUMBERS = ("-1", "0", "1", "3", "010", "0.5", "1e3", "3.0", "1e-38", "1e-60", "1e308", "1e999", str(2**31), str(2**63), "9" * 5000)


def numbers_of(kind: Any, key: str) -> Iterator[tuple[str, Any, type, Range]]:
    """Give key, declared type, type and range of every number that a type has; a level and a source stand for all."""
    for one in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        origin, inner = get_origin(one), get_args(one)
        assert one not in (int, float), f"{key} has no range"
        if origin is Annotated and isinstance(inner[1], Range):
            yield key, kind, inner[0], inner[1]
        elif is_dataclass(one):
            for f in fields(one):
                yield from numbers_of(f.type, f"{key}.{f.name}" if key else f.name)
        elif origin is list and inner[0] is not Any:
            yield from numbers_of(inner[0], f"{key}.0")
        elif origin is dict and inner[1] is not Any:
            name = {"cms.levels": "slow", "model.titans.chunk_sizes": "k", "model.attention.rope_scaling": "factor"}.get(key, "any")
            yield from numbers_of(inner[1], f"{key}.{name}")


KEYS = {key: (declared, kind, rule) for key, declared, kind, rule in numbers_of(Config, "") if key != "model.titans.decay_bias.0"}


def overrides_of(key: str, value: str) -> list[str]:
    """Return overrides that set a key, in a configuration that has the lists that it may be in."""
    lists = ["data.sources=[a.txt]", "sequence.optimizer.betas=[0.9, 0.95]", "cms.levels.slow.optimizer.betas=[0.9, 0.95]"]
    return [*BASE, *lists, f"{key}={value}"]


def outcome(key: str, value: str) -> Any:
    """Return the number that the text of a key becomes, or the message."""
    try:
        return read(key, Scalar(value), KEYS[key][0])
    except UserError as error:
        return str(error)


def test_every_key_is_there():
    assert len(KEYS) > 70
    assert {"run.timeout_s", "sequence.optimizer.betas.0", "cms.levels.slow.autoscale.target_lag", "data.sources.0.weight"} <= set(KEYS)
    assert {"cms.levels.slow.in_context.lr", "cms.levels.slow.resources.custom.any", "model.titans.chunk_sizes.k"} <= set(KEYS)


@pytest.mark.parametrize("value", ["nan", "1e999"])
@pytest.mark.parametrize("key", KEYS)
def test_a_number_out_of_range_is_one_line_that_names_the_key(key, value, tmp_path):
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides_of(key, value))
    assert str(caught.value).startswith(f"{key.replace('.0', '[0]')} is ") and "; allowed: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_number_is_decimal_and_in_its_range(key):
    _, kind, rule = KEYS[key]
    closed = rule.closed(LIMITS[kind])
    for text in (*NOT_NUMBERS, *NUMBERS):
        found = outcome(key, text)
        is_number = text in NUMBERS and (kind is float or text.lstrip("-").isdigit())
        is_number = is_number and closed.allows(float(text)) and not 0 < float(text) < SMALLEST
        if is_number and (kind is float or len(text) < 30):
            assert type(found) is kind and found == kind(text), (text, found)
            assert np.isfinite(np.float32(found)) and (found == 0 or np.float32(found) != 0), (text, found)
        else:
            assert str(found).startswith(f"{key} is ") and "; allowed: " in found and "\n" not in found, (text, found)
            assert len(found) < 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e308, 10**400, True, None, [1], {}, "x"])
def test_pythons_own_values_are_read_alike(value):
    for kind in (Annotated[int, Range(0)], Annotated[float, Range(0)]):
        with pytest.raises(UserError, match=r"^a key is [^\n]*; allowed: "):
            read("a key", value, kind)


SMALL = ["model.dim=8", "model.heads=2", "model.layers=2", "model.seq_len=8", "model.titans.chunk_size=4", "cms.hidden=8"]
FLOATS = [key for key, (_, kind, _) in KEYS.items() if kind is float and key.startswith(("model.", "cms.levels.slow.optimizer"))]


@pytest.mark.parametrize("is_high", [False, True])
@pytest.mark.parametrize("key", FLOATS)
def test_the_ends_of_a_range_work_in_float32(key, is_high):
    closed = KEYS[key][2].closed(LIMITS[float])
    value = (closed.most if closed.most is not None else 1 - 1e-7) if is_high else (closed.least if closed.least is not None else 1e-30)
    kind = ["model.kind=hope_attention"] if "rope" in key else []
    config = load_config("tiny", [*SMALL, *kind, *overrides_of(key, repr(value))])
    model = build_model(config, 16, seed=0)
    loss = model.token_losses(torch.arange(18).reshape(2, 9) % 16)[0].mean()
    assert torch.isfinite(loss)
    loss.backward()
    # Rows without a gradient are everyday: tokens that a batch does not have.
    check_step(config.levels["slow"].optimizer)


def check_step(config: OptimizerConfig) -> None:
    """Check that a step leaves finite parameters where some gradients are 0."""
    parameters = {"w_a": torch.ones(2, 2), "b": torch.ones(2)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0] = 1.0
    OuterOptimizer(parameters, config, horizon=10).step(16)
    assert all(torch.isfinite(p).all() for p in parameters.values())


OPTIONS = [
    (name, option)
    for name, cls in CLASSES.items()
    for option, parameter in inspect.signature(cls.__init__).parameters.items()
    if option not in ("self", "params", "lr", "weight_decay", "betas", *OWN_KEYS.get(name, ()))
    and type(parameter.default) not in (bool, str)
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_of_an_optimizer_works_or_is_one_line_that_names_it(name, option):
    for value in (*NOT_NUMBERS, *NUMBERS):
        given = OptimizerConfig(name=name, options={option: Scalar(value)})
        try:
            build_on_trial(given)
        except UserError as error:
            assert option in str(error) and "\n" not in str(error), (value, str(error))
        else:
            check_step(given)


def test_a_range_is_told_in_the_digits_that_one_would_write() -> None:
    told = [str(rule) for rule in (Range(1e-6, 1e6), Range(0, 2**63 - 1), Range(above=0, most=0.1))]
    assert told == ["1e-06 to 1000000", "0 to 9223372036854775807", "more than 0, at most 0.1"]
