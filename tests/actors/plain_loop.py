"""The single-process reference: Eq. 71 with the delay rule as one plain loop, without Ray, the exchange or any actor.

It shares the model, the data and the optimizers with the product, and nothing of the runtime.
"""

import hashlib

import torch

from nlray.config import Config
from nlray.models.lm import build_model, level_parameters, sequence_parameters
from nlray.models.state import state_from_tensors, state_tensors
from nlray.optimizers import OuterOptimizer, clip_factor, clip_gradients_, total_norm
from nlray.pipelines.lanes import open_stream


def train_plainly(config: Config, num_steps: int, *, on_step=None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train for `num_steps` steps; return the final parameters (each level's newest version) and the losses."""
    torch.set_num_threads(config.sequence.resources.num_threads)
    model = build_model(config, config.model.vocab_size, seed=config.run.seed)
    num_tokens = config.sequence.global_batch * config.model.seq_len
    model.set_loss_tokens(num_tokens)
    stream, carried = open_stream(config), None
    outer = sequence_parameters(model)
    outer_optimizer = OuterOptimizer(outer, config.sequence.optimizer, horizon=config.run.steps)
    newest, optimizers, sums, versions = {}, {}, {}, {}
    initial, initial_optimizers, context = {}, {}, {}
    in_model = level_parameters(model)
    for name, level in config.levels.items():
        newest[name] = {n: p.detach().clone() for n, p in in_model[name].items()}
        optimizers[name] = OuterOptimizer(newest[name], level.optimizer, horizon=config.run.steps)
        sums[name] = {}
        versions[name] = {0: {n: p.clone() for n, p in newest[name].items()}}
        slower = config.cms.slower_than(name)
        if slower is not None:
            initial[name] = {n: p.clone() for n, p in newest[name].items()}
            initial_optimizers[name] = OuterOptimizer(initial[name], slower.optimizer, horizon=config.run.steps)
            context[name] = []
    losses = []
    for step in range(1, num_steps + 1):
        for name, level in config.levels.items():
            # With local updates the workers have made what a delay keeps from them.
            delay = 0 if level.local_update else level.visible_delay
            due = max(v for v in versions[name] if v == 0 or v * level.update_period + delay + 1 <= step)
            for n, p in in_model[name].items():
                p.data.copy_(versions[name][due][n])
        batch = stream.take(config.sequence.global_batch)
        blocks, states = torch.from_numpy(batch.blocks), []
        if batch.is_start:
            carried = None
        model.zero_grad(set_to_none=True)
        step_loss = 0.0
        for index, micro_batch in enumerate(blocks.split(config.sequence.micro_batch_size)):
            token_losses, state = model.token_losses(micro_batch, None if carried is None else carried[index])
            loss = token_losses.sum() / num_tokens
            loss.backward()
            step_loss += loss.item()
            states.append(state_from_tensors({n: t.detach() for n, t in state_tensors(state).items()}, like=state))
        carried = states if config.model.titans.carry_state else None
        losses.append(step_loss)
        for name, level in config.levels.items():
            for n, p in in_model[name].items() if step % level.grad_every == 0 else ():
                sums[name][n] = sums[name][n] + p.grad if n in sums[name] else p.grad.clone()
            if step % level.update_period == 0:
                for n, p in newest[name].items():
                    p.grad = sums[name][n] / (level.update_period // level.grad_every)
                gradients = [p.grad for p in newest[name].values()]
                norm = total_norm([torch.linalg.vector_norm(g).item() for g in gradients])
                torch._foreach_mul_(gradients, clip_factor(norm, level.optimizer.clip))
                optimizers[name].step(step)
                if name in initial:
                    context[name].append({n: p.grad for n, p in newest[name].items()})
                    if step % config.cms.slower_than(name).update_period == 0:
                        for n, p in initial[name].items():
                            p.grad = sum(gradients[n] for gradients in context[name]) / len(context[name])
                        initial_optimizers[name].step(step)
                        newest[name] = {n: p.clone() for n, p in initial[name].items()}
                        optimizers[name] = OuterOptimizer(newest[name], level.optimizer, horizon=config.run.steps)
                        context[name] = []
                versions[name][step // level.update_period] = {n: p.clone() for n, p in newest[name].items()}
                sums[name] = {}
        clip_gradients_([p.grad for p in outer.values()], config.sequence.optimizer.clip)
        outer_optimizer.step(step)
        if on_step is not None:
            on_step(step)
    return {**{n: p.detach() for n, p in outer.items()}, **{n: p for level in newest.values() for n, p in level.items()}}, losses


def digest_plainly(parameters: dict[str, torch.Tensor]) -> str:
    """Hash parameters by name, dtype, shape and bytes, as the run's summary does."""
    lines = []
    for name in parameters:
        array = parameters[name].contiguous().numpy()
        lines.append(f"{name} {array.dtype} {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
