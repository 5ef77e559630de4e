"""What went wrong in a run, and when to give up. Nothing here calls Ray or reads a file.

A run without Ray (`nlray train --local`) imports this module, which imports Ray only where an error has crossed it.
"""

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nlray.actors.types import Role
from nlray.errors import NlrayError, RemoteTimeoutError, UserError

MAX_SAME_FAULTS = 3

FaultKind = Literal["died", "hung", "raised", "conductor"]


class RunFailedError(NlrayError):
    """A run cannot continue. `details`: the remote traceback, where there is one."""

    def __init__(self, message: str, details: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.details = details
        self.exit_code = exit_code

    def __reduce__(self) -> tuple:
        return RunFailedError, (str(self), self.details, self.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that went wrong.

    role: whose; None: the actor had no role. host: name of the actor. step: where the run was, as far as is known; 0: unknown.
    message: one line. details: the remote traceback, where there is one.
    """

    kind: FaultKind
    role: Role | None
    host: str
    message: str
    step: int = 0
    details: str = ""

    @property
    def label(self) -> str:
        """The role, or the actor's name where it had none."""
        return str(self.role or self.host)


class HostFaultError(NlrayError):
    """A host was lost, or raised, while it was called.

    fault: what happened. cause: the host's own exception, where it raised. exit_code: 2 where a user's input is at fault.
    """

    def __init__(self, fault: Fault, cause: BaseException | None = None, exit_code: int = 1) -> None:
        super().__init__(fault.message)
        self.fault, self.cause, self.exit_code = fault, cause, exit_code

    @property
    def is_timeout(self) -> bool:
        """Whether the host waited for another one until its limit."""
        return isinstance(self.cause, RemoteTimeoutError)

    @classmethod
    def from_call(cls, error: Exception, role: Role | None, host: str) -> "HostFaultError":
        """Return what the failed call to a host means."""
        from ray.exceptions import RayTaskError

        message, details, exit_code = explain(error)
        cause = error.cause if isinstance(error, RayTaskError) else error
        return cls(Fault(kind="raised", role=role, host=host, message=message, details=details), cause, exit_code)

    def __reduce__(self) -> tuple:
        return HostFaultError, (self.fault, self.cause, self.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One recovery, as `summary.json` and `events.jsonl` have it. Times in seconds, `at` since 1970.

    at: when the fault was seen. kinds, roles: what failed. step: how far the run had been. restored: step of the recovery point; `source`:
    from memory, from storage or from the start. replayed: steps that were thrown away and are run again; less than from `restored` to
    `step` where the fault came while steps were run again. restore_s: from seeing the fault to the first step being run.
    replay_s: from there until the run is where it was, None until then.
    """

    at: float
    kinds: tuple[str, ...]
    roles: tuple[str, ...]
    message: str
    step: int
    restored: int
    source: str
    replayed: int
    restore_s: float
    replay_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kinds": list(self.kinds), "roles": list(self.roles)}


def root_causes(faults: Sequence[Fault]) -> list[Fault]:
    """Return the faults that explain the others.

    A lost actor shows as an error in every actor that waits for it. An error in a rank shows as an error in the workers.
    """
    lost = [f for f in faults if f.kind in ("died", "hung")]
    raised = [f for f in faults if f.kind == "raised"]
    in_ranks = [f for f in raised if f.role is None or not f.role.is_worker]
    return lost or in_ranks or raised or list(faults)


class RepeatGuard:
    """Counts how often a fault comes at the same step.

    Two faults are the same if kind and role are equal, their steps are at most `slack` apart, and the run reached no recovery point
    between them.
    """

    def __init__(self, slack: int = 2) -> None:
        self.slack = slack
        self._seen: dict[tuple[str, str, int], list[int]] = {}

    def count(self, fault: Fault, restored: int) -> int:
        """Return how many times the fault has come, this one included; `restored`: the step that the run goes back to."""
        steps = self._seen.setdefault((fault.kind, fault.label, restored), [])
        steps.append(fault.step)
        return sum(abs(step - fault.step) <= self.slack for step in steps)


def explain(error: BaseException) -> tuple[str, str, int]:
    """Return one line, the traceback, and the exit status for an error that crossed Ray."""
    from ray.exceptions import RayActorError, RayTaskError

    details = "".join(traceback.format_exception(error))
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    if isinstance(cause, RayActorError):
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return (lines[-1] if lines else type(cause).__name__), details, 1
    return f"{cause}", details, 2 if isinstance(cause, UserError) else 1
