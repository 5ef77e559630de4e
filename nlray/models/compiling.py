"""`sequence.compile`: the MLPs of every block, all levels or the one MLP, each as one program by torch.compile.

These work token by token: norms, activations and residuals are fused there. The memory in context is not compiled: its products are many
and small, it gains nothing and would take minutes.
"""

import torch

from nlray.errors import UserError
from nlray.models.lm import LanguageModel


def compile_mlps(model: LanguageModel) -> None:
    """Have the MLPs of the model compiled at their first call; parameters and their names stay.

    Raises:
        UserError: torch.compile does not work on the model's device here, for want of a compiler for example.
    """
    import torch._inductor.config as inductor

    # In this process alone: an actor has few cores, and its children would outlive it where it is killed.
    inductor.compile_threads = 1
    try:
        torch.compile(lambda x: torch.sin(x) * 2)(torch.ones(8, device=model.embedding.weight.device))
    except Exception as error:  # whatever the compiler of the device raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"sequence.compile is true, but torch.compile fails here: {reason[:200]}; allowed: false") from error
    for block in model.blocks:
        mlp = getattr(block, block.mlp_name)
        # Not the module itself: what is hooked to it stays outside.
        mlp.forward = torch.compile(mlp.forward, dynamic=False)
