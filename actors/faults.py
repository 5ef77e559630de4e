"""What went wrong in a run, and when to give up: decisions without any I/O."""

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ray.exceptions import RayActorError, RayTaskError

from nlray.errors import NlrayError, UserError

MAX_SAME_FAULTS = 3

FaultKind = Literal["died", "hung", "raised", "conductor"]


class RunFailedError(NlrayError):
    """A run cannot go on. `details`: the remote traceback, where there is one."""

    def __init__(self, message: str, details: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.details = details
        self.exit_code = exit_code

    def __reduce__(self) -> tuple:
        return RunFailedError, (str(self), self.details, self.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that went wrong. role: whose; step: where the run was, as far as is known; message: one line; host: the actor, if known."""

    kind: FaultKind
    role: str
    step: int
    message: str
    details: str = ""
    host: str = ""


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
    """Return the faults that explain the others: an actor that is gone shows as an error in everyone who waits for it, a rank
    that raised in the workers."""
    for kinds, is_worker in ((("died", "hung"), None), (("raised",), False), (("raised",), True)):
        found = [f for f in faults if f.kind in kinds and (is_worker is None or f.role.startswith("sequence-") == is_worker)]
        if found:
            return found
    return list(faults)


class RepeatGuard:
    """Notices a fault that comes again at the same step.

    A fault is the same if it is of the same kind, in the same role, at a step at most `slack` away, and no recovery point was
    reached in between.
    """

    def __init__(self, slack: int = 2) -> None:
        self.slack = slack
        self._seen: dict[tuple[str, str, int], list[int]] = {}

    def count(self, fault: Fault, restored: int) -> int:
        """Return how many times the fault has come, this one included; `restored`: the step that the run goes back to."""
        steps = self._seen.setdefault((fault.kind, fault.role, restored), [])
        steps.append(fault.step)
        return sum(abs(step - fault.step) <= self.slack for step in steps)


def explain(error: BaseException) -> tuple[str, str, int]:
    """Return one line, the traceback, and the exit status for an error that crossed Ray."""
    details = "".join(traceback.format_exception(error))
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    if isinstance(cause, RayActorError):
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return (lines[-1] if lines else type(cause).__name__), details, 1
    return f"{cause}", details, 2 if isinstance(cause, UserError) else 1
