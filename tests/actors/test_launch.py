"""A launch that does not come to its end takes back what it has created."""

import os

import pytest
import ray

import nlray.actors.launch
from nlray.actors.control.conductor import namespace_of
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.launch import launch
from nlray.errors import RemoteTimeoutError, UserError
from tests.actors.conftest import run_to_end

pytestmark = pytest.mark.usefixtures("cluster")


def named(run: str) -> list[str]:
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == namespace_of(run)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RemoteTimeoutError])
def test_a_launch_that_is_cut_short_leaves_no_conductor_and_no_run(error, small, monkeypatch):
    config = small("run.steps=2")
    seen = []

    def wait_for(*_: object) -> None:
        seen.extend(named("run"))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(nlray.actors.launch, "wait_for", wait_for)
        with pytest.raises(error):
            launch(config)
    assert seen == [CONDUCTOR] and named("run") == []
    assert not os.path.exists(config.run.dir)
    # The same command, typed again.
    status, _, _ = run_to_end(config)
    assert status.state == "completed"


def test_a_launch_leaves_the_run_alone_whose_name_it_has(small):
    config = small("run.steps=100000")
    handle = launch(config)
    try:
        with pytest.raises(UserError, match=r"run\.name: a run run is going on in this cluster"):
            launch(small("run.steps=100000", "run.name=run", name="other"))
        assert CONDUCTOR in named("run") and handle.poll().state != "failed"
    finally:
        handle.close()
