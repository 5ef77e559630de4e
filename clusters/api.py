"""The Python API: start a run, reach a run, load what it trained. The command line uses the same functions.

    import nlray

    run = nlray.train("tiny", run={"steps": 64}, wait=False)   # a preset, a YAML file or a Config; sections as keyword arguments
    run.scale(slow=2)
    print(run.status().step)
    run.wait()
    rows = run.metrics()                                       # a pyarrow table, a row for each step
    model, tokenizer = run.load_model()

`nlray.train`, `nlray.attach`, `nlray.load`, `nlray.load_config` and `nlray.Config` are imported on first use, so `import nlray` imports
neither torch nor Ray.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from nlray.config import Config, loading
from nlray.config.loading import PRESETS, config_to_yaml, parse_run_config, read_run_config
from nlray.errors import CheckpointError, RemoteTimeoutError, UserError
from nlray.run_folder import CONFIG, RunFolder
from nlray.trust import confirm

if TYPE_CHECKING:
    import pyarrow

    from nlray.actors.client import Follower, RunClient
    from nlray.actors.launch import RunHandle
    from nlray.actors.types import RunDescription, RunStatus
    from nlray.actors.workers.records import Records
    from nlray.models.lm import LanguageModel
    from nlray.pipelines.tokenizers import Tokenizer

POLL_S = 0.5
Source = str | os.PathLike[str] | Config | None


class LoadedModel(NamedTuple):
    """A trained model and the tokenizer of its data. model: on the GPU where torch sees one, else on the CPU."""

    model: "LanguageModel"
    tokenizer: "Tokenizer"


class Run:
    """A run: one that this process started (`train`), or one that it reached (`attach`), in progress or ended.

    A run that `train` started without an address has a Ray cluster of its own in this process: it ends with `close`, with the `with`
    block, or with the process.

    Args:
        config: the run's own configuration, with `run.name` and `run.dir`.
        handle: of a run that this process started.
        client: of a run in progress that another process started; None with `handle`, and of a run that has ended.
    """

    def __init__(self, config: Config, *, handle: "RunHandle | None" = None, client: "RunClient | None" = None) -> None:
        assert config.run.name is not None and config.run.dir is not None
        self.name, self.dir, self.config = config.run.name, config.run.dir, config
        self._handle = handle
        self._reached = client
        self._follower: Follower | None = None

    def __repr__(self) -> str:
        return f"Run({self.name!r}, dir={self.dir!r})"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _client(self) -> "RunClient | None":
        return self._reached if self._handle is None else self._handle.client

    @property
    def is_open(self) -> bool:
        """Whether the run was in progress when this process started or reached it."""
        return self._client is not None

    def status(self) -> "RunDescription":
        """Return where the run is: state, step, sizes of its groups, its actors, its recoveries, and after its end its summary.

        Raises:
            RunGoneError: the run was cut off: nothing answers, and its folder does not say how it ended.
        """
        from nlray.actors.client import RunGoneError

        if self._client is None:
            return self._records().describe()
        try:
            return self._client.describe()
        except RunGoneError:
            records = self._records()
            if records.ended is None:
                raise
            return records.describe()

    def poll(self) -> "RunStatus":
        """Return the state, and the rows and events since the last poll; a run that has failed raises nothing here."""
        if self._handle is not None:
            return self._handle.poll()
        if self._client is None:
            return self._records().status(0, 0)
        if self._follower is None:
            from nlray.actors.client import Follower

            self._follower = Follower(self._client)
        return self._follower.poll()

    def scale(self, sizes: Mapping[str, int] | None = None, /, **more: int) -> None:
        """Request other sizes of groups, for example `run.scale(slow=2, sequence=4)`; they are in force at the next recovery point.

        Raises:
            UserError: an unknown group, a size that is not allowed, or the run has ended.
        """
        self._open_client().request_scale({**(sizes or {}), **more})

    def stop(self, *, wait: bool = True) -> "RunStatus | None":
        """Have the run stop after the step in flight, with a checkpoint; return its last status, or None without waiting.

        A run that has ended stays as it is.
        """
        if self._handle is not None:
            self._handle.request_stop()
        elif self._client is not None:
            from nlray.actors.client import RunGoneError

            try:
                self._client.request_stop()
            except RunGoneError:
                # It may have ended in the meantime.
                if self._records().ended is None:
                    raise
        return self.wait() if wait else None

    def wait(self, *, timeout_s: float = math.inf) -> "RunStatus":
        """Wait until the run has ended and return its last status; `summary` is the content of `summary.json`.

        Ctrl-C requests a stop with a checkpoint; a second one raises KeyboardInterrupt.

        Raises:
            RunFailedError: the run failed.
            RemoteTimeoutError: the run has not ended after `timeout_s` seconds; it continues.
        """
        from nlray.actors.faults import RunFailedError
        from nlray.actors.types import ENDED

        deadline, is_stopping = time.monotonic() + timeout_s, False
        while True:
            try:
                if (status := self.poll()).state in ENDED:
                    break
                if time.monotonic() > deadline:
                    raise RemoteTimeoutError(f"waited {timeout_s:g} s for the end of run {self.name} (timeout_s)")
                time.sleep(POLL_S)
            except KeyboardInterrupt:
                if is_stopping:
                    raise
                is_stopping = True
                self.stop(wait=False)
        if status.state == "failed":
            raise RunFailedError(status.message or "the run failed", status.traceback or "", status.exit_code)
        return status

    def metrics(self) -> "pyarrow.Table":
        """Return the rows of `metrics.jsonl` so far as a table, one row a step; nested keys are columns like `levels.slow.version`."""
        import pyarrow

        from nlray.metrics import read_rows

        rows = [_flat(row) for row in read_rows(self.dir)]
        return pyarrow.table({key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)})

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of `events.jsonl` so far: `time` in seconds since 1970, `step`, `text`, and of a recovery `recovery`."""
        return self._records().events() if self._client is None else self._client.events()

    def load_model(self) -> LoadedModel:
        """Return the model of the newest checkpoint and its tokenizer. Raises as `load`."""
        return load(self.dir, trust=self._handle is not None)

    def close(self) -> None:
        """Release the run. A run that this process started and that has not ended is ended, without a checkpoint."""
        if self._handle is not None:
            self._handle.close()

    def _open_client(self) -> "RunClient":
        if self._client is None:
            raise UserError(f"the run in {self.dir} has ended: {self._records().ended}")
        return self._client

    def _records(self) -> "Records":
        from nlray.actors.workers.records import read_records

        records = read_records(self.dir)
        if records is None:
            raise UserError(f"{self.dir}: holds no run (no config.yaml)")
        return records


