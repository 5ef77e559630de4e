"""`nlray status`, `logs`, `stop` and `scale`: look at a run that another process started, and ask things of it.

RUN is the run's folder or URL, or its name; see `nlray.actors.client` for how it is found. A run that has ended is read from its
folder, without Ray.
"""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nlray.clusters.api import attach, reach
from nlray.clusters.progress import PlainView, Progress, format_count, format_number, plural, summary_lines
from nlray.clusters.train import follow, print_end, report_failure
from nlray.errors import NlrayError, UserError
from nlray.terminal import clean

if TYPE_CHECKING:
    from nlray.actors.types import RunDescription

STATUS_LIMIT_S = 30.0
SETTLE_S = 5.0  # sizes that are neither wanted nor in force for so long will not be


def print_status(run: str, *, address: str | None, as_json: bool) -> int:
    """Print where a run is; of one that has ended, how."""
    found = attach(run, address=address, limit_s=STATUS_LIMIT_S)
    description = found.status()
    if as_json:
        plain = {"schema": 1} | asdict(description)
        conductor = {"pid": plain.pop("pid"), "node": plain.pop("node")}
        print(json.dumps(plain | {"conductor": conductor if description.summary is None else None}, indent=1))
    elif description.summary is None:
        print("\n".join(status_lines(description)))
    else:
        print("\n".join(summary_lines(description.state, description.summary, found.config)))
        if description.summary.get("error"):
            print(f"error    {clean(' '.join(description.summary['error'].split()))}")
    return 0


def print_logs(run: str, *, address: str | None, following: bool) -> int:
    """Print a run's events, and, following, what comes until its end."""
    from nlray.actors.client import Follower
    from nlray.actors.workers.records import find_records

    records = find_records(run, address)
    client = reach(run, address, None) if records is None else None
    events = records.events() if client is None else client.events()
    config = (records or client.records()).config
    view = PlainView(Progress(config), with_time=True)
    for event in events:
        view.event(event["text"], at=event["time"])
    if not following:
        return 0
    if records is not None and records.ended is not None:
        print_end(status := records.status(0, 0), config)
        return report_failure(status)
    client = client or reach(run, address, records)
    follower = Follower(client, rows_after=client.describe().step - 1, events_from=len(events))
    try:
        status = follow(follower, view)
    except KeyboardInterrupt:
        print("the run goes on", flush=True)
        return 130
    print_end(status, config)
    return report_failure(status)


def stop_run(run: str, *, address: str | None, waiting: bool) -> int:
    """Have a run stop with a checkpoint, and wait until it has."""
    found = attach(run, address=address)
    if not found.is_open:
        print(f"the run has ended already: {found.status().state}")
        return 0
    # From here on: the events of the end are shown.
    found.poll()
    found.stop(wait=False)
    if not waiting:
        print("asked: the run stops after the step in flight, with a checkpoint")
        return 0
    try:
        status = follow(found, PlainView(Progress(found.config)))
    except KeyboardInterrupt:
        print("the run goes on to stop", flush=True)
        return 130
    print_end(status, found.config)
    return report_failure(status)


def scale_run(run: str, arguments: list[str], *, address: str | None, waiting: bool) -> int:
    """Have groups of a run change their sizes, and wait until they have."""
    sizes = parse_sizes(arguments)
    found = attach(run, address=address)
    if found.is_open:
        found.poll()
    found.scale(sizes)
    text = " ".join(f"{name}={size}" for name, size in sizes.items())
    if not waiting:
        print(f"asked for {text}")
        return 0
    watch = _SizesWatch(found.status, sizes)
    try:
        status = follow(found, PlainView(Progress(found.config)), is_done=watch.is_over)
    except KeyboardInterrupt:
        print(f"the run goes on, and {text} comes when it can; `nlray status` shows it", flush=True)
        return 130
    if watch.found is None:
        raise NlrayError(f"the run ended before {text} was in force: {status.state}")
    print(f"groups   {clean(_groups_text(watch.found))}")
    if not watch.is_in_force:
        raise NlrayError(f"{text} is not in force: another request, or the end of the conductor's process, came in between")
    return 0


def parse_sizes(arguments: list[str]) -> dict[str, int]:
    """Return the sizes of `NAME=N ...`.

    Raises:
        UserError: something else came.
    """
    sizes: dict[str, int] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not name or not equals:
            raise UserError(f"{argument}: allowed: NAME=N, a level's name or sequence, and its number of ranks or workers")
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise UserError(f"{argument}: {text or 'nothing'} is no number of actors; allowed: 1 or more")
        if name in sizes:
            raise UserError(f"{argument}: {name} came twice")
        sizes[name] = int(text)
    return sizes


class _SizesWatch:
    """Watches until sizes are in force, or will not be. found: the run then; None before."""

    def __init__(self, describe: Any, sizes: dict[str, int]) -> None:
        self._describe, self._sizes = describe, sizes
        self._given_up_s: float | None = None
        self.found: RunDescription | None = None
        self.is_in_force = False

    def is_over(self) -> bool:
        now = self._describe()
        is_open = now.state != "running" or any(name in now.wanted for name in self._sizes)
        self.is_in_force = not is_open and all(now.sizes[name] == size for name, size in self._sizes.items())
        if is_open:
            self._given_up_s = None
            return False
        self._given_up_s = self._given_up_s or time.monotonic()
        if self.is_in_force or time.monotonic() - self._given_up_s > SETTLE_S:
            self.found = now
        return self.found is not None


def status_lines(run: "RunDescription") -> list[str]:
    """Return the lines that say where a run is."""
    row = run.row or {}
    lines = [
        f"run        {run.name} in {run.dir}",
        f"state      {run.state}",
        f"step       {run.step}/{run.steps}",
        f"loss       {format_number(row.get('loss'))}",
        f"speed      {format_count(row['tokens_per_second'])} tokens/s" if row.get("tokens_per_second") else "speed      -",
        "recovery   " + ("no recovery point yet" if run.point is None else f"goes back to step {run.point}"),
        f"groups     {_groups_text(run)}",
        f"faults     {_faults_text(run.recoveries)}",
        "",
    ]
    hosts = [(m.role, m.actor, str(m.pid or "-"), m.node[:8] or "not yet ready") for m in run.actors]
    table = [("role", "actor", "pid", "node"), ("conductor", "conductor", str(run.pid), run.node[:8]), *hosts]
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    lines += [f"{role:<{widths[0]}}  {actor:<{widths[1]}}  {pid:>{widths[2]}}  {node}" for role, actor, pid, node in table]
    return [clean(line) for line in lines]


def _groups_text(run: "RunDescription") -> str:
    return ", ".join(f"{name} {size}" + (f" (wanted {run.wanted[name]})" if name in run.wanted else "") for name, size in run.sizes.items())


def _faults_text(recoveries: tuple[dict[str, Any], ...]) -> str:
    if not recoveries:
        return "none"
    last = recoveries[-1]
    return (
        f"{plural(len(recoveries), 'recovery', 'recoveries')}, the last in {last['restore_s']:.1f} s: {last['message']}; "
        f"back from step {last['step']} to {last['restored']}, from {last['source']}"
    )
