"""How far a sequence worker is, and what it has to report: rows of metrics, events and totals."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nlray.actors.types import WorkerReport
from nlray.actors.workers.data_parallel import Agreement
from nlray.pipelines.source_stream import Skipped

MAX_SKIPPED_IN_A_ROW = 10
TrainingState = Literal["idle", "running", "paused", "ended", "failed"]


class Progress:
    """Written by the training thread, read by any.

    Args:
        step_tokens: tokens of the global batch.
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.state: TrainingState = "idle"
        self.step = 0
        """The last step that is done."""
        self.num_skipped = 0
        self.skipped_in_a_row = 0
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        self._events: list[str] = []
        self._totals: dict[str, Any] = {"seconds": 0.0, "stall_s": 0.0}

    def report(self, rows_after: int) -> WorkerReport:
        """Return where the training is; rows up to step `rows_after` are dropped, later ones come again in the next report."""
        with self._lock:
            self._rows = [row for row in self._rows if row["step"] > rows_after]
            events, self._events = self._events, []
            return WorkerReport(state=self.state, step=self.step, rows=list(self._rows), events=events, totals=self._totals)

    @property
    def rows(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._rows)

    @property
    def totals(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._totals)

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue after `step` with what `state_dict` returned."""
        self.step = step
        self._rows = list(state.get("rows", []))
        self.num_skipped, self.skipped_in_a_row = state["num_skipped"], state["skipped_in_a_row"]
        self._totals = dict(state["totals"])

    def state_dict(self, *, with_rows: bool) -> dict[str, Any]:
        """Return what a snapshot holds of it; rows only where they are to be in the snapshot."""
        return {
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "totals": self.totals,
            "rows": self.rows if with_rows else [],
        }

    def add_event(self, event: str) -> None:
        with self._lock:
            self._events.append(event)

    def add_row(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows.append(row)

    def add_seconds(self, seconds: float) -> None:
        """Add time that the training took outside of a step."""
        with self._lock:
            self._totals = {**self._totals, "seconds": self._totals["seconds"] + seconds}

    def count_step(
        self, step: int, agreement: Agreement, *, seconds: float, stall_s: float, learning_rate: float, levels: dict[str, Any]
    ) -> dict[str, Any]:
        """Add a step to the totals and return its row of metrics. levels: the row's part of each level, by name."""
        loss = agreement.loss if agreement.is_finite else None
        with self._lock:
            totals = self._totals
            self._totals = {
                **totals,
                "seconds": totals["seconds"] + seconds,
                "stall_s": totals["stall_s"] + stall_s,
                "loss_first": loss if totals.get("loss_first") is None else totals["loss_first"],
                "loss_last": loss,
                "num_skipped": self.num_skipped,
                "levels": levels,
            }
        return {
            "step": step,
            "tokens": step * self.step_tokens,
            "loss": loss,
            "tokens_per_second": self.step_tokens / seconds,
            "stall_s": stall_s,
            "lr": learning_rate,
            "skipped": self.num_skipped,
            "levels": levels,
        }

    def count_skipped(self, step: int) -> None:
        """Count a step that was skipped."""
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        self.add_event(f"step {step}: loss or gradient not finite; the step is skipped in every worker and level")

    def count_left_out(self, step: int, skipped: Sequence[Skipped]) -> None:
        """Count the records that the sources leave out; an event when the first is met, and each time they have doubled."""
        with self._lock:
            before = self._totals.get("records_skipped") or [0] * len(skipped)
            self._totals = {**self._totals, "records_skipped": [source.num_records for source in skipped]}
        for index, (source, earlier) in enumerate(zip(skipped, before, strict=True)):
            if source.num_records.bit_length() > earlier.bit_length():
                left_out = f"{source.num_records} records left out so far, in all passes (on_error=skip)"
                example = f", one of them: {source.example}" if source.example else ""
                self.add_event(f"step {step}: data.sources[{index}]: {left_out}{example}")

    def add_evaluation(self, step: int, loss: float, by_tag: Mapping[str, float]) -> None:
        """Note a held-out loss, in nats per token, and that of each tag value."""
        with self._lock:
            self._totals = {**self._totals, "eval_loss": loss, "eval_loss_by_tag": by_tag}
        details = f" ({', '.join(f'{name} {value:.4f}' for name, value in by_tag.items())})" if 1 < len(by_tag) <= 8 else ""
        self.add_event(f"step {step}: held-out loss {loss:.4f}{details}")
