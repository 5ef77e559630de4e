"""The exchange of the levels as stages on links, with the messages of docs/architecture.md, 'The exchange'.

`benchmarks/scale/events.py` plays them.
"""

import math
from collections.abc import Sequence

from benchmarks.scale.events import Route, Stage
from benchmarks.scale.machine import Machine, SumCost, sum_cost
from benchmarks.scale.workload import Layout
from nlray.levels.flat_buffers import FlatLayout
from nlray.levels.plan import LevelPlan
from nlray.levels.schedule import newest_version, visible_version


def message_bytes(plan: LevelPlan) -> list[int]:
    """Return the bytes of one contribution, and of one version, for each rank."""
    return [FlatLayout(shard).size_bytes for shard in plan.shards]


def bytes_moved(plan: LevelPlan, steps: int, workers: int) -> tuple[int, int]:
    """Return the bytes that all workers have pushed after `steps`, and pulled up to the last of them, as `metrics.jsonl` counts them."""
    each = workers * sum(message_bytes(plan))
    return each * newest_version(steps, plan.update_period), each * visible_version(steps, plan.update_period, plan.delay)


Loads = dict[str, tuple[float, float]]
"""Per link the bytes of one step, one way, and its bandwidth in bytes/s."""


def level_routes(
    plans: Sequence[LevelPlan], layout: Layout, machine: Machine, *, state_bytes: dict[str, float], is_summed: bool
) -> tuple[list[Route], Loads]:
    """Return each level's round trip, and what the links carry.

    As built every worker sends its gradients to the ranks, a node fetches each version once, and a rank adds up W contributions. With
    `is_summed` (not built) the workers first sum among themselves, each GPU sends its part of the sum, and a version comes back so.
    """
    routes, loads = [], {}
    workers, group, gpus, link = layout.workers, layout.group, layout.gpus, layout.link
    copies = 1 if is_summed else workers
    fetched = 1 if is_summed else math.ceil(workers / max(1, machine.gpus_per_node // group))
    for plan in plans:
        messages = message_bytes(plan)
        total, largest = sum(messages), max(messages)
        summing = sum_cost(total / group, members=workers, stride=group, machine=machine) if is_summed else SumCost(0.0, 0.0, 0.0)
        sent, received = copies * total / gpus, fetched * total / gpus
        # Summed: a GPU has a part of one rank's share or so, and a rank hears of as many GPUs as hold its share.
        handed = math.ceil(plan.ranks / gpus) if is_summed else plan.ranks
        heard = math.ceil(gpus / plan.ranks) if is_summed else workers
        far_s = link.latency_s if layout.lies_far(plan) else machine.nic_us * 1e-6
        out = {"gpu out": sent / machine.nic, f"{plan.name} in": copies * largest / machine.rank_nic + heard * machine.receive_ms / 1e3}
        back = {f"{plan.name} out": fetched * largest / machine.rank_nic, "gpu in": received / machine.nic}
        if layout.lies_far(plan):
            out["place out"], back["place in"] = copies * total / link.bandwidth, fetched * total / link.bandwidth
        copy_s = sent / (machine.pcie_gb_s * 1e9) + sent / (machine.copy_gb_s * 1e9)
        stages = (
            Stage(links={"gpu out": summing.seconds}),
            Stage(fixed_s=copy_s + handed * machine.hand_ms / 1e3),
            Stage(links=out, fixed_s=far_s + machine.carry_ms / 1e3),
            Stage(fixed_s=rank_s(plan, largest, copies, state_bytes[plan.name], machine)),
            Stage(links=back, fixed_s=far_s + handed * machine.fetch_ms / 1e3),
        )
        gathered = Stage(links={"gpu in": summing.seconds + received / (machine.pcie_gb_s * 1e9)})
        own_s = 2 * total / group / (machine.hbm_gb_s * 1e9) if is_summed else total / group / (machine.pcie_gb_s * 1e9)
        stages = (*stages, gathered) if is_summed else stages
        routes.append(Route(update_period=plan.update_period, delay=plan.delay, stages=stages, take_s=own_s))
        carried = {
            "GPU": (sent + summing.nic_bytes, machine.nic),
            f"rank of {plan.name}": (max(copies, fetched) * largest, machine.rank_nic),
            **({"between places": (max(copies, fetched) * total, link.bandwidth)} if layout.lies_far(plan) else {}),
        }
        for name, (num_bytes, bandwidth) in carried.items():
            loads[name] = (loads.get(name, (0.0, 0.0))[0] + num_bytes / plan.update_period, bandwidth)
    return routes, loads


def rank_s(plan: LevelPlan, shard_bytes: int, contributions: int, state: float, machine: Machine) -> float:
    """Return a rank's seconds for one update, bound by memory.

    Each contribution is read, the sum read and written; the optimizer reads gradient, parameters and state and writes the latter two; the
    version is read and written, and put into the object store. The ranks of a level wait for each other's norms.

    Args:
        shard_bytes: of the rank's parameters.
        contributions: how many it adds up.
        state: bytes of optimizer state for each byte of parameters.
    """
    moved = shard_bytes * (3 * contributions + 3 + 2 * state + 2)
    norms_s = 2 * machine.nic_us * 1e-6 if plan.ranks > 1 else 0.0
    copy_s = shard_bytes / (machine.copy_gb_s * 1e9)
    return moved / (machine.rank_memory_gb_s * 1e9) + copy_s + (machine.update_ms + machine.publish_ms) / 1e3 + norms_s
