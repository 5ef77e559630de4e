"""What the scale model supposes of the machines, and how long sums over GPUs take on them."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from nlray.errors import UserError

Place = Literal["pod", "pods", "regions"]
PLACES: dict[Place, str] = {"pod": "one pod", "pods": "across pods", "regions": "across regions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machines. Each field is an option `key=value`; those of one message were measured with Ray on two cores (docs/lab_notes.md)."""

    tflops: float = 989.0
    """Peak of a GPU in bf16, TFLOP/s (H100 SXM, dense)."""
    utilisation: float = 0.4
    """Share of the peak that forward and backward reach."""
    gpu_memory_gb: float = 80.0
    """Memory of a GPU, GB."""
    memory_share: float = 0.6
    """Share of it for parameters, gradients, optimizer and buffers; the rest is for activations."""
    hbm_gb_s: float = 3350.0
    """Bandwidth of a GPU's memory, GB/s."""
    pcie_gb_s: float = 55.0
    """Between a GPU and its host, GB/s each way."""
    copy_gb_s: float = 10.0
    """One process copies into Ray's object store, GB/s."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    nvlink_gb_s: float = 450.0
    """Between the GPUs of a node, GB/s of one GPU each way."""
    nic_gbit: float = 400.0
    """Network of one GPU, Gb/s each way, full between any two GPUs of a pod."""
    nic_us: float = 10.0
    """Latency of one message within a pod, microseconds."""
    rank_nic_gbit: float = 400.0
    """Network of the host of a level rank, Gb/s each way; a host holds one rank, on CPUs."""
    rank_memory_gb_s: float = 200.0
    """Bandwidth of that host's memory, GB/s: what sums and optimizers on it are bound by."""
    pod_oversubscription: float = 7.0
    """Links between pods carry the GPUs' network bandwidth divided by this."""
    pod_ms: float = 0.1
    """Latency of one message between pods, milliseconds."""
    region_gbit: float = 1.0
    """The link between two regions, Gb/s each way, for all together."""
    region_ms: float = 200.0
    """Latency of one message between regions, milliseconds, one way."""
    region_period: int = 64
    """Levels of this period or longer lie in the other region; the others stay in the pod."""
    hand_ms: float = 2.4
    """A worker hands a contribution for one rank to Ray, milliseconds; the ranks one after the other."""
    carry_ms: float = 2.2
    """From there until the rank has it, milliseconds."""
    receive_ms: float = 0.3
    """A rank's time for each contribution that it receives, milliseconds (supposed, not measured)."""
    update_ms: float = 2.0
    """Least time of an update, milliseconds."""
    publish_ms: float = 2.3
    """Least time for putting a version into the object store, milliseconds."""
    fetch_ms: float = 1.5
    """A worker fetches one rank's version, milliseconds; the ranks one after the other."""
    mtbf_h: float = 50000.0
    """Mean time between failures of one GPU with what belongs to it, or of one level rank's host, hours."""
    detect_s: float = 0.86
    """Until a failure is seen, seconds (a lost node)."""
    restart_s: float = 7.95
    """Until all roles have started again, seconds (a lost node), without the reading of their state."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0) or (value == 0 and not field.name.endswith(("_ms", "_us", "_s"))):
                raise UserError(f"{field.name} is {value}; allowed: a number above 0, times also 0")

    @property
    def nic(self) -> float:
        """Network of a GPU, bytes/s."""
        return self.nic_gbit * 1e9 / 8

    @property
    def rank_nic(self) -> float:
        """Network of a rank's host, bytes/s."""
        return self.rank_nic_gbit * 1e9 / 8

    def with_options(self, options: list[str]) -> "Machine":
        """Return the machine with `key=value` options; raise UserError for one that is not there or not a number."""
        changes = {}
        for option in options:
            key, equals, text = option.partition("=")
            kinds = {field.name: field.type for field in fields(self)}
            if not equals or key not in kinds:
                raise UserError(f"unknown option {key!r}; allowed: {', '.join(kinds)}")
            try:
                changes[key] = kinds[key](text)
            except ValueError as error:
                raise UserError(f"{key} is {text!r}; allowed: a number above 0") from error
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Link:
    """Between two places, all flows together. bandwidth: bytes/s each way."""

    bandwidth: float
    latency_s: float
    least_period: int
    """Levels of this period or longer lie beyond it."""


def link_between(place: Place, gpus: int, machine: Machine) -> Link | None:
    """Return the link between the workers and the levels; None: they are in one pod."""
    if place == "pod":
        return None
    if place == "pods":
        return Link(gpus * machine.nic / machine.pod_oversubscription, machine.pod_ms / 1e3, 1)
    return Link(machine.region_gbit * 1e9 / 8, machine.region_ms / 1e3, machine.region_period)


@dataclass(frozen=True, slots=True)
class SumCost:
    """A reduce-scatter, or the all-gather that mirrors it."""

    bytes_s: float
    """Seconds that the bytes take."""
    latency_s: float
    """Seconds of latency of one message."""
    nic_bytes: float
    """Through each GPU's network, each way."""

    @property
    def seconds(self) -> float:
        """Of one message."""
        return self.bytes_s + self.latency_s


def sum_cost(num_bytes: float, *, members: int, stride: int, machine: Machine) -> SumCost:
    """Return what a reduce-scatter of `num_bytes` in each of `members` GPUs costs: in the node first, then between the nodes.

    Rings for the bytes; a tree's log2(nodes) hops for the latency.

    Args:
        stride: distance of the members, in GPUs; those of a node are summed over NVLink.
    """
    in_node = min(members, max(1, machine.gpus_per_node // stride))
    nodes = math.ceil(members / in_node)
    nic_bytes = num_bytes / in_node * (nodes - 1) / nodes
    bytes_s = num_bytes * (in_node - 1) / in_node / (machine.nvlink_gb_s * 1e9) + nic_bytes / machine.nic
    return SumCost(bytes_s, math.ceil(math.log2(nodes)) * machine.nic_us * 1e-6, nic_bytes)


def exposed_s(total_s: float, buckets: int, backward_s: float) -> float:
    """Return what of an all-reduce in `buckets` equal parts is left after the backward pass that makes them at a constant rate.

    Bucket i of k is ready at backward * i / k, and they are summed one after the other; so the last one at least is left.
    """
    return max(total_s / buckets, total_s - backward_s * (1 - 1 / buckets))