def train(source: Source = None, /, *, address: str | None = None, wait: bool = True, trust: bool = False, **overrides: Any) -> Run:
    """Train a model, on a Ray cluster of this process or on one at an address, and return its run.

    Args:
        source: a preset's name, the path of a YAML file, a `Config`, or None: what `init` says, else the preset `tiny`.
        address: HOST:PORT of a Ray cluster, or `auto`; None: the cluster that this process is in, else one that is started here.
        wait: until the run has ended; otherwise the run continues in the background, until `Run.close`.
        trust: the classes and addresses that the folder `init` names may be imported and contacted (docs/trust.md).
        overrides: sections or keys of the configuration, `run={"steps": 64}` or `**{"run.steps": 64}`, merged into the source's values.

    Raises:
        UserError: a mistake in the configuration or the data, before anything is written or started.
        RunFailedError: the run failed; only with `wait`.
    """
    arguments = _arguments(overrides)
    file = None if isinstance(source, Config) or source is None else os.fspath(source)
    name = loading.default_run_name("run" if isinstance(source, Config) else file, arguments, datetime.now().strftime("%Y%m%d-%H%M%S"))
    run = start(_configured(source, arguments, trust=trust, default_name=name), address=address, config_file=file)
    if wait:
        try:
            run.wait()
        finally:
            run.close()
    return run


def start(config: Config, *, address: str | None = None, config_file: str | None = None, **options: Any) -> Run:
    """Launch a run of a configuration with a name and return it at once; further options as `nlray.actors.launch.launch`."""
    from nlray.actors.launch import launch

    # The folder stays the same wherever this process goes.
    config = loading.with_absolute_paths(config)

    is_file = config_file is not None and config_file not in PRESETS
    return Run(config, handle=launch(config, address=address, config_file=config_file if is_file else None, **options))


