"""The benchmark suites: `python -m benchmarks SUITE [--json FILE] [--peers] [options]`; `python -m benchmarks SUITE --help` lists them.

Each suite first checks that what it measures is right, then times the things to compare in turns, and prints medians, spreads and
ratios. docs/performance.md says what each shows and what came out.
"""

import difflib
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = {
    "layer": "the memory layer, forward and backward, beside titans-pytorch and the matrix-product peak",
    "step": "a training step beside a Transformer's and nested-learning's; nlray train beside the bare loop; memory; streaming",
    "exchange": "a 100 MB level's way to its rank and back under Ray, beside a memory copy; bytes per step by periods",
    "stream": "speed and memory of the data stream",
    "recovery": "what faults and recovery points cost",
    "scale": "runs of 8 to 16,384 GPUs on paper",
}
PEERS_FOLDER = Path.home() / ".cache" / "nlray" / "peers"


def main(arguments: Sequence[str]) -> int:
    listing = "\n".join(f"  {name:<9} {what}" for name, what in SUITES.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{listing}")
        return 0 if arguments else 2
    suite, *rest = arguments
    if suite not in SUITES:
        nearest = difflib.get_close_matches(suite, SUITES, n=1, cutoff=0)[0]
        print(f"SUITE is {suite!r}; allowed: {', '.join(SUITES)}; nearest: {nearest}", file=sys.stderr)
        return 2
    if suite == "scale":
        # No times are measured there: it has a command line and a report of its own.
        sys.argv = ["benchmarks scale", *rest]
        runpy.run_module("benchmarks.scale", run_name="__main__", alter_sys=True)
        return 0
    return run(suite, rest)


def run(suite: str, arguments: Sequence[str]) -> int:
    """Run a suite that measures: a module with PEERS, `add_arguments` and `run`."""
    from benchmarks.measure import Report
    from benchmarks.options import Parser, positive
    from nlray.errors import UserError

    module = importlib.import_module(f"benchmarks.{suite}")
    parser = Parser(prog=f"python -m benchmarks {suite}", description=module.__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    parser.add_argument("--peers", action="store_true", help="install other implementations in a venv of their own and run them beside")
    parser.add_argument("--peers-dir", type=Path, default=PEERS_FOLDER, help="where that venv is kept (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads of everything that is compared (default: 2)")
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    report = Report(suite, " ".join(["python -m benchmarks", suite, *arguments]))
    if args.peers and not module.PEERS:
        report.note("--peers: there is none for this suite")
    try:
        module.run(args, report)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    report.write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
