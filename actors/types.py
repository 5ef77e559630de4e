"""The messages between the actors. Big tensors travel as one flat float32 numpy array per (level, rank)."""

from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Literal

import numpy as np

from nlray.checkpoint import FilePart

RunState = Literal["starting", "running", "finishing", "completed", "stopped", "failed"]
ENDED: tuple[RunState, ...] = ("completed", "stopped", "failed")


class Command(IntFlag):
    """What worker 0 adds to a step's all-reduce, so that every worker acts after the same step."""

    NONE = 0
    STOP = 1


@dataclass(frozen=True, slots=True)
class Contribution:
    """A worker's gradients of one period for one level rank. Producer: exchange; consumer: level rank.

    buffer: [layout.size] float32, the sum over the period's good steps of the gradient of the global mean loss that falls
    to this worker. num_steps: good steps in it (the same in every worker); 0: all were skipped.
    """

    version: int
    worker: int
    num_steps: int
    buffer: np.ndarray


@dataclass(frozen=True, slots=True)
class Version:
    """A published version of one rank's share. Producer: level rank; consumer: exchange.

    data: what the rank's store returned for the flat parameters, [layout.size] float32. grad_norm: norm of the mean gradient
    of the whole level before clipping, NaN for version 0. is_skipped: the update was left out: no good step in the period, or a
    gradient that is not finite.
    """

    version: int
    data: Any
    grad_norm: float
    is_skipped: bool


@dataclass(frozen=True, slots=True)
class PartWritten:
    """One actor's part of a checkpoint. `state`: what of it is not a tensor. Producer: any actor; consumer: conductor."""

    step: int
    part: FilePart
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a sequence worker tells the conductor at a poll. rows: lines of metrics.jsonl since the last poll (worker 0).

    held: steps whose snapshot waits to be written. error: the traceback's last line and the whole of it, None while well.
    """

    state: Literal["starting", "running", "ended", "failed"]
    step: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What the conductor tells the command line: rows and events from the asker's position on, and the position after them."""

    state: RunState
    rows: list[dict[str, Any]]
    events: list[str]
    message: str | None = None
    traceback: str | None = None
    exit_code: int = 0
    summary: dict[str, Any] | None = None
    next_row: int = 0
    next_event: int = 0