def attach(run: str, *, address: str | None = None, limit_s: float | None = None) -> Run:
    """Reach a run by its folder, URL or name; a run that has ended is read from its folder.

    Args:
        address: HOST:PORT of its Ray cluster, or `auto`; None: a cluster of this user on this machine, or RAY_ADDRESS.
        limit_s: of each wait for the run; None: the run's `run.timeout_s`.

    Raises:
        UserError: there is no such run, or it was cut off: the message says its last step and how it continues.
    """
    from nlray.actors.workers.records import find_records

    records = find_records(run, address)
    if records is not None and records.ended is not None:
        return Run(records.config)
    client = reach(run, address, records, limit_s=limit_s)
    return Run(client.records().config, client=client)


def reach(run: str, address: str | None, records: "Records | None", *, limit_s: float | None = None) -> "RunClient":
    """Attach to a run in progress; of one that was cut off, say where it was and how it continues."""
    from nlray.actors.client import RunGoneError
    from nlray.actors.client import attach as attach_client
    from nlray.clusters.progress import resume_line

    if records is not None and records.local_process is not None:
        raise UserError(
            f"the run in {records.run_dir} is in {records.local_process} (--local), which no other process reaches; "
            f"if it is gone: {resume_line(records.run_dir, None).strip()}"
        )
    if records is not None and records.state is None and address is None:
        print("nlray: the run has not started yet; waiting for it", file=sys.stderr)
    try:
        return attach_client(run, address, limit_s=limit_s)
    except RunGoneError as error:
        if records is None:
            raise
        rows = records.rows()
        step = f"its last step was {rows[-1]['step'] if rows else 0} of {records.config.run.steps}"
        raise UserError(f"{error}; {step}; if its cluster is gone: {resume_line(records.run_dir, None).strip()}") from error


def load(path: str, *, trust: bool = False, device: str | None = None) -> LoadedModel:
    """Load the model of a run's newest checkpoint, or of one checkpoint, and the tokenizer of its data.

    Args:
        path: folder or URL of a run, or of one of its checkpoints.
        trust: the classes and addresses that the run's configuration names may be imported and contacted (docs/trust.md).
        device: of torch; None: `cuda` where torch sees a GPU, else `cpu`.

    Raises:
        CheckpointError: no complete checkpoint there, or no configuration alongside it.
        UserError: what the run names is not confirmed.
    """
    from nlray.checkpoint import latest_checkpoint, load_parameters, read_manifest

    checkpoint = latest_checkpoint(path)
    config = checkpoint_config(checkpoint)
    confirm(config, RunFolder.of_checkpoint(checkpoint).url, trust=trust)
    parameters = load_parameters(checkpoint, read_manifest(checkpoint, verify=False))

    import torch

    from nlray.models.lm import build_model
    from nlray.pipelines.tokenizers import load_tokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, parameters["embedding.weight"].shape[0], device=device, seed=None)
    model.load_state_dict(parameters)
    return LoadedModel(model, load_tokenizer(config.data))


def checkpoint_config(checkpoint: str) -> Config:
    """Return the configuration of the run that a checkpoint belongs to: RUN_DIR/checkpoints/step_X -> RUN_DIR/config.yaml."""
    folder = RunFolder.of_checkpoint(checkpoint)
    config = read_run_config(folder.url)
    if config is None:
        raise CheckpointError(f"{folder.file(CONFIG)}: no such file; a checkpoint stays in its run's folder")
    return config


def load_config(source: Source = None, /, *, trust: bool = False, **overrides: Any) -> Config:
    """Return the checked configuration of a preset, a YAML file or a `Config` with sections or keys overridden.

    Raises:
        UserError: an unknown preset, file or key, or a value that is not allowed; one line that names the key.
    """
    return _configured(source, _arguments(overrides), trust=trust, default_name=None)


def _configured(source: Source, arguments: list[str], *, trust: bool, default_name: str | None) -> Config:
    if isinstance(source, Config):
        return parse_run_config("config", config_to_yaml(source), arguments, default_name=default_name)
    return loading.load_config(None if source is None else os.fspath(source), arguments, default_name=default_name, trust=trust)


def _arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Return Python values as the arguments of the command line, `key=value`."""
    return [f"{key}={json.dumps(value, default=_plain)}" for key, value in overrides.items()]


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise UserError(f"{value!r} is no value of the configuration; allowed: numbers, strings, booleans, None, lists, mappings, paths")


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a row with the keys of nested mappings joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
