"""What the exchange of one level has counted in one worker."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Counters:
    """Sums since the start of the run, of this worker. stall_s: seconds in which the training thread waited for the exchange."""

    bytes_pushed: int = 0
    bytes_pulled: int = 0
    stall_s: float = 0.0
    skipped_updates: int = 0
