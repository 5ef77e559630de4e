"""What a peer does in its own venv, one turn for each line on stdin; benchmarks/peers.py starts it. It knows nothing of nlray.

titans-pytorch    NeuralMemory: a layer, forward and backward
nested-learning   its own training loop, with its paper-faithful configuration of self-modifying Titans

An answer is a line of JSON: the turn's seconds, whether what it computes `is_right` (finite, with gradients), and its parameters.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

Describe = Callable[[], dict[str, Any]]


class Turns:
    """The other end of `Peer.turn`. Whatever the peer prints goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._started = time.perf_counter()

    def end(self, describe: Describe) -> None:
        """End a turn, answer, and wait for the next."""
        seconds = time.perf_counter() - self._started
        self._answers.write(json.dumps({"seconds": seconds, **describe()}) + "\n")
        self._answers.flush()
        self.wait()


def titans_pytorch(turns: Turns, options: dict[str, Any]) -> None:
    """Forward and backward of a layer. renew: tokens after which gradients are taken at the weights reached by then; 0: never."""
    from titans_pytorch import NeuralMemory

    dim, heads = options["dim"], options["heads"]
    layer = NeuralMemory(
        dim=dim,
        dim_head=dim // heads,
        heads=heads,
        chunk_size=options["chunk_size"],
        batch_size=options["renew"] or None,
        # As wide as our MLP memories.
        default_model_kwargs={"depth": options["depth"], "expansion_factor": 1.0},
    )
    x = torch.randn(options["batch"], options["seq_len"], dim, requires_grad=True)
    upstream = torch.randn(options["batch"], options["seq_len"], dim)
    turns.wait()
    while True:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y, _ = layer(x)
        y.backward(upstream)
        turns.end(lambda y=y: {"is_right": _are_finite(y, x.grad), "parameters": _count(layer)})


def nested_learning(turns: Turns, options: dict[str, Any]) -> None:
    """A step of its training loop, updates in context and of the CMS on; left once a step, where it would save a checkpoint."""
    from nested_learning import training
    from nested_learning.config_utils import compose_config

    dim, seq_len = options["dim"], options["seq_len"]
    config = compose_config(
        "pilot_selfmod_paper_faithful",
        overrides=[
            f"model.vocab_size={options['vocab_size']}",
            f"model.dim={dim}",
            f"model.num_layers={options['layers']}",
            f"model.heads={options['heads']}",
            "data.source=synthetic",
            f"+data.vocab_size={options['vocab_size']}",
            "+data.dataset_size=4096",
            f"data.seq_len={seq_len}",
            "data.num_workers=0",
            # As ours; with the Muon of its configuration it stops at its own convolution: torch's takes matrices only.
            "optim.type=adamw",
            "train.steps=100000000",
            "train.log_interval=1",
            "train.device=cpu",
            "train.mixed_precision.enabled=false",
            "train.checkpoint.enable=false",
            "logging.enabled=false",
        ],
    )

    def end_step(cfg: Any, model: torch.nn.Module, optimizer: Any, **rest: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        turns.end(lambda: {"is_right": len(gradients) > 0 and _are_finite(*model.parameters()), "parameters": _count(model)})

    training.maybe_save_checkpoint = end_step
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        turns.wait()
        training.run_training_loop(config, device=torch.device("cpu"))


def _are_finite(*tensors: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    package, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    {"titans-pytorch": titans_pytorch, "nested-learning": nested_learning}[package](Turns(), options)


if __name__ == "__main__":
    main()
