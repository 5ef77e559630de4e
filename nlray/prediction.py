"""A guess at a level's update that is made but has not come yet, for the steps that have to do without it.

With a delay D > 0 some steps use version v of a level though version v + 1 is made already (never more than one, since D <= C; see
`nlray.levels`). A level moves on much as it moved before, its optimizer sees to that, so those steps use

    W_v + share (W_v - W_{v-1})

instead of W_v. It takes no traffic and one buffer of the level's size, and is the same in every worker. A share of 1 stands for the update
that is missing; more of it looks further ahead (docs/lab_notes.md has what came of either).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Prediction:
    """Predicts parameters in place, and keeps what it takes to do so and to undo it.

        prediction.keep_(is_next=True)      # before another version is written into the parameters
        prediction.predict_()               # an update is missing
        with prediction.true_parameters(): evaluate()

    Args:
        parameters: those that the model uses, float32 of any shapes.
        share: of the last change that is added.
    """

    def __init__(self, parameters: Sequence[Tensor], share: float) -> None:
        self.parameters, self.share = list(parameters), share
        self._other: list[Tensor] | None = None
        """W_{v-1} while the parameters are W_v; W_v itself while they are predicted; None: there is no version before."""
        self._is_predicted = False

    @torch.no_grad()
    def keep_(self, *, is_next: bool) -> None:
        """Keep the version that the parameters are, or are predicted from; another one is written into them next.

        is_next: that is the one after it; otherwise nothing is predicted from the two.
        """
        if not is_next:
            self._other = None
        elif self._other is None:
            self._other = [p.detach().clone() for p in self.parameters]
        elif not self._is_predicted:
            torch._foreach_copy_(self._other, self.parameters)
        self._is_predicted = False

    @torch.no_grad()
    def predict_(self) -> None:
        """Predict the parameters from the version that they are; nothing where they are predicted, or no version is before it."""
        if self._is_predicted or self._other is None:
            return
        for parameter, other in zip(self.parameters, self._other, strict=True):
            # Every operation rounds by itself: W_v + share * (W_v - W_{v-1}).
            change = parameter.sub(other).mul_(self.share)
            other.copy_(parameter)
            parameter.add_(change)
        self._is_predicted = True

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """Have the parameters be the version itself for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self._is_predicted:
            for parameter, other in zip(self.parameters, self._other, strict=True):
                shown = parameter.detach().clone()
                parameter.copy_(other)
                other.copy_(shown)
