"""`nlray train` and `nlray resume`: say what will be run, check it, launch it, and follow it to its end.

The checks and the plan come before `ray` is imported, so a mistake is reported and the plan is on the screen at once. With `--local`
Ray is never imported: the run trains in this process.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from nlray.clusters.api import Run, start
from nlray.clusters.output import LastingOutput
from nlray.clusters.progress import View, describe_levels, describe_run, format_count, open_view, summary_lines
from nlray.clusters.signals import StopSignals
from nlray.config import Config
from nlray.config.loading import values_of
from nlray.terminal import clean, clean_lines
from nlray.trust import confirm

if TYPE_CHECKING:
    from nlray.actors.client import Follower
    from nlray.actors.local import LocalRun
    from nlray.actors.types import RunStatus


def train_run(
    config: Config,
    signals: StopSignals,
    *,
    address: str | None,
    local: bool = False,
    config_file: str | None = None,
    debug: bool = False,
) -> int:
    """Run a configuration, of a file if it came from one, from its first step to its end; return the exit status."""
    with LastingOutput(config.run.dir):
        return _run(config, signals, address=address, local=local, resume=False, config_file=config_file, debug=debug)


def resume_run(
    run_dir: str,
    overrides: list[str],
    signals: StopSignals,
    *,
    step: int | None = None,
    address: str | None,
    local: bool = False,
    trust: bool = False,
    debug: bool = False,
) -> int:
    """Go on with the run in `run_dir` from its checkpoint of a step, or its newest; return the exit status."""
    from nlray.actors.preparation import resume_config

    config = resume_config(run_dir, overrides)
    confirm(config, run_dir, trust=trust, typed=values_of(overrides), is_resumed=True)
    with LastingOutput(config.run.dir):
        return _run(config, signals, address=address, local=local, resume=True, step=step, debug=debug)


def _run(
    config: Config,
    signals: StopSignals,
    *,
    address: str | None,
    local: bool,
    resume: bool,
    step: int | None = None,
    config_file: str | None = None,
    debug: bool,
) -> int:
    print(describe_run(config, resume=resume), flush=True)
    if config.levels:
        print(describe_levels(config), flush=True)

    from nlray.actors.hosts.placement import resolve_threads
    from nlray.config.loading import with_absolute_paths
    from nlray.pipelines.source_list import files_of_run
    from nlray.pipelines.sources import check_sources
    from nlray.pipelines.tokenizers import with_vocabulary

    resolved = with_absolute_paths(config)
    files = files_of_run(resolved, resume=resume)
    check_sources(resolved.data, files)

    from nlray.run_plan import RunPlan

    plan = RunPlan.build(resolve_threads(with_vocabulary(resolved)))
    print(f"size     {format_count(plan.num_parameters)} parameters, vocabulary {plan.config.model.vocab_size}", flush=True)
    print(f"cluster  {'none, all in this process' if local else address or 'Ray, started here'}", flush=True)

    from nlray.actors.preparation import way_back

    run: Run | LocalRun
    if local:
        from nlray.actors.local import launch_local

        run = launch_local(plan.config, plan=plan, resume=resume, step=step, files=files, config_file=config_file)
    else:
        run = start(plan.config, plan=plan, address=address, resume=resume, step=step, files=files, config_file=config_file)
    try:
        signals.is_orderly = True
        with open_view(config) as view:
            status = follow(run, view, signals) if isinstance(run, Run) else train_here(run, view, signals)
        print_end(status, config)
        return signals.status if status.state == "stopped" and signals.received else report_failure(status, debug=debug)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"aborted, without a checkpoint of the last steps; {way_back(config.run.dir)}") from error
    finally:
        signals.clean_up()
        run.close()


def train_here(run: "LocalRun", view: View, signals: StopSignals) -> "RunStatus":
    """Train a local run in this thread, where a debugger finds it, and show its progress in another one."""
    with ThreadPoolExecutor(1, thread_name_prefix="view") as pool:
        shown = pool.submit(follow, run, view, signals)
        # Where the view fails nobody would see the run.
        shown.add_done_callback(lambda ended: run.stop() if ended.exception() else None)
        run.train()
        return shown.result()


def print_end(status: "RunStatus", config: Config) -> None:
    """Print how a run ended."""
    print("\n".join(summary_lines(status.state, status.summary, config)), flush=True)


def report_failure(status: "RunStatus", *, debug: bool = False) -> int:
    """Return the exit status of a run that has ended; of a failed one, say why on stderr."""
    if status.state != "failed":
        return status.exit_code
    if debug and status.traceback:
        print(clean_lines(status.traceback), file=sys.stderr)
    print(f"nlray: error: {clean(' '.join((status.message or 'the run failed').split()))}", file=sys.stderr)
    return status.exit_code or 1


def follow(
    run: "Run | LocalRun | Follower",
    view: View,
    signals: StopSignals | None = None,
    *,
    is_done: Callable[[], bool] = lambda: False,
    poll_s: float = 0.5,
) -> "RunStatus":
    """Show the run's progress until it has ended, or `is_done` says so; a noted signal asks the run to stop."""
    from nlray.actors.types import ENDED

    asked = done = False
    while True:
        if signals is not None and signals.received and not asked:
            asked = True
            view.event("stopping: the step under way is finished and a checkpoint written; Ctrl-C again aborts without one")
            run.stop(wait=False)
        status = run.poll()
        view.update(status.rows, status.events, state=status.state)
        # Once more when it is done: what is told of it may come a moment later.
        if status.state in ENDED or done:
            return status
        done = is_done()
        time.sleep(poll_s)
