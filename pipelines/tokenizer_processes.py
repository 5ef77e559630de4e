"""A Hugging Face tokenizer in processes of its own: `data.tokenizer_processes`.

    tokenizer = TokenizerProcesses(hf_tokenizer, 4)      # the interface of pipelines/tokenizers.py: Tokenizer, and close()

Each process runs this module. Arrow streams go through its stdin and stdout: a batch of records in, a batch of their tokens out. It ends
with its stdin, so it does not outlive a worker that is killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
import tokenizers

from nlray.config import DataConfig
from nlray.errors import NlrayError
from nlray.pipelines.order import offsets
from nlray.pipelines.tokenizers import HFTokenizer, Tokenizer, load_tokenizer

RECORDS = pa.schema([("text", pa.large_binary()), ("is_start", pa.bool_()), ("is_end", pa.bool_())])
TOKENS = pa.schema([("tokens", pa.large_list(pa.int32()))])
TOKENIZER, OPTIONS = b"tokenizer", b"options"
"""Keys of the metadata of the first stream's schema: the tokenizer's file, and the other arguments of HFTokenizer as JSON."""


class TokenizerProcesses:
    """`hf` with its records dealt to `processes` processes; the same tokens."""

    def __init__(self, hf: HFTokenizer, processes: int) -> None:
        self._hf = hf
        self.vocab_size, self.dtype = hf.vocab_size, hf.dtype
        self.end_of_document, self.begin_of_document = hf.end_of_document, hf.begin_of_document
        self.slices = processes
        self._processes: list[subprocess.Popen] = []
        self._writers: list[pa.RecordBatchStreamWriter] = []
        self._readers: list[pa.RecordBatchReader] = []

    def encode_records(
        self, text: pa.Array, is_start: np.ndarray | None = None, is_end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer.

        Raises:
            NlrayError: a process has ended.
        """
        if not self._processes:
            self._start()
        text = text.cast(pa.large_binary())
        ends = offsets(text)
        marks = [np.ones(len(text), bool) if mark is None else mark for mark in (is_start, is_end)]
        # As many bytes for each, whole records.
        bounds = np.searchsorted(ends, np.linspace(ends[0], ends[-1], self.slices + 1))
        bounds[0], bounds[-1] = 0, len(text)
        try:
            for writer, start, stop in zip(self._writers, bounds, bounds[1:], strict=False):
                columns = [text.slice(start, stop - start), *(pa.array(mark[start:stop], pa.bool_()) for mark in marks)]
                writer.write_batch(pa.record_batch(columns, schema=RECORDS))
            for process in self._processes:
                process.stdin.flush()
            if not self._readers:
                self._readers = [pa.ipc.open_stream(process.stdout) for process in self._processes]
            parts = [reader.read_next_batch().column(0) for reader in self._readers]
        except (OSError, StopIteration, pa.ArrowException) as error:
            states = [process.poll() for process in self._processes]
            raise NlrayError(f"a tokenizer process has ended: exit statuses {states} (None: it runs); {error}") from error
        tokens = [part.values.to_numpy()[part.offsets[0].as_py() : part.offsets[-1].as_py()] for part in parts]
        lengths = [np.diff(part.offsets.to_numpy()) for part in parts]
        return np.concatenate(tokens).astype(self.dtype), np.concatenate(lengths)

    def _start(self) -> None:
        # One thread each: together they are as many as were asked for.
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", __name__]
        for _ in range(self.slices):
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment))
        options = {"name": self._hf.name, "end_token": self._hf.end_token, "begin_token": self._hf.begin_token}
        schema = RECORDS.with_metadata({TOKENIZER: self._hf.json.encode(), OPTIONS: json.dumps(options).encode()})
        self._writers = [pa.ipc.new_stream(process.stdin, schema) for process in self._processes]

    def encode(self, text: str) -> np.ndarray:
        return self._hf.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._hf.decode(ids)

    def close(self) -> None:
        """End the processes; they start anew where there are records again."""
        processes, self._processes = self._processes, []
        self._writers, self._readers = [], []
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                # What was on its way to it goes nowhere.
                with suppress(OSError):
                    pipe.close()


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer of a stream; whoever opens it closes it. Raise UserError as `load_tokenizer` does."""
    tokenizer = load_tokenizer(config)
    return TokenizerProcesses(tokenizer, config.tokenizer_processes) if config.tokenizer_processes > 0 else tokenizer


def main() -> None:
    """Answer batches of records with batches of tokens until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever else is printed goes to stderr.
    os.dup2(2, 1)
    with pa.ipc.open_stream(sys.stdin.buffer) as reader, pa.ipc.new_stream(answers, TOKENS) as writer:
        metadata = reader.schema.metadata
        hf = HFTokenizer(tokenizers.Tokenizer.from_str(metadata[TOKENIZER].decode()), **json.loads(metadata[OPTIONS]))
        for batch in reader:
            marks = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("is_start", "is_end"))
            tokens, lengths = hf.encode_records(batch.column("text"), *marks)
            ends = np.concatenate([[0], np.cumsum(lengths)])
            lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(tokens, pa.int32()))
            writer.write_batch(pa.record_batch([lists], schema=TOKENS))
            answers.flush()


if __name__ == "__main__":
    main()
