"""`nlray status`, `logs`, `stop` and `scale`: look at a run that another process started, and ask things of it.

RUN is the run's folder or URL, or its name; see `nlray.actors.client` for how it is found. A run that has ended is read from its
folder, without Ray.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nlray.clusters.progress import PlainView, Progress, format_count, format_number, plural, resume_line, summary_lines
from nlray.clusters.train import follow, print_end, report_failure
from nlray.errors import NlrayError, UserError
from nlray.terminal import clean

if TYPE_CHECKING:
    from nlray.actors.client import RunClient
    from nlray.actors.types import RunDescription
    from nlray.actors.workers.records import Records

STATUS_LIMIT_S = 30.0
SETTLE_S = 5.0  # sizes that are neither wanted nor in force for so long will not be


def print_status(run: str, *, address: str | None, as_json: bool) -> int:
    """Print where a run is; of one that has ended, how."""
    from nlray.actors.workers.records import find_records

    records = find_records(run, address)
    if records is not None and records.ended is not None:
        if as_json:
            print(json.dumps(_ended_as_dict(records), indent=1))
        else:
            print("\n".join(summary_lines(records.ended, records.summary, records.config)))
            if records.summary.get("error"):
                print(f"error    {clean(' '.join(records.summary['error'].split()))}")
        return 0
    description = _reach(run, address, records, limit_s=STATUS_LIMIT_S).describe()
    if as_json:
        found = {"schema": 1} | asdict(description)
        found |= {"conductor": {"pid": found.pop("pid"), "node": found.pop("node")}, "summary": None}
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(status_lines(description)))
    return 0


def print_logs(run: str, *, address: str | None, following: bool) -> int:
    """Print a run's events, and, following, what comes until its end."""
    from nlray.actors.client import Follower
    from nlray.actors.workers.records import find_records

    records = find_records(run, address)
    client = _reach(run, address, None) if records is None else None
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
    client = client or _reach(run, address, records)
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
    from nlray.actors.client import Follower
    from nlray.actors.workers.records import find_records

    records = find_records(run, address)
    if records is not None and records.ended is not None:
        print(f"the run has ended already: {records.ended}")
        return 0
    client = _reach(run, address, records)
    config, follower = client.records().config, Follower(client)
    client.request_stop()
    if not waiting:
        print("asked: the run stops after the step under way, with a checkpoint")
        return 0
    try:
        status = follow(follower, PlainView(Progress(config)))
    except KeyboardInterrupt:
        print("the run goes on to stop", flush=True)
        return 130
    print_end(status, config)
    return report_failure(status)


def scale_run(run: str, arguments: list[str], *, address: str | None, waiting: bool) -> int:
    """Have groups of a run change their sizes, and wait until they have."""
    from nlray.actors.client import Follower
    from nlray.actors.workers.records import find_records

    sizes = parse_sizes(arguments)
    records = find_records(run, address)
    client = _reach(run, address, records)
    config, follower = client.records().config, Follower(client)
    client.request_scale(sizes)
    text = " ".join(f"{name}={size}" for name, size in sizes.items())
    if not waiting:
        print(f"asked for {text}")
        return 0
    watch = _SizesWatch(client.describe, sizes)
    try:
        status = follow(follower, PlainView(Progress(config)), is_done=watch.is_over)
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


def _ended_as_dict(records: "Records") -> dict[str, Any]:
    """Return what `nlray status --json` prints of a run that has ended."""
    from nlray.actors.control.scaling_policy import sizes_of

    rows, config, summary = records.rows(), records.config, records.summary
    return {
        "schema": 1,
        "name": config.run.name,
        "dir": records.run_dir,
        "state": summary["status"],
        "step": summary["steps"],
        "steps": config.run.steps,
        "point": None,
        "sizes": sizes_of(config),
        "wanted": {},
        "actors": [],
        "recoveries": summary.get("recovery_log", []),
        "row": rows[-1] if rows else None,
        "conductor": None,
        "summary": summary,
    }


def _reach(run: str, address: str | None, records: "Records | None", **options: Any) -> "RunClient":
    """Attach to a run; of one that was cut off, say where it was and how it goes on."""
    from nlray.actors.client import RunGoneError, attach

    if records is not None and records.ended is None and records.state is None and address is None:
        print("nlray: the run has not started yet; waiting for it", file=sys.stderr)
    try:
        return attach(run, address, **options)
    except RunGoneError as error:
        if records is None:
            raise
        rows = records.rows()
        step = f"its last step was {rows[-1]['step'] if rows else 0} of {records.config.run.steps}"
        raise UserError(f"{error}; {step}; if its cluster is gone: {resume_line(records.run_dir, None).strip()}") from error
