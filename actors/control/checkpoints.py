"""Checkpoints on storage: the hosts write recovery points from their snapshot stores, in the background; the manifest completes them."""

import posixpath
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nlray.actors.control.assignment import Assigner
from nlray.actors.control.outages import RETRY_S, Outage
from nlray.actors.faults import HostFaultError, RunFailedError
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.recovery.points import Point, complete_points, complete_state, part_file
from nlray.actors.types import PartKey, PartWritten, Role
from nlray.checkpoint import checkpoint_dir, latest_checkpoint, read_manifest, write_manifest
from nlray.errors import CheckpointError, RemoteTimeoutError
from nlray.rotation import delete_old_checkpoints, put_aside_after
from nlray.storage import locate, may_pass, reason


@dataclass(kw_only=True)
class Writing:
    """A checkpoint on its way to storage. parts: owner and host by the call that writes a part; begun_s: time of the calls."""

    point: Point
    url: str
    parts: dict[Any, tuple[Role, str]]
    begun_s: float


class Checkpoints:
    """The checkpoints of one run.

    Args:
        assigner: who sits where.
        first: URL of the checkpoint that the run started from, or None.
        flush: writes out the rows up to now; called before a manifest, so that a resumed run finds them.
        note: takes events.
    """

    def __init__(self, assigner: Assigner, first: str | None, flush: Callable[[], None], note: Callable[[str], None]) -> None:
        self.assigner, self.first, self.flush, self.note = assigner, first, flush, note
        self.run_dir, self.recovery = assigner.config.run.dir, assigner.config.recovery
        self.timeout_s = assigner.config.run.timeout_s
        self.newest: str | None = first
        self.written_step = 0 if first is None else read_manifest(first, verify=False).step
        self.digest: str | None = None
        self._known = set() if first is None else {first}
        self._writing: dict[int, Writing] = {}
        self._outage = Outage(f"checkpoints in {self.run_dir}", self.timeout_s, note)

    def start(self) -> None:
        """Put aside what the run does not continue from: checkpoints that are newer than its first, damaged or not."""
        self._put_aside_after(-1 if self.first is None else self.written_step)

    def _put_aside_after(self, step: int) -> None:
        for renamed in put_aside_after(self.run_dir, step):
            self.note(f"put aside {renamed}: it is not what the run continues from")

    @property
    def steps_under_way(self) -> tuple[int, ...]:
        return tuple(self._writing)

    def is_due(self, step: int) -> bool:
        """Return whether the recovery point of a step goes to storage."""
        every = self.recovery.checkpoint_every
        return every > 0 and step % every == 0

    def begin(self, point: Point) -> None:
        """Have a recovery point written by those who hold its parts, unless that has been done."""
        if point.step > self.written_step and point.step not in self._writing:
            self._writing[point.step] = self._write(point)

    def _write(self, point: Point) -> Writing:
        shared_owner, shared_host = min(point.shared)
        calls = {}
        for role, hosts in point.holders.items():
            host = shared_host if role == shared_owner else hosts[0]
            calls[self._write_call(host, point.key(role), with_shared=role == shared_owner)] = role, host
        return Writing(point=point, url=checkpoint_dir(self.run_dir, point.step), parts=calls, begun_s=time.monotonic())

    def advance(self) -> None:
        """Write the manifest of each checkpoint whose parts are all on storage, in the order of their steps.

        Where the storage fails for a while the newest is written again, and older ones are given up.

        Raises:
            HostFaultError: a role died or raised while it wrote.
            RunFailedError: the storage has failed for too long.
        """
        for step, writing in sorted(self._writing.items()):
            ready, late = self.assigner.hosts.finished(writing.parts)
            try:
                for ref in ready:
                    self._part(ref, *writing.parts[ref], step=step)
                if late:
                    # What is older than a complete checkpoint is deleted.
                    break
                self._complete(step, writing)
                del self._writing[step]
                self._outage.end()
            except Exception as error:
                self._meet(error, writing)
                if late:
                    break
                if step < max(self._writing):
                    self._give_up(step, writing)
                elif time.monotonic() - writing.begun_s > RETRY_S:
                    self._writing[step] = self._write(writing.point)
        self._outage.check()

    def _meet(self, error: Exception, writing: Writing) -> None:
        """Take in that a checkpoint could not be written; raise where that will not pass."""
        cause = error.cause or error if isinstance(error, HostFaultError) else error
        if may_pass(cause):
            self._outage.meet(cause)
        elif isinstance(cause, OSError):
            raise RunFailedError(f"{writing.url} cannot be written: {reason(cause)}") from error
        else:
            raise error

    def _give_up(self, step: int, writing: Writing) -> None:
        del self._writing[step]
        # What has been written of it takes up the room that may be lacking.
        with suppress(Exception):
            fs, path = locate(writing.url)
            fs.rm(path, recursive=True)
        self.note(f"step {step}: no checkpoint; that of step {max(self._writing)} takes its place")

    def abandon(self) -> None:
        """Let the parts that are being written end; the folder stays without a manifest and is written again."""
        for writing in self._writing.values():
            _, late = self.assigner.hosts.finished(writing.parts, self.recovery.hang_timeout_s)
            if late:
                self.note(f"the checkpoint {posixpath.basename(writing.url)} is left torn: {len(late)} parts were not written in time")
        self._writing = {}

    def stored(self) -> tuple[int, str] | None:
        """Return step and URL of the newest complete checkpoint on storage, or None; a damaged one that is newer is put aside."""
        try:
            url = latest_checkpoint(self.run_dir, warn=self.note)
        except CheckpointError as error:
            if self.newest is not None:
                # Not put aside: where it is the storage that fails, they are good again later.
                self.note(f"{error}; the next one is the first")
            self.newest, self.written_step, self.digest = None, 0, None
            return None
        manifest = read_manifest(url, verify=False)
        if url != self.newest:
            self._put_aside_after(manifest.step)
        self.newest, self.written_step, self.digest = url, manifest.step, manifest.digest
        self._known.add(url)
        return manifest.step, url

    def rescue(self) -> None:
        """Write the best recovery point in memory, from whoever holds its parts, before the run is given up."""
        self.abandon()
        held = {n: m.report.holdings for n, m in self.assigner.hosts.all.items() if m.report is not None}
        point = next(iter(complete_points(held | {CONDUCTOR: self.assigner.snapshots.holdings()}, self.assigner.groups)), None)
        if point is not None and point.step > self.written_step:
            self.begin(point)
            self.assigner.hosts.finished(self._writing[point.step].parts, self.timeout_s)
            self.advance()
            if self._writing:
                raise self._outage.error or RemoteTimeoutError(f"not written after {self.timeout_s:g} s (run.timeout_s)")

    def _write_call(self, host: str, key: PartKey, *, with_shared: bool) -> Any:
        handle = self.assigner.hosts.actor(host)
        return handle.write.remote(key, checkpoint_dir(self.run_dir, key.step), part_file(key.owner), with_shared)

    def _part(self, call: Any, owner: Role, host: str, step: int) -> PartWritten:
        return self.assigner.hosts.answer(call, owner, host, f"while it wrote the checkpoint of step {step}")

    def _complete(self, step: int, writing: Writing) -> None:
        by_owner = {str(owner): self._part(call, owner, host, step) for call, (owner, host) in writing.parts.items()}
        written = list(by_owner.values())
        state = complete_state(by_owner, [level.name for level in self.assigner.plan.levels])
        self.flush()
        self.digest = write_manifest(writing.url, step, [w.part for w in written], state).digest
        self.newest, self.written_step = writing.url, step
        self._known.add(writing.url)
        self._delete_old()
        size = sum(w.part.size_bytes for w in written)
        self.note(f"step {step}: checkpoint {posixpath.basename(writing.url)} written, {size / 1e6:.1f} MB")

    def _delete_old(self) -> None:
        protected = [url for url in (self.newest, self.first) if url is not None]
        try:
            delete_old_checkpoints(self.run_dir, self.recovery.keep, known=self._known, protected=protected, warn=self.note)
        except Exception as error:
            if not may_pass(error) and not isinstance(error, OSError):
                raise
            self.note(f"an old checkpoint could not be deleted: {reason(error)}")
