"""The section `data`: the sources of text, the tokenizer, and the order of the stream."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nlray.config.checks import Count, Decay, Natural, Range, Section, Text


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Section):
    """One source of text: a file, a folder or a glob on any fsspec URL."""

    path: Text
    """File, folder, glob or fsspec URL; `stdlib:` is the Python sources and pydoc topics of this interpreter."""
    format: Literal["auto", "parquet", "arrow", "jsonl", "csv", "tsv", "text"] = "auto"
    """File format; `auto` goes by the ending."""
    weight: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """Share of the blocks drawn from this source, relative to the other sources' weights."""
    text_column: Text | None = None
    """Column that holds the text (parquet, arrow, jsonl, csv, tsv); null: `text`."""
    tag_columns: list[Text] = field(default_factory=list)
    """Columns whose values are kept with each block (for example language, domain)."""
    on_error: Literal["stop", "skip"] = "stop"
    """A record that cannot be read (a line that is not JSON, text that is not UTF-8) ends the run, or is left out and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(Section):
    """How the blocks of the sources are ordered and read ahead."""

    shuffle: bool = True
    """Shuffle files, row groups and records within a row group by `run.seed`; false: the order of the files."""
    shuffle_tokens: Natural = 1 << 20
    """Tokens of a source whose blocks are shuffled together; less than two blocks: blocks of a document stay in order."""
    prefetch: Annotated[int, Range(0, 10_000)] = 4
    """Batches prepared ahead in the background; 0: none."""
    lane_blocks: Count = 64
    """With model.titans.carry_state: consecutive blocks of a source that a row of the batch reads before it starts again elsewhere. The
    blocks of all lanes, lane_blocks times sequence.global_batch, are read together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """The stream of token blocks."""

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig(path="stdlib:")])
    """Sources, mixed by weight; on the command line a path alone is a source too: `data.sources=[a.parquet,b/]`."""
    tokenizer: Text = "bytes"
    """`bytes`, or a Hugging Face tokenizers JSON file."""
    end_token: Text | None = None
    """Token of a Hugging Face tokenizer that ends each document, never made from text; null: what config.json, generation_config.json or
    tokenizer_config.json next to a tokenizer.json names, else the first known one that the tokenizer has. `bytes` has its own."""
    begin_token: Text | None = None
    """Token of a Hugging Face tokenizer that is put before each document and each prompt (BOS), never made from text; null: none."""
    tokenizer_processes: Annotated[int, Range(0, 256)] = 0
    """Processes that each worker starts for a Hugging Face tokenizer; 0: none, it tokenizes in its own process, alongside the steps."""
    eval_fraction: Decay = 0.05
    """Share of the records held out for evaluation, picked by a hash of their text; 0: none."""
    stream: StreamConfig = field(default_factory=StreamConfig)

    def check(self) -> None:
        self.require(len(self.sources) > 0, "sources", "one source or more")
        for key, value in (("end_token", self.end_token), ("begin_token", self.begin_token)):
            self.require(value is None or self.tokenizer != "bytes", key, "null", "with data.tokenizer=bytes")
        is_possible = self.tokenizer_processes == 0 or self.tokenizer != "bytes"
        self.require(is_possible, "tokenizer_processes", "0", "with data.tokenizer=bytes")
