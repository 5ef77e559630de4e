"""The states of a run as the conductor sees it. `State.step` does what is due and returns the next state.

    new run:                Starting ──► Beginning ──► Running ──► Finishing ──► Closing ──► Ended
    conductor came back:    Returning ─► Running, or Beginning
    fault:                  Running ──► Recovering ──► Beginning ──► Running
    more or fewer workers:  Running ──► Beginning ──► Running
    stopped while waiting for resources, or failed: any ──► Closing ──► Ended

A fault of a host comes as a value of `Monitor.look` or as a HostFaultError from any call; `Supervisor.step` gives the latter to
`State.on_fault`. Nothing here calls Ray: tests/actors/test_conductor.py drives the states with hosts of its own.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nlray.actors.control.recoveries import Interruption
from nlray.actors.faults import Fault, HostFaultError, RunFailedError
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.types import RunState

if TYPE_CHECKING:
    from nlray.actors.control.supervisor import Supervisor

POLL_S, MAX_POLL_S = 0.2, 1.0
URGENT_POLL_S = 0.01
SYMPTOM_S = 0.5  # an error is often seen before the death that explains it


class State:
    """One state. status: what `nlray status` shows."""

    status: RunState

    def step(self, run: "Supervisor") -> "State":
        """Do what is due now and return the next state.

        Raises:
            HostFaultError: a host was lost or raised on the way; `on_fault` says what follows.
            StoppedError, RunFailedError, and any other error: the run ends.
        """
        raise NotImplementedError

    def on_fault(self, run: "Supervisor", error: HostFaultError) -> "State":
        """Return the state after a step that a fault has cut short."""
        _raise_if_final(error, is_final=False)
        return Recovering([run.monitor.at_step(error.fault)])

    def pause_s(self, run: "Supervisor") -> float:
        """Return the seconds until the next step."""
        return 0.0


class Starting(State):
    """The first start of a new run or of a resume."""

    status: RunState = "starting"

    def step(self, run: "Supervisor") -> State:
        run.checkpoints.start()
        # From here on a conductor that is started again looks for the run's actors.
        run.save_state()
        for event in run.notes:
            run.note(event)
        return Beginning(run.interruption(), "starting")


class Returning(State):
    """The conductor's process was killed and is back: the run continues with its actors as they are, where they are all there."""

    status: RunState = "recovering"

    def __init__(self, saved: dict[str, Any]) -> None:
        self.saved = saved

    def step(self, run: "Supervisor") -> State:
        run.load_state(self.saved)
        interruption = run.interruption()
        interruption.seen_at = time.time()
        interruption.returned = Fault(
            kind="conductor", role=None, host=CONDUCTOR, step=run.monitor.step, message="the conductor was killed and started again"
        )
        run.checkpoints.stored()
        run.hosts.find(run.assigner.plan_of)
        interruption.add([run.monitor.at_step(fault) for fault in run.hosts.hear_all()])
        try:
            if not interruption.faults and run.assigner.adopt():
                run.assigner.set_backups()
                run.recoveries.end(interruption, run.monitor.step, "the running actors")
                run.recoveries.note_step(run.monitor.step)
                run.tell_recovery()
                return Running()
        except HostFaultError as error:
            interruption.add([run.monitor.at_step(error.fault)])
        return Beginning(interruption, "recovering")


class Recovering(State):
    """A fault was seen: look for what explains it, and let go of the checkpoints that are being written."""

    status: RunState = "recovering"

    def __init__(self, faults: list[Fault]) -> None:
        self.faults, self.seen_at = faults, time.time()

    def step(self, run: "Supervisor") -> State:
        interruption = run.interruption()
        interruption.seen_at = self.seen_at
        interruption.add(self._causes(run))
        run.checkpoints.abandon()
        return Beginning(interruption, "recovering")

    def _causes(self, run: "Supervisor") -> list[Fault]:
        if any(fault.kind != "raised" for fault in self.faults):
            return self.faults
        time.sleep(SYMPTOM_S)
        try:
            return run.look() or self.faults
        except HostFaultError as error:
            return [*self.faults, run.monitor.at_step(error.fault)]


