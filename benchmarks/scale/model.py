"""The cost model: a workload on so many GPUs with its levels in a place becomes step time, stall, traffic and goodput.

docs/scale.md has the assumptions.
"""

import math
from dataclasses import dataclass
from typing import Literal

from benchmarks.scale.events import StepTimes, simulate
from benchmarks.scale.exchange import Loads, level_routes
from benchmarks.scale.failures import mean_interval_s
from benchmarks.scale.machine import Machine, Place, exposed_s, sum_cost
from benchmarks.scale.workload import Layout, Workload, layout_of, with_ranks
from nlray.actors.workers.data_parallel import BUCKET_BYTES

Variant = Literal["built", "whole", "summed", "plain"]
VARIANTS: dict[Variant, str] = {
    "built": "as built",
    "whole": "as built, D = C",
    "summed": "summed first, D = C",
    "plain": "data parallel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One row of the table."""

    model: str
    gpus: int
    place: Place
    variant: Variant
    group: int
    """GPUs of one sequence worker."""
    compute_s: float
    times: StepTimes
    step_tokens: int
    busiest: str
    """The link that is used most; empty: there is no traffic."""
    busiest_bytes_s: float
    busiest_share: float
    num_ranks: int
    goodput: float

    @property
    def tokens_per_second(self) -> float:
        """While no failure is being met."""
        return self.step_tokens / self.times.step_s


def predict(work: Workload, gpus: int, place: Place, variant: Variant, machine: Machine, *, sequences: int) -> Prediction | None:
    """Return what a run would do; None where the GPUs do not hold one worker. sequences: of each GPU in a step."""
    layout = layout_of(work, gpus, place, machine)
    if layout is None:
        return None
    is_plain = variant == "plain"
    own = work.num_parameters if is_plain else work.sequence_parameters
    plans = () if is_plain else with_ranks(work, layout, machine)
    if variant in ("whole", "summed"):
        plans = tuple(plan.with_config(delay=plan.update_period) for plan in plans)
    compute_s = sequences * work.sequence_flops / (machine.tflops * 1e12 * machine.utilisation)
    summing_s, loads = all_reduce(4 * own, layout, machine, compute_s=compute_s, spans_places=is_plain)
    sharding_s, gathered = sharding(work, layout, machine, compute_s=compute_s)
    hbm = layout.group * machine.hbm_gb_s * 1e9
    # Each step's gradients of the levels are added to the open sums: two are read and one is written.
    adding_s = 3 * 4 * sum(plan.num_parameters for plan in plans) / hbm
    # The optimizer reads gradient, parameter and state and writes the latter two; in data parallelism it is the levels' too.
    tail_s = own * (12 + 2 * work.optimizer_bytes) / hbm
    routes, exchanged = level_routes(plans, layout, machine, state_bytes=work.level_state_bytes, is_summed=variant == "summed")
    times = simulate(routes, compute_s=compute_s + sharding_s + summing_s + adding_s, lead_s=work.lead_share * compute_s, tail_s=tail_s)
    loads = add_loads(loads, gathered, exchanged)
    busiest = max(loads, key=lambda name: loads[name][0] / loads[name][1], default="")
    num_bytes, bandwidth = loads.get(busiest, (0.0, math.inf))
    num_ranks = sum(plan.ranks for plan in plans)
    return Prediction(
        model=work.name,
        gpus=gpus,
        place=place,
        variant=variant,
        group=layout.group,
        compute_s=compute_s,
        times=times,
        # GPUs that make no whole worker are idle.
        step_tokens=layout.gpus * sequences * work.seq_len,
        busiest=busiest,
        busiest_bytes_s=num_bytes / times.step_s,
        busiest_share=num_bytes / bandwidth / times.step_s,
        num_ranks=num_ranks,
        goodput=goodput(work, layout, machine, step_s=times.step_s, num_ranks=num_ranks),
    )


def all_reduce(num_bytes: float, layout: Layout, machine: Machine, *, compute_s: float, spans_places: bool) -> tuple[float, Loads]:
    """Return the seconds that the all-reduce of the workers' gradients adds to a step, and what it puts on the links.

    It goes on beside the backward pass, two thirds of `compute_s`, in the runtime's buckets.

    Args:
        num_bytes: gradients of one worker.
        spans_places: half of the workers are beyond the link, so that all bytes cross it once each way.
    """
    link = layout.link if spans_places else None
    if layout.workers == 1:
        return 0.0, {}
    members = layout.workers if link is None else math.ceil(layout.workers / 2)
    one = sum_cost(num_bytes / layout.group, members=members, stride=layout.group, machine=machine)
    buckets = math.ceil(num_bytes / layout.group / BUCKET_BYTES)
    total_s = 2 * (one.bytes_s + buckets * one.latency_s)
    loads: Loads = {"GPU": (2 * one.nic_bytes, machine.nic)}
    if link is not None:
        # Buckets follow each other without waiting for the answer to the one before.
        total_s += num_bytes / link.bandwidth + 2 * link.latency_s
        loads["between places"] = (num_bytes, link.bandwidth)
    return exposed_s(total_s, buckets, 2 / 3 * compute_s), loads


def sharding(work: Workload, layout: Layout, machine: Machine, *, compute_s: float) -> tuple[float, Loads]:
    """Return the same for a worker that is a group of GPUs (not built): bf16 parameters gathered in forward and in backward, float32
    gradients summed, beside all of the computing."""
    if layout.group == 1:
        return 0.0, {}
    gather = sum_cost(2 * work.num_parameters, members=layout.group, stride=1, machine=machine)
    total_s, nic_bytes = 4 * gather.bytes_s, 4 * gather.nic_bytes
    return max(0.0, total_s - compute_s), {"GPU": (nic_bytes, machine.nic)}


def add_loads(*parts: Loads) -> Loads:
    """Return the bytes of all parts, link by link."""
    names = [name for part in parts for name in part]
    return {name: (sum(p[name][0] for p in parts if name in p), next(p[name][1] for p in parts if name in p)) for name in names}


def failure_costs(work: Workload, layout: Layout, machine: Machine) -> tuple[float, float]:
    """Return the seconds that a recovery point costs the steps, and those from a failure until steps begin again.

    A point: every worker's copy in host memory of the sequence parameters, their optimizer and the open sums. A restart reads as much over
    the network and brings it back.
    """
    sequence = work.sequence_parameters * (4 + work.optimizer_bytes)
    state = (sequence + 4 * (work.num_parameters - work.sequence_parameters)) / layout.group
    point_s = state / (machine.pcie_gb_s * 1e9)
    return point_s, machine.detect_s + machine.restart_s + state / machine.nic + point_s


def failure_rate(gpus: int, num_ranks: int, machine: Machine) -> float:
    """Return failures per second of all machines: a recovery of nlray takes every worker back, whoever fails."""
    return (gpus + num_ranks) / (machine.mtbf_h * 3600)


def goodput(work: Workload, layout: Layout, machine: Machine, *, step_s: float, num_ranks: int) -> float:
    """Return the share of the time that is spent in steps that are not thrown away; recovery points and restarts are not."""
    point_s, restart_s = failure_costs(work, layout, machine)
    work_s = work.window * step_s
    return work_s / mean_interval_s(work_s + point_s, restart_s, failure_rate(layout.gpus, num_ranks, machine))
