"""The command line `nlray`: parse, check the configuration, call the one function that does the work.

Exit status: 0 when all went well, 1 when a run failed, 2 for a mistake of the user, 128 and the number of the signal that ended it:
130 after Ctrl-C, 143 after SIGTERM, 141 without a message where the reader of a pipe went away. Mistakes and failures are one line on
stderr; `--debug` adds the traceback. Everything slow to import is imported inside the commands, so that `nlray --help` is instant.
"""

import math
import sys
import traceback
from contextlib import suppress
from datetime import datetime
from types import SimpleNamespace
from typing import Annotated

import typer

from nlray.clusters.output import discard
from nlray.clusters.signals import StopSignals
from nlray.errors import NlrayError, UserError
from nlray.terminal import clean

# Typer's own class in newer releases, click's in older ones.
_UsageError = typer.BadParameter.__base__
_PIPE_CLOSED = 141
"""128 and the number of SIGPIPE: the status of a tool that this signal ends."""

app = typer.Typer(
    help="Train nested-learning language models whose memory levels run as groups of Ray actors.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    with StopSignals() as signals:
        status = _invoke(sys.argv[1:] if argv is None else argv, SimpleNamespace(debug=False, signals=signals))
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            discard(sys.stdout)
            return status or _PIPE_CLOSED
        return status


def _invoke(argv: list[str], session: SimpleNamespace) -> int:
    try:
        # Not `app()`: it has its own ways with Ctrl-C and errors.
        command = typer.main.get_command(app)
        with command.make_context("nlray", argv or ["--help"], obj=session) as context:
            status = command.invoke(context) or 0
        # A command that took the signal for its end (`logs --follow`) has said so.
        return session.signals.status if status == 130 else status
    except typer.Exit as ended:
        return ended.exit_code
    except _UsageError as error:
        return _report(error.format_message(), 2)
    except UserError as error:
        return _report(str(error), 2, debug=session.debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _report(str(error) or session.signals.reason, session.signals.status)
    except BrokenPipeError:
        # The reader went away (`nlray generate ... | head`).
        discard(sys.stdout)
        return _PIPE_CLOSED
    except NlrayError as error:
        return _report(str(error), 1, debug=session.debug)
    except Exception as error:
        if session.signals.has_raised:  # in the middle of something that made another error of it
            return _report(session.signals.reason, session.signals.status, debug=session.debug)
        return _report(f"{type(error).__name__}: {_essence(error)} (--debug shows where)", 1, debug=session.debug)


def _report(message: str, status: int, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # a terminal that was closed
        print(f"nlray: error: {clean(' '.join(message.split()))}", file=sys.stderr)
    return status


def _essence(error: Exception) -> str:
    """Return the line of a message that says what happened: the last of a remote traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if any("Traceback" in line for line in lines) else lines[0]) if lines else "no message"


def _set_debug(context: typer.Context, value: bool) -> bool:
    context.find_root().obj.debug = value
    return value


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def _temperature(value: float) -> float:
    if not (value == 0 or 1e-3 <= value <= 1e3):
        raise typer.BadParameter(f"{value} is not 0, and not in the range 0.001 to 1000")
    return value


def _print_version(value: bool) -> None:
    if value:
        from nlray import __version__

        print(f"nlray {__version__}")
        raise typer.Exit


_Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PRESET | FILE.yaml | KEY=VALUE",
        help="Where the configuration starts, tiny by default, and what to change in it. "
        "Presets: tiny, small, hope-340m, hope-760m, hope-1.3b; `nlray config PRESET` prints one.",
        show_default=False,
    ),
]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="What to change in the configuration.", show_default=False)
]
_Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Ray cluster to run on, or auto; without it Ray starts here for the run, whatever RAY_ADDRESS says."
    ),
]
_Local = Annotated[bool, typer.Option("--local", help="Run in this process, without Ray: for a debugger, for a first look.")]
_Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of the run, or its name.", show_default=False)]
_RunAddress = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="The run's cluster; else one of yours on this machine, or RAY_ADDRESS.")
]
_Trust = Annotated[bool, typer.Option("--trust", help="Import the classes and contact the addresses that the folder of a run names.")]
_NoWait = Annotated[bool, typer.Option("--no-wait", help="Ask, and do not wait until it has happened.")]
_Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of `nlray` itself."""


@app.command()
def train(
    context: typer.Context,
    arguments: _Arguments = None,
    address: _Address = None,
    local: _Local = False,
    trust: _Trust = False,
    debug: _Debug = False,
) -> int:
    """Train a model, here or on a Ray cluster, to the end."""
    check_place(address, local=local)
    from nlray.clusters.train import train_run
    from nlray.config.loading import PRESETS, default_run_name, load_config

    source, overrides = split_arguments(arguments or [])
    name = default_run_name(source, overrides, datetime.now().strftime("%Y%m%d-%H%M%S"))
    config = load_config(source, overrides, default_name=name, trust=trust)
    config_file = None if source in PRESETS else source
    return train_run(config, context.obj.signals, address=address, local=local, config_file=config_file, debug=debug)


@app.command()
def resume(
    context: typer.Context,
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR | CHECKPOINT", help="Folder or URL of the run, or of one of its checkpoints.")],
    overrides: _Overrides = None,
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="Continue from the checkpoint of this step.")] = None,
    address: _Address = None,
    local: _Local = False,
    trust: _Trust = False,
    debug: _Debug = False,
) -> int:
    """Go on with a run from its newest checkpoint; later ones than a chosen one are put aside."""
    check_place(address, local=local)
    from nlray.checkpoint import run_of
    from nlray.clusters.train import resume_run

    run_dir, own_step = run_of(run_dir)
    if None not in (step, own_step) and step != own_step:
        raise UserError(f"--step {step}: {run_dir} was named with its checkpoint of step {own_step}; allowed: one of the two")
    step = own_step if step is None else step
    options = {"step": step, "address": address, "local": local, "trust": trust, "debug": debug}
    return resume_run(run_dir, overrides or [], context.obj.signals, **options)


@app.command()
def status(run: _Run, address: _RunAddress = None, as_json: _Json = False, debug: _Debug = False) -> int:
    """Show where a run is: step, loss, sizes of its groups, its actors, its faults."""
    from nlray.clusters.control import print_status

    return print_status(run, address=address, as_json=as_json)


@app.command()
def logs(
    run: _Run,
    address: _RunAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends; Ctrl-C leaves the run alone.")] = False,
    debug: _Debug = False,
) -> int:
    """Print the events of a run."""
    from nlray.clusters.control import print_logs

    return print_logs(run, address=address, following=follow)


@app.command()
def stop(run: _Run, address: _RunAddress = None, no_wait: _NoWait = False, debug: _Debug = False) -> int:
    """Have a run stop with a checkpoint, and wait for its end."""
    from nlray.clusters.control import stop_run

    return stop_run(run, address=address, waiting=not no_wait)


@app.command()
def scale(
    run: _Run,
    sizes: Annotated[list[str], typer.Argument(metavar="NAME=N", help="A level and its ranks, or sequence and its workers.")],
    address: _RunAddress = None,
    no_wait: _NoWait = False,
    debug: _Debug = False,
) -> int:
    """Change the sizes of a run's groups while it goes on."""
    from nlray.clusters.control import scale_run

    return scale_run(run, sizes, address=address, waiting=not no_wait)


@app.command()
def chaos(
    run: _Run,
    every: Annotated[
        float, typer.Option(min=0.1, callback=_finite, metavar="S", help="Seconds between two faults, give or take a fifth.")
    ] = 30.0,
    kinds: Annotated[str, typer.Option(metavar="LIST", help="Of worker, rank, node, conductor, hang.")] = "worker,rank,conductor,hang",
    faults: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after so many.", show_default="to the run's end")] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.0, callback=_finite, metavar="S", help="Stop after so long.", show_default="to the run's end")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the choices.")] = 0,
    address: _RunAddress = None,
    as_json: _Json = False,
    debug: _Debug = False,
) -> int:
    """Kill, stop and take away parts of a run at random, and report what it did meanwhile."""
    from nlray.clusters.chaos import chaos_run

    return chaos_run(run, kinds=kinds, every_s=every, seed=seed, faults=faults, duration_s=duration, address=address, as_json=as_json)


