"""A level of one's own: a squared ReLU (arXiv 2109.08668) and an output matrix of low rank.

nlray train tiny cms.mlp=lowrank:LowRank cms.mlp_options.rank=8
"""

from nlray.models.level import Level
from nlray.nn.layers import out_std


class LowRank(Level):
    def __init__(self, form, *, rank: int = 16):
        if rank < 1:
            raise ValueError(f"rank is {rank}; allowed: 1 or more")
        super().__init__(form)
        self.add_linear("in", form.hidden, form.dim, std=form.dim**-0.5)
        self.add_linear("down", rank, form.hidden, std=form.hidden**-0.5)
        self.add_linear("up", form.dim, rank, std=out_std(rank, form.num_layers))

    def mlp(self, xn_BTD):
        h_BTF = self.linear(xn_BTD, self.w_in, self.b_in).relu().square()
        return self.linear(self.linear(h_BTF, self.w_down, self.b_down), self.w_up, self.b_up)
