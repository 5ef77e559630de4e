"""Measure the speed and the memory of the stream: `python -m benchmarks.stream [--full]` (about a minute; files are temporary).

Correctness first: the blocks of each file are compared with its tokens. Then the median and spread of several passes per
format, the time of one small batch, and the peak memory of a fresh process (Linux) for a file and for one four times as large.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nlray.config import DataConfig, SourceConfig, StreamConfig
from nlray.pipelines.stream import BlockStream

REPEATS = 5
BATCH = 64
END = 256


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


def check(path: Path, kind: str) -> None:
    """Compare one epoch of blocks with the file's tokens."""
    records = make_records(2_000_000)
    text = b"".join(r.encode() if kind == "text" else r.encode() + b"\xff" for r in records)
    expected = np.frombuffer(text + b"\xff" * (kind == "text"), np.uint8).astype(np.int32)
    expected[expected == 255] = END
    stream = BlockStream(make_config(path, kind, shuffle=False, eval_fraction=0.0), seq_len=256, seed=0)
    blocks = stream.take((len(expected) - 1) // 256).blocks
    if not np.array_equal(blocks[:, :-1].reshape(-1), expected[: len(blocks) * 256]):
        raise SystemExit(f"{kind}: the blocks are not the file's tokens; no time is measured")


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
    command = [sys.executable, "-m", "benchmarks.stream", "--one-pass", str(path), kind, str(num_bytes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one_pass(path: str, kind: str, num_bytes: int) -> None:
    if num_bytes > 0:
        measure_pass(Path(path), kind, num_bytes=num_bytes, seq_len=256)
    # Not ru_maxrss, which a process takes over from its parent.
    print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="files of 100 and 400 MB instead of 25 and 100 MB")
    parser.add_argument("--one-pass", nargs=3, metavar=("PATH", "KIND", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_pass:
        path, kind, num_bytes = arguments.one_pass
        one_pass(path, kind, int(num_bytes))
        return
    size = 100_000_000 if arguments.full else 25_000_000
    versions = f"python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}"
    print(f"{versions}, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{size / 1e6:.0f} MB of text, byte tokenizer, batches of {BATCH}, shuffled, 5 % held out, {REPEATS} repeats")
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), size)


def run(folder: Path, size: int) -> None:
    idle = peak_memory(folder, "text", 0)
    print(f"peak memory of a process that streams nothing: {idle:.0f} MB")
    for kind in ("text", "parquet", "parquet_one_group", "arrow", "jsonl"):
        check(write_file(folder, kind, 2_000_000), kind)
        path, large = write_file(folder, kind, size), write_file(folder, kind, 4 * size)
        for seq_len in (256, 1024):
            rates = [measure_pass(path, kind, num_bytes=size, seq_len=seq_len) / 1e6 for _ in range(REPEATS)]
            spread = f"{min(rates):.0f} .. {max(rates):.0f}"
            print(f"{kind:18} seq_len {seq_len:5}: {statistics.median(rates):6.0f} M tokens/s  ({spread})")
        peaks = peak_memory(path, kind, size), peak_memory(large, kind, 4 * size)
        print(f"{kind:18} peak memory: {peaks[0]:.0f} MB at {size / 1e6:.0f} MB, {peaks[1]:.0f} MB at {4 * size / 1e6:.0f} MB")
        path.unlink()
        large.unlink()


if __name__ == "__main__":
    main()
