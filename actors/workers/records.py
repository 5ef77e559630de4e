"""What a run's folder says: its configuration, `state.json` and `summary.json`, in the shape that nlray gives them.

The folder may come from anybody: a file of another shape counts as damaged, which one line says, and no address in it is looked up.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nlray.actors.control.journal import LAUNCHED
from nlray.actors.types import ENDED, RunDescription, RunState, RunStatus
from nlray.config import Config
from nlray.config.loading import read_run_config
from nlray.errors import UserError
from nlray.metrics import read_events, read_rows, warn_once
from nlray.run_folder import CONFIG, EVENTS, STATE, SUMMARY, RunFolder
from nlray.run_plan import sizes_of
from nlray.trust import DAMAGED

_ADDRESS = re.compile(r"[\w.\-]+:\d+|\[[\da-fA-F:.]+\]:\d+")
_LARGEST = 1 << 62
_LAST_TIME = 1 << 33  # seconds since 1970 that a date can be made of everywhere
_NUMBER = (int, float, type(None))
_TEXT = (str, type(None))
_STATE = {"status": str, "address": str}
_SUMMARY = {"status": str, "steps": int}
_OF_A_SUMMARY = {
    "tokens": (int, type(None)),
    "loss_first": _NUMBER,
    "loss_last": _NUMBER,
    "eval_loss": _NUMBER,
    "tokens_per_second": _NUMBER,
    "stall_fraction": _NUMBER,
    "recoveries": int,
    "replayed_steps": int,
    "recovery_log": list,
    "checkpoint": _TEXT,
    "digest": _TEXT,
    "error": _TEXT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What a run's folder says. state: of `state.json`, None before the actors stand, empty if damaged; summary: None before the end."""

    run_dir: str
    config: Config
    state: dict[str, Any] | None
    summary: dict[str, Any] | None

    @property
    def ended(self) -> RunState | None:
        """How the run ended; None: it is going on, or was cut off."""
        return self.summary["status"] if self.summary is not None and self.summary["status"] in ENDED else None

    @property
    def address(self) -> str | None:
        """HOST:PORT of the cluster that the folder names; None where it says none."""
        return self.state["address"] or None if self.state else None

    @property
    def local_process(self) -> str | None:
        """The process of a local run (`nlray train --local`), in words; None: the run is on a cluster."""
        return f"process {self.state['pid']} on {self.state['node']}" if self.state and not self.state["address"] else None

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`."""
        return read_rows(self.run_dir)

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of `events.jsonl`."""
        found = read_events(self.run_dir)
        kept = [event for event in found if 0 <= event["time"] < _LAST_TIME]
        if len(kept) < len(found):
            warn_once(f"{self.run_dir}/{EVENTS}: {len(found) - len(kept)} of {len(found)} events have no time that is one; left out")
        return kept

    def describe(self) -> RunDescription:
        """Return the ended run as its conductor would have described it."""
        rows, summary = self.rows(), self.summary
        return RunDescription(
            name=self.config.run.name,
            dir=self.run_dir,
            state=summary["status"],
            step=summary["steps"],
            steps=self.config.run.steps,
            point=None,
            sizes=sizes_of(self.config),
            wanted={},
            actors=(),
            recoveries=tuple(summary.get("recovery_log", ())),
            row=rows[-1] if rows else None,
            pid=0,
            node="",
            summary=summary,
        )

    def status(self, rows_after: int, events_from: int) -> RunStatus:
        """Return what the conductor of the ended run would tell."""
        rows = [row for row in self.rows() if row["step"] > rows_after]
        events = [event["text"] for event in self.events()]
        return RunStatus(
            state=self.ended,
            rows=rows,
            events=events[events_from:],
            message=self.summary.get("error"),
            exit_code=1 if self.ended == "failed" else 0,
            summary=self.summary,
            next_event=len(events),
        )


def read_records(run_dir: str) -> Records | None:
    """Return what a run's folder or URL says; None if it holds no run.

    Raises:
        UserError: a file there that is not as nlray writes it.
    """
    run_dir = run_dir.rstrip("/")
    # The folder may have been moved.
    config = read_run_config(run_dir, [f"run.dir={json.dumps(run_dir)}"])
    if config is None:
        return None
    folder = RunFolder(run_dir)
    state = _read_or_empty(folder, STATE, _is_state)
    if state and state["status"] == LAUNCHED:
        state = None
    summary = _read_or_empty(folder, SUMMARY, _is_summary)
    if summary == {} and state and state["status"] in ENDED and _is_summary(state.get("summary")):
        # An ended run's state has its summary too.
        summary = state["summary"]
    return Records(run_dir=run_dir, config=config, state=state, summary=summary or None)


def find_records(run: str, address: str | None = None) -> Records | None:
    """Return what the folder of RUN says; None if RUN is a name: without an address `runs/NAME` is looked at too.

    Raises:
        UserError: RUN is a path or URL, and no run is there.
    """
    found = read_records(run)
    if found is None and ("/" in run or os.path.isdir(run)):
        raise UserError(f"{run}: holds no run (no {CONFIG})")
    return read_records(f"runs/{run}") if found is None and address is None else found


def _read_or_empty(folder: RunFolder, name: str, is_right: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
    """Return what a file of a run says; None: there is none; empty: it is damaged, which is said once."""
    try:
        found = folder.read_object(name)
    except UserError as error:
        warn_once(str(error))
        return {}
    if found is not None and not is_right(found):
        warn_once(f"{folder.file(name)}: {DAMAGED}")
        return {}
    return found


def _is_state(found: dict[str, Any]) -> bool:
    if not _fits(found, _STATE):
        return False
    is_local = found["address"] == "" and _fits(found, {"pid": int, "node": str})
    return found["status"] == LAUNCHED or is_local or _ADDRESS.fullmatch(found["address"]) is not None


def _is_summary(found: Any) -> bool:
    return isinstance(found, dict) and _fits(found, _SUMMARY) and _fits(found, {k: v for k, v in _OF_A_SUMMARY.items() if k in found})


def _fits(found: dict[str, Any], kinds: dict[str, Any]) -> bool:
    """Return whether values are of the types that nlray writes, and numbers of a size that can be shown."""
    values = [(found.get(key), kind) for key, kind in kinds.items()]
    return all(isinstance(v, kind) and not isinstance(v, bool) and not (isinstance(v, int) and abs(v) > _LARGEST) for v, kind in values)