@dataclass
class Beginning(State):
    """Every role begins at the best recovery point. One step is one try; a fault that cuts it short leads to the next.

    status: `starting`, `recovering`, or `running` where the number of workers changes. sizes: those before such a change.
    """

    interruption: Interruption
    status: RunState
    sizes: dict[str, int] | None = None

    def __post_init__(self) -> None:
        self._since_s = time.monotonic()

    def step(self, run: "Supervisor") -> State:
        for fault in run.recoveries.take_new(self.interruption, restored=run.monitor.committed[1]):
            host = run.hosts.all.get(fault.host)
            if host is not None and fault.kind in ("died", "hung"):
                run.hosts.remove(host, is_hung=fault.kind == "hung")
        restored, source, lost = run.begin()
        self.interruption.add([run.monitor.at_step(fault) for fault in lost])
        recovery = run.recoveries.end(self.interruption, restored, source)
        if self.sizes is not None:
            sizes = run.assigner.sizes
            changed = ", ".join(f"{n}={self.sizes[n]} -> {n}={size}" for n, size in sizes.items() if size != self.sizes[n])
            run.note(f"step {run.monitor.step}: {changed}; the steps paused for {time.monotonic() - self._since_s:.1f} s")
        if recovery is not None:
            run.tell_recovery()
        return Running()

    def on_fault(self, run: "Supervisor", error: HostFaultError) -> State:
        # A start that waited until its limit would wait that long again.
        _raise_if_final(error, is_final=error.is_timeout)
        self.interruption.add([run.monitor.at_step(error.fault)])
        return self


class Running(State):
    """The workers train. One step takes in what the hosts report and does what follows from it."""

    status: RunState = "running"

    def step(self, run: "Supervisor") -> State:
        run.journal.catch_up()
        faults = run.look()
        if faults:
            return Recovering(faults)
        run.monitor.note_commit()
        if run.monitor.is_trained and run.monitor.is_last_committed:
            run.checkpoints.begin(run.monitor.point)
        run.checkpoints.advance()
        self._send_stop(run)
        if run.changes.advance(run.monitor.committed):
            return Beginning(run.interruption(), "running", run.assigner.sizes)
        if run.changes.has_changed:
            run.save_state()
        run.assigner.spread_copies(run.monitor.committed)
        if not run.monitor.is_trained:
            return self
        if run.is_written:
            return Closing("completed" if run.monitor.step >= run.config.steps else "stopped")
        return self if isinstance(self, Finishing) else Finishing()

    def _send_stop(self, run: "Supervisor") -> None:
        run.send_stop()

    def pause_s(self, run: "Supervisor") -> float:
        # An answer takes milliseconds of a core: a tenth of a step where steps are long.
        return URGENT_POLL_S if run.changes.is_urgent else min(max(POLL_S, run.monitor.step_s / 10), MAX_POLL_S)


class Finishing(Running):
    """The workers have ended; the last checkpoint is on its way to storage."""

    status: RunState = "finishing"

    def _send_stop(self, run: "Supervisor") -> None:
        """Leave it: there is nothing left to stop."""


@dataclass
class Closing(State):
    """The run has come to its end: the summary is written and the resources are given back."""

    end: RunState
    failure: RunFailedError | None = None
    status: RunState = "finishing"

    def step(self, run: "Supervisor") -> State:
        run.close(self.end, self.failure)
        return Ended(self.end)


@dataclass
class Ended(State):
    """Nothing follows. status: `completed`, `stopped` or `failed`."""

    status: RunState

    def step(self, run: "Supervisor") -> State:
        return self


def _raise_if_final(error: HostFaultError, *, is_final: bool) -> None:
    """Raise RunFailedError where the same call would fail in the same way: a user's input is at fault, or `is_final`."""
    if is_final or error.exit_code == 2:
        raise RunFailedError(error.fault.message, error.fault.details, error.exit_code) from error
