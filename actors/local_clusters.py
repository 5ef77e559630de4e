"""The Ray clusters that this user's own processes on this machine belong to: the only ones that nlray joins without being told to.

A process that joins a Ray cluster runs what the cluster's processes send it. A run's folder may come from anybody, so what its state.json
says about the cluster is only looked up here. See `docs/trust.md`.
"""

import os

import psutil
from ray._raylet import AuthenticationTokenLoader
from ray._raylet import Config as RayConfig

_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def own_raylet(address: str) -> psutil.Process | None:
    """Return a raylet on this machine that this user started and that belongs to the cluster at `address`; None: there is none."""
    for process in psutil.process_iter():
        try:
            is_own = process.uids().real == os.getuid() and process.name() == "raylet"
            if is_own and f"--gcs-address={address}" in process.cmdline():
                return process
        except psutil.Error:  # it has ended, or is another user's
            continue
    return None


def take_token(raylet: psutil.Process) -> None:
    """Have this process send the token that a raylet's cluster asks for: its environment says which. Without one Ray's own rules hold."""
    environment = raylet.environ()
    if environment.get(_MODE, "").lower() != "token":
        return
    os.environ[_MODE] = "token"
    os.environ.pop(_TOKEN, None)
    if _TOKEN in environment:
        os.environ[_TOKEN] = environment[_TOKEN]
    else:
        default = os.path.join(environment.get("HOME", os.path.expanduser("~")), ".ray", "auth_token")
        os.environ[_TOKEN_PATH] = environment.get(_TOKEN_PATH, default)
    # Both were read, and kept, when Ray was imported.
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
