"""What every transport owes: one contract, with the process that keeps an array and the one that reads it apart from each other."""

import gc
import importlib.util
import os
import sys
from contextlib import suppress

import numpy as np
import psutil
import pytest
import ray

from nlray.actors.launch import launch
from nlray.actors.ranks.stores import STORES
from nlray.errors import NlrayError, UserError
from nlray.levels.flat_buffers import as_tensor

from .in_process import InProcessRun
from .plain_loop import digest_plainly

needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed: pip install -e '.[nixl]'")
TRANSPORTS = ["object_store", pytest.param("nixl", marks=needs_nixl)]


class Peer:
    """A process with a store, in which it keeps what it is told to; it also reads what others keep."""

    def __init__(self, transport):
        self.store, self.kept = STORES[transport](10.0), {}

    def put(self, name, array):
        self.kept[name] = self.store.put(array)
        return self.kept[name]

    def pid(self):
        return os.getpid()

    def drop(self, name):
        del self.kept[name]
        gc.collect()

    def read(self, data):
        return self.store.get(data).tobytes()

    def accept(self, data):
        return self.store.accept(data).tobytes()


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request, cluster):
    # The actors' processes may not find this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return request.param


@pytest.fixture
def store(transport):
    return STORES[transport](10.0)


@pytest.fixture(scope="module")
def peer(transport):
    actor = ray.remote(num_cpus=0)(Peer).remote(transport)
    yield actor
    ray.kill(actor)


def noise(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_what_is_got_is_what_was_put_and_stays_so_bit_for_bit(store, peer):
    odd = noise(1001)
    odd[:3] = [np.nan, -np.inf, -0.0]
    arrays = [odd, noise(1), noise(0), noise(1_000_000), noise(1_000_000, 1), np.arange(300, dtype=np.uint8)]
    got = [store.get(ray.get(peer.put.remote("array", array))) for array in arrays]
    for array, found in zip(arrays, got, strict=True):
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
        assert not found.flags.writeable


def test_what_is_kept_changes_neither_with_its_source_nor_with_what_is_put_later(store, peer):
    mine = noise(50_000)
    expected, data = mine.tobytes(), store.put(mine)
    mine[:] = 7.0
    assert ray.get(peer.read.remote(data)) == expected
    again = noise(50_000)
    sent = store.send(again)
    call = peer.accept.remote(sent)
    again[:] = 7.0
    assert ray.get(call) == expected
    kept = ray.get(peer.put.remote("kept", noise(50_000, 1)))
    for seed in (2, 3, 4):
        ray.get(peer.put.remote("passing", noise(50_000, seed)))
        assert store.get(kept).tobytes() == noise(50_000, 1).tobytes()
        ray.get(peer.drop.remote("passing"))


def test_the_death_of_who_keeps_an_array_is_an_error_and_no_other_process_notices(transport, store, peer):
    victim, array = ray.remote(num_cpus=0)(Peer).remote(transport), noise(1_000_000)
    data, same = ray.get([p.put.remote("array", array) for p in (victim, peer)])
    assert store.get(data).tobytes() == array.tobytes()
    process = psutil.Process(ray.get(victim.pid.remote()))
    process.kill()
    process.wait(10)
    # The object store may have it until it hears of the death.
    with suppress(NlrayError):
        assert store.get(data).tobytes() == array.tobytes() and transport == "object_store"
    assert store.get(same).tobytes() == ray.get(peer.read.remote(store.put(array))) == array.tobytes()


def test_what_is_got_lasts_as_long_as_a_tensor_over_it_whatever_becomes_of_who_kept_it(transport, store, peer):
    victim, size = ray.remote(num_cpus=0)(Peer).remote(transport), 250_000
    tensor = as_tensor(store.get(ray.get(victim.put.remote("array", noise(size)))))
    view, expected = tensor[64:].view(-1, 6), noise(size)[64:].tobytes()
    assert tensor.data_ptr() % 64 == 0
    del tensor
    gc.collect()

    def go_on(backup):
        """Let go of what was got, and keep and get others of its size: they would take its place."""
        ray.get(backup.drop.remote("array"))
        for seed in (1, 2, 3):
            data = ray.get(backup.put.remote("array", noise(size, seed)))
            assert store.get(data).tobytes() == noise(size, seed).tobytes()
        assert view.numpy().tobytes() == expected

    go_on(victim)
    process = psutil.Process(ray.get(victim.pid.remote()))
    process.kill()
    process.wait(10)
    ray.get(peer.put.remote("array", noise(1)))
    go_on(peer)


@needs_nixl
def test_a_run_over_nixl_changes_no_bit(small):
    config = small("run.steps=9", "cms.levels.medium.ranks=2", "exchange.compression=int8")
    runs = [InProcessRun(config, store=store).train() for store in (None, STORES["nixl"](10.0))]
    assert digest_plainly(runs[0].parameters) == digest_plainly(runs[1].parameters)


def test_nixl_that_is_not_installed_is_one_line_before_anything_starts(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: None if name == "nixl" else find(name))
    config = small("exchange.transport=nixl")
    with pytest.raises(
        UserError, match=r"exchange.transport is nixl, and the package nixl is not installed; .*pip install -e '\.\[nixl\]'"
    ):
        launch(config)
