"""The recoveries of a run: what interrupted it, when to give up, and the log that `summary.json` and `nlray status` show."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nlray.actors.faults import MAX_SAME_FAULTS, Fault, Recovery, RepeatGuard, RunFailedError, root_causes

MAX_TRIES = 10  # starts in a row that a further fault may cut short


@dataclass(kw_only=True)
class Interruption:
    """What stands between a run and its next step, until all roles have begun again.

    done: the run's step when it was interrupted. reached: the last step whose row is written; more than `done` where the fault came while
    steps were run again. seen_at: when the first fault was seen, seconds since 1970; 0 while there is none. faults: all of them. new: those
    that nothing has been done about yet. returned: the fault of a conductor that was started again, which explains the others.
    """

    done: int
    reached: int
    seen_at: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    new: list[Fault] = field(default_factory=list)
    returned: Fault | None = None
    tries: int = 0

    def add(self, faults: Sequence[Fault]) -> None:
        """Take in faults; the first of them sets `seen_at`."""
        if faults:
            self.seen_at = self.seen_at or time.time()
            self.faults += faults
            self.new += faults


class Recoveries:
    """Counts the faults of a run and keeps its log of recoveries.

    Args:
        note: takes events.
    """

    def __init__(self, note: Callable[..., None]) -> None:
        self.note = note
        self.log: list[Recovery] = []
        self._repeats = RepeatGuard()

    def load(self, saved: Sequence[dict[str, Any]]) -> None:
        """Continue the log that an earlier conductor wrote into `state.json`."""
        self.log = [Recovery(**r | {"kinds": tuple(r["kinds"]), "roles": tuple(r["roles"])}) for r in saved]

    def take_new(self, interruption: Interruption, restored: int) -> list[Fault]:
        """Return the faults that nothing has been done about yet, before another try to begin.

        restored: step of the recovery point that the run goes back to.

        Raises:
            RunFailedError: a fault has come `MAX_SAME_FAULTS` times at one step, or `MAX_TRIES` tries in a row were cut short.
        """
        new, interruption.new = interruption.new, []
        for fault in root_causes(new):
            if self._repeats.count(fault, restored) >= MAX_SAME_FAULTS:
                raise RunFailedError(f"{fault.message}; {MAX_SAME_FAULTS} times at step {fault.step}, given up", fault.details)
        if interruption.tries == MAX_TRIES:
            raise RunFailedError(f"{interruption.faults[-1].message}; {MAX_TRIES} starts in a row were cut short")
        interruption.tries += 1
        return new

    def end(self, interruption: Interruption, restored: int, source: str) -> Recovery | None:
        """Add a recovery to the log and return it; None where the roles began without a fault.

        restored: step of the recovery point. source: where it was found, as `Assigner.start_attempt` returns it.
        """
        causes = root_causes(interruption.faults)
        if interruption.returned is not None:
            causes = [interruption.returned, *causes]
        if not causes:
            return None
        recovery = Recovery(
            at=interruption.seen_at,
            kinds=tuple(fault.kind for fault in causes),
            roles=tuple(fault.label for fault in causes),
            message="; ".join(dict.fromkeys(fault.message for fault in causes)),
            # Where the worker was is known from its last report: it may have been further.
            step=max(interruption.reached, restored),
            restored=restored,
            source=source,
            replayed=max(0, interruption.done - restored),
            restore_s=time.time() - interruption.seen_at,
        )
        self.log.append(recovery)
        return recovery

    def note_step(self, step: int) -> bool:
        """Complete the last recovery when the run is where it was before; return whether that is now."""
        last = self.log[-1] if self.log else None
        if last is None or last.replay_s is not None or step < last.step:
            return False
        self.log[-1] = replace(last, replay_s=time.time() - last.at - last.restore_s)
        return True

    def tell(self, recovery: Recovery, num_hosts: int) -> None:
        """Write a recovery into the events."""
        if recovery.kinds[0] == "conductor":
            text = f"{recovery.message}: {num_hosts} actors found, continuing from {recovery.source}"
        else:
            text = (
                f"recovered in {recovery.restore_s:.1f} s: {recovery.message}; back from step {recovery.step} to {recovery.restored}, "
                f"from {recovery.source}; {recovery.replayed} steps run again"
            )
        self.note(text, recovery=recovery.as_dict())
