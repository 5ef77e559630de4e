"""Small models that the tests of the models, the streams and the evals share."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nlray.config import Config
from nlray.config.loading import load_config

# Small tensors gain nothing from a second thread, and lose much when the cores are busy.
torch.set_num_threads(1)

SIZES = ["model.dim=16", "model.layers=2", "model.heads=2", "model.seq_len=12", "model.titans.chunk_size=4", "cms.hidden=24"]


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Config]:
    """Return the configuration of a model of `kind` that runs in milliseconds, with overrides."""
    return lambda kind, *overrides: load_config("tiny", [f"model.kind={kind}", *SIZES, *overrides])


@pytest.fixture(scope="session")
def vocab_size() -> int:
    return 31


@pytest.fixture(scope="session")
def random_blocks(vocab_size) -> Callable[..., torch.Tensor]:
    """Return random token ids, [batch, length]."""
    return lambda *shape, seed=0: torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["hope", "hope_attention", "titans", "transformer"])
def kind(request) -> str:
    """Every model kind."""
    return request.param


MEMORIES = {
    "collapsed": (),
    "gd": ("model.titans.rule=gd", "model.titans.objective=l2"),
    "adaptive": ("model.titans.phase=adaptive",),
    "adaptive q": ("model.titans.phase=adaptive", "model.titans.adapt_q=true"),
    "static": ("model.titans.phase=static",),
    "momentum": ("model.titans.phase=static", "model.titans.momentum=true"),
    **{rule: ("model.titans.phase=static", f"model.titans.rule={rule}") for rule in ("hebbian", "delta", "gated_delta")},
    "mlp": ("model.titans.memory=mlp", "model.titans.hidden=6"),
    "adaptive mlp": ("model.titans.memory=mlp", "model.titans.phase=adaptive", "model.titans.adapt_q=true"),
    "static mlp with momentum": (
        "model.titans.memory=mlp",
        "model.titans.phase=static",
        "model.titans.rule=gd",
        "model.titans.objective=l2",
        "model.titans.momentum=true",
    ),
}


@pytest.fixture(params=MEMORIES)
def memory(request) -> tuple[str, ...]:
    """Every memory in context, as overrides of the configuration."""
    return MEMORIES[request.param]


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels are interpreted, and whatever is left uninitialised is NaN."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: empty_like(tensor, **options).fill_(float("nan")))


@pytest.fixture
def bf16_products(monkeypatch):
    """The interpreter multiplies bf16 as a GPU does; it holds them as bits, and would multiply these as whole numbers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def values(handle: TensorHandle) -> np.ndarray:
        return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.data.dtype == np.uint16 else handle.data

    def create_dot(self, a, b, d, *precision):
        return TensorHandle(np.matmul(values(a), values(b), dtype=np.float32) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