@app.command()
def levels(arguments: _Arguments = None, as_json: _Json = False, trust: _Trust = False, debug: _Debug = False) -> None:
    """List every optimization problem of a model, where it runs and what it costs."""
    from nlray.clusters.show_levels import print_levels
    from nlray.config.loading import load_config

    source, overrides = split_arguments(arguments or [])
    print_levels(load_config(source, overrides, trust=trust), title=source or "tiny", as_json=as_json)


@app.command("config")
def show_config(
    arguments: _Arguments = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print what KEY, a section or all sections mean: --docs model.titans.")] = False,
    debug: _Debug = False,
) -> None:
    """Print the resolved configuration as YAML, or with --docs what a key means."""
    if docs:
        from nlray.config.docs import describe_key

        if len(arguments or []) > 1:
            raise UserError(f"--docs {' '.join(arguments)}: allowed is one key")
        print(describe_key(arguments[0] if arguments else None))
        return
    from nlray.config.loading import config_to_yaml, load_config

    source, overrides = split_arguments(arguments or [])
    # Nothing that the configuration names is imported or contacted here.
    print(config_to_yaml(load_config(source, overrides, trust=True)), end="")


@app.command()
def generate(
    path: Annotated[str, typer.Argument(metavar="RUN_DIR | CHECKPOINT", help="Folder or URL of a run, or of one of its checkpoints.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")] = 200,
    temperature: Annotated[float, typer.Option(callback=_temperature, metavar="T", help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Sample from the K likeliest tokens only.")] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, metavar="N", help="Seed of the sampling.")] = 0,
    trust: _Trust = False,
    debug: _Debug = False,
) -> None:
    """Write on from a prompt with a trained model."""
    from nlray.clusters.generate import stream_text
    from nlray.terminal import clean_lines

    is_shown = sys.stdout.isatty()
    for piece in stream_text(path, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, trust=trust):
        print(clean_lines(piece) if is_shown else piece, end="", flush=True)
    print()


@app.command()
def stack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Local folder of a pretrained decoder, or a run of kind transformer.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="New folder, for `nlray train init=DIR`.")],
    overrides: _Overrides = None,
    trust: _Trust = False,
    debug: _Debug = False,
) -> None:
    """Turn a pretrained decoder into Hope-Attention whose levels start from its MLP blocks."""
    from nlray.clusters.stack import stack_model

    stack_model(source, out, overrides or [], trust=trust)


@app.command()
def doctor(as_json: _Json = False, debug: _Debug = False) -> int:
    """Report versions, GPUs, memory, Ray and disk; exit status 0 when a run can work here."""
    from nlray.clusters.doctor import print_report

    return print_report(as_json=as_json)


def check_place(address: str | None, *, local: bool) -> None:
    """Raise UserError where a run is to be in this process and on a cluster."""
    if local and address is not None:
        raise UserError(f"--local and --address {address}: allowed is one of the two; a local run is on no cluster")


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split `[PRESET | FILE.yaml] [key=value ...]`, in any order, into the source and the overrides."""
    overrides = [a for a in arguments if "=" in a]
    sources = [a for a in arguments if "=" not in a]
    if len(sources) > 1:
        raise UserError(f"arguments {' '.join(map(repr, sources))}: allowed is one preset or file; a change is written key=value")
    return (sources[0] if sources else None), overrides


if __name__ == "__main__":
    sys.exit(main())
