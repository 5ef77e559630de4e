"""The sections `sequence` and `exchange`: the data-parallel workers, what their actors request of Ray, and how levels travel."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nlray.config.checks import Count, Range, Section
from nlray.config.optimizer import OptimizerConfig
from nlray.errors import UserError

Units = Annotated[float, Range(0, 1e6)]
"""Of a resource of Ray."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig(Section):
    """What one actor (a sequence worker or a level rank) requests of Ray."""

    cpus: Units = 1.0
    """Logical CPUs; also sets the actor's torch threads (at least one) unless `threads` does."""
    gpus: Literal["auto"] | Units = "auto"
    """GPUs; `auto`: one if the cluster has any, else none."""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """torch threads; null: `cpus` rounded down, at least 1."""
    custom: dict[str, Units] = field(default_factory=dict)
    """Custom Ray resources, for example `{far_pool: 1}`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray node labels the actor's node must carry, for example `{region: west}`."""

    def check(self) -> None:
        gpus = 0.0 if self.gpus == "auto" else self.gpus
        self.require(gpus < 1 or gpus % 1 == 0, "gpus", "auto, a whole number, or a share of one")
        for key, amount in {"cpus": self.cpus, "gpus": gpus, **{f"custom.{name}": amount for name, amount in self.custom.items()}}.items():
            if 0 < amount < 1e-4:
                raise UserError(f"{key} is {amount}; allowed: 0, or the 0.0001 that Ray counts by, or more")

    @property
    def num_threads(self) -> int:
        return self.threads if self.threads is not None else max(1, int(self.cpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResourcesConfig(ResourcesConfig):
    """As ResourcesConfig: a rank has little to do."""

    cpus: Units = 0.1
    """Logical CPUs; also sets the actor's torch threads (at least one) unless `threads` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig(Section):
    """The data-parallel sequence workers."""

    workers: Count = 1
    """Data-parallel workers W."""
    global_batch: Count = 8
    """Sequences of one step, over all workers."""
    micro_batch: Count | None = None
    """Sequences of one forward and backward pass in a worker; null: the worker's whole share."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the sequence parameters: all that is not a level's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; parameters, gates, memory states, accumulators and optimizer state stay float32."""
    shard: Literal["none", "full"] = "none"
    """none: every worker keeps all sequence parameters and their optimizer state. full: every worker keeps a share of whole tensors and of
    their optimizer state, and has the rest for one block at a time; levels are not concerned. Use it with recompute_blocks."""
    recompute_blocks: bool = False
    """Whether the backward pass computes each block again and does not keep its activations. It saves the memory of all blocks but one,
    for the time of a second forward pass; the same bits."""
    compile: bool = False
    """Whether torch.compile makes one program of each block's MLPs, at the first step. Not with levels in context."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Of each worker."""

    def check(self) -> None:
        self.require(self.global_batch % self.workers == 0, "global_batch", f"a multiple of sequence.workers={self.workers}")
        is_divisor = self.micro_batch is None or self.worker_batch % self.micro_batch == 0
        self.require(is_divisor, "micro_batch", f"a divisor of global_batch / workers = {self.worker_batch}, or null")

    @property
    def is_sharded(self) -> bool:
        """Whether there is anything to share: one worker keeps all."""
        return self.shard == "full" and self.workers > 1

    @property
    def worker_batch(self) -> int:
        """Sequences of one step in one worker."""
        return self.global_batch // self.workers

    @property
    def micro_batch_size(self) -> int:
        return self.micro_batch if self.micro_batch is not None else self.worker_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeConfig(Section):
    """How level versions reach the sequence workers."""

    mode: Literal["delayed", "eager"] = "delayed"
    """delayed: workers use a version exactly from its step on (deterministic); eager: as soon as it has arrived, at the latest
    at that step (the one mode whose result may differ from run to run)."""
    compression: Literal["none", "bf16", "int8"] = "none"
    """What contributions travel as: float32, or a half or a quarter of the bytes; what rounding leaves goes into the worker's next
    contribution to the level."""
    transport: Literal["object_store", "nixl"] = "object_store"
    """How contributions and versions travel: through Ray's object store, or read by NIXL out of the memory of the process that has them
    (one-sided: shared memory, RDMA or TCP). NIXL runs on Linux; in a clone `.venv/bin/pip install -e '.[nixl]'` installs it. The result
    is the same."""
