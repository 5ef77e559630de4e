"""The messages between the actors. Big tensors travel as one flat float32 numpy array per (level, rank)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Literal

import numpy as np

from nlray.checkpoint import FilePart
from nlray.run_plan import RunPlan

RunState = Literal["starting", "running", "recovering", "finishing", "completed", "stopped", "failed"]
ENDED: tuple[RunState, ...] = ("completed", "stopped", "failed")
SEQUENCE = "sequence"


class Command(IntFlag):
    """What worker 0 adds to a step's all-reduce, so that every worker acts after the same step; each makes a recovery point there.

    STOP: end the training. POINT: nothing else. SWITCH: take over the levels that were prepared. PAUSE: end the training thread, for
    another number of workers.
    """

    NONE = 0
    STOP = 1
    POINT = 2
    SWITCH = 4
    PAUSE = 8


@dataclass(frozen=True, slots=True, order=True)
class Role:
    """What a host is: worker `index` (group `sequence`) or rank `index` of the level `group`."""

    group: str
    index: int

    def __str__(self) -> str:
        return f"{self.group}-{self.index}"

    @property
    def is_worker(self) -> bool:
        return self.group == SEQUENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A worker's gradients of one period for one level rank. Producer: exchange; consumer: level rank.

    buffer: [layout.size] float32, the sum over the period's good steps of the gradient of the global mean loss that falls to this
    worker, or its code where `exchange.compression` says so (`nlray.levels.compression`); on the way what the store returned for it.
    num_steps: good steps in it (the same in every worker); 0: all were skipped.
    """

    version: int
    worker: int
    num_steps: int
    buffer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PartKey:
    """Names one role's part of a recovery point: the boundary after `step`, as of one attempt of the workers."""

    attempt: int
    step: int
    owner: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A part that a host holds. Producer: host; consumer: conductor.

    group_size: roles in the owner's group when it was taken. has_shared: the state that all workers have alike is in it.
    is_protected: this is the owner's own part and another actor holds a copy.
    """

    key: PartKey
    group_size: int
    size_bytes: int
    has_shared: bool
    is_protected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCopy:
    """A part on its way to its backup or to a role that restores. arrays: by tensor name; None: those of the part `same_as`."""

    key: PartKey
    group_size: int
    state: dict[str, Any]
    arrays: Mapping[str, np.ndarray] | None
    same_as: PartKey | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a role that restores finds a part: in the host `holder`, or (None) in its own."""

    key: PartKey
    holder: Any | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A role for a host and the state to begin with. Producer: conductor; consumer: host.

    attempt: of the role; calls meant for another one do not reach it. sources: parts to restore from; none: `checkpoint`, a URL;
    neither: the initial state.
    """

    role: Role
    attempt: int
    plan: RunPlan
    sources: tuple[Source, ...] = ()
    checkpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWritten:
    """One actor's part of a checkpoint. `state`: what of it is not a tensor. Producer: any actor; consumer: conductor."""

    step: int
    part: FilePart
    state: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleError:
    """What ended a role. message: one line; is_final: to run the same steps again would end the same way."""

    message: str
    details: str
    step: int
    exit_code: int = 1
    is_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a sequence worker tells at a poll. rows: lines of metrics.jsonl after the step that the conductor has written.

    state: `idle` before the start; `ended` after the last step or a stop; `paused` for another number of workers. switched: attempt ->
    step of the boundary at which the prepared ranks of that attempt were taken over. prepared: attempt of those that are not yet.
    """

    state: Literal["idle", "running", "paused", "ended", "failed"]
    step: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    switched: dict[int, int] = field(default_factory=dict)
    prepared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What a host tells the conductor at a poll. role None: a standby. bytes_copied: sent to backups since the host's start."""

    role: Role | None
    attempt: int
    group_size: int
    is_started: bool
    pid: int
    node: str
    holdings: tuple[Holding, ...]
    bytes_held: int
    bytes_copied: int
    error: RoleError | None = None
    worker: WorkerReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStatus:
    """One actor of a run, for `nlray status` and the fault injector. role: `standby` or `backup` where it has none."""

    role: str
    actor: str
    pid: int
    node: str
    is_ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the conductor tells the command line: rows after the asker's step, and events from its position on."""

    state: RunState
    rows: list[dict[str, Any]]
    events: list[str]
    message: str | None = None
    traceback: str | None = None
    exit_code: int = 0
    summary: dict[str, Any] | None = None
    next_event: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDescription:
    """A run as it is now, for `nlray status`, `nlray scale` and the fault injector. pid, node: the conductor's; 0 and empty after
    the end, when `summary` is there.

    sizes: workers and ranks by group (`sequence` or a level's name). wanted: sizes asked for and not yet in force.
    recoveries: one dict per recovery, as in summary.json.
    """

    name: str
    dir: str
    state: RunState
    step: int
    steps: int
    point: int | None
    sizes: dict[str, int]
    wanted: dict[str, int]
    actors: tuple[ActorStatus, ...]
    recoveries: tuple[dict[str, Any], ...]
    row: dict[str, Any] | None
    pid: int
    node: str
    summary: dict[str, Any] | None = None
