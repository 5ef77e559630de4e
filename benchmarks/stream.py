"""The speed and the memory of the data stream: `python -m benchmarks stream [--full]` (about a minute; files are temporary).

Correctness first: the blocks of each file are compared with its tokens. Then the median and spread of several passes per
format, the time of one small batch, and the peak memory of a fresh process (Linux) for a file and for one four times as large.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Cell, Report, Spread, status_bytes
from nlray.config import DataConfig, SourceConfig, StreamConfig
from nlray.pipelines.stream import BlockStream

PEERS = False
KINDS = ("text", "parquet", "parquet_one_group", "arrow", "jsonl")
REPEATS = 5
BATCH = 64
END = 256
ONE_PASS = "import sys; from benchmarks.stream import one_pass; one_pass(sys.argv[1], sys.argv[2], int(sys.argv[3]))"


def make_records(num_bytes: int) -> list[str]:
    """Return records of about 2 KB of random words, together about `num_bytes`."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 12, 5000)])
    records = [" ".join(words[rng.integers(0, len(words), 270)]) + "\n" for _ in range(2000)]
    return [records[i % 2000] for i in range(num_bytes // (sum(map(len, records)) // 2000))]


def write_file(folder: Path, kind: str, num_bytes: int) -> Path:
    """Write a file of about `num_bytes` of text; `parquet_one_group` has it all in one row group."""
    records, path = make_records(num_bytes), folder / f"{kind}_{num_bytes}.{kind.split('_')[0]}"
    if kind == "text":
        path.write_text("".join(records))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    else:
        table = pa.table({"text": records})
        if kind == "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=4000)
        else:
            pq.write_table(table, path, row_group_size=4000 if kind == "parquet" else len(records), use_dictionary=False)
    return path


def make_config(path: Path, kind: str, *, shuffle: bool, eval_fraction: float) -> DataConfig:
    source = SourceConfig(path=str(path), format=kind.split("_")[0])
    return DataConfig(sources=[source], eval_fraction=eval_fraction, stream=StreamConfig(shuffle=shuffle))


def is_complete(path: Path, kind: str) -> bool:
    """Return whether one epoch of blocks is the file's tokens."""
    records = make_records(2_000_000)
    text = b"".join(r.encode() if kind == "text" else r.encode() + b"\xff" for r in records)
    expected = np.frombuffer(text + b"\xff" * (kind == "text"), np.uint8).astype(np.int32)
    expected[expected == 255] = END
    stream = BlockStream(make_config(path, kind, shuffle=False, eval_fraction=0.0), seq_len=256, seed=0)
    blocks = stream.take((len(expected) - 1) // 256).blocks
    return np.array_equal(blocks[:, :-1].reshape(-1), expected[: len(blocks) * 256])


def measure_pass(path: Path, kind: str, *, num_bytes: int, seq_len: int) -> float:
    """Return tokens per second over about one epoch, shuffled, 5 % held out, in batches of BATCH blocks."""
    stream = BlockStream(make_config(path, kind, shuffle=True, eval_fraction=0.05), seq_len=seq_len, seed=0)
    num_batches = max(1, int(num_bytes * 0.9) // (BATCH * seq_len))
    began = time.perf_counter()
    for _ in range(num_batches):
        stream.take(BATCH)
    return num_batches * BATCH * seq_len / (time.perf_counter() - began)


def peak_memory(path: Path, kind: str, num_bytes: int) -> float:
    """Return the peak resident memory in MB of a fresh process that streams one epoch."""
    command = [sys.executable, "-c", ONE_PASS, str(path), kind, str(num_bytes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one_pass(path: str, kind: str, num_bytes: int) -> None:
    if num_bytes > 0:
        measure_pass(Path(path), kind, num_bytes=num_bytes, seq_len=256)
    # Not ru_maxrss, which a process takes over from its parent.
    print(status_bytes("VmHWM") / 2**20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="files of 100 and 400 MB instead of 25 and 100 MB")


def run(args: argparse.Namespace, report: Report) -> None:
    size = 100_000_000 if args.full else 25_000_000
    report.note(f"{size / 1e6:.0f} MB of text, byte tokenizer, batches of {BATCH}, shuffled, 5 % held out, {REPEATS} repeats")
    speeds: list[dict[str, Cell]] = []
    peaks: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            report.check(is_complete(write_file(folder, kind, 2_000_000), kind), f"{kind}: the blocks are the file's tokens")
            path, large = write_file(folder, kind, size), write_file(folder, kind, 4 * size)
            for seq_len in (256, 1024):
                rates = [measure_pass(path, kind, num_bytes=size, seq_len=seq_len) / 1e6 for _ in range(REPEATS)]
                speeds.append({"format": kind, "tokens of a block": seq_len, "M tokens/s": Spread(rates)})
            peaks.append({"format": kind, f"MiB, {size / 1e6:.0f} MB": peak_memory(path, kind, size)})
            peaks[-1][f"MiB, {4 * size / 1e6:.0f} MB"] = peak_memory(large, kind, 4 * size)
            path.unlink()
            large.unlink()
        idle = peak_memory(folder, "text", 0)
    report.table("speed", speeds)
    report.table(f"peak memory of a process that streams; of one that streams nothing {idle:.0f} MiB", peaks)
