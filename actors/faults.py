"""What went wrong in a run, and when to give up: decisions without any I/O."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

MAX_SAME_FAULTS = 3

FaultKind = Literal["died", "hung", "raised", "conductor"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that went wrong. role: whose; step: where the run was, as far as is known; message: one line; seat: the actor, if known."""

    kind: FaultKind
    role: str
    step: int
    message: str
    details: str = ""
    seat: str = ""


@dataclass(frozen=True, slots=True)
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
