"""The Newton-Schulz iteration (Eq. 42-44): the nearest semi-orthogonal matrix, up to a spread of the singular values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlray.backend import Path
from nlray.optimizers.backend import uses_triton
from nlray.optimizers.base import TINY

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of Muon's iteration: steep at 0, so that small singular values come up within few steps."""


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return an approximation of U V^T for a matrix M = U S V^T.

    The singular values of the result lie between about 0.7 and 1.2; a singular value of zero stays zero.

    Eq. 42-44 are gradient descent on |O^T O - I|^2. This is Muon's polynomial of the same form: O starts as M / |M|, and each
    iteration is O <- a O + b (O O^T) O + c (O O^T)^2 O. It is computed in the matrix's dtype, float32 for the optimizers of
    nlray; torch's Muon uses bfloat16.

    Args:
        matrix: [rows, columns], floating point; not modified.
        steps: iterations, >= 1.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    # The product of the shorter side with itself is the smaller one.
    o = matrix.t() if is_tall else matrix
    o = o / torch.linalg.vector_norm(o).clamp_min(TINY)
    for _ in range(steps):
        gram = o @ o.t()
        o = torch.addmm(o, torch.addmm(gram, gram, gram, beta=b, alpha=c), o, beta=a)
    return o.t() if is_tall else o


def newton_schulz_each(matrices: Sequence[Tensor], steps: int = 5, *, path: Path = "auto") -> list[Tensor]:
    """Return `newton_schulz` of each matrix.

    Where `uses_triton` chooses the kernels, matrices of equal shape are computed together, with bfloat16 operands.
    """
    if uses_triton(path, matrices):
        from nlray.optimizers.triton_newton_schulz import newton_schulz_batched

        return newton_schulz_batched(matrices, steps)
    return [newton_schulz(matrix, steps) for matrix in matrices]
