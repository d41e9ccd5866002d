from typing import Unpack

import torch
from torch import Tensor, nn

from sae_lab.saes import kernels, losses, portable
from sae_lab.saes.base import Wiring, check_weight
from sae_lab.saes.families.topk import TopK
from sae_lab.types import Batch, Codes, Output


class Switch(TopK):
    """``sl.Switch(d_in=576, d_sae=4608, k=32, experts=8)``: a router sends each token to one of several equal parts
    of the dictionary (Mudide et al. 2024, arXiv:2410.08201). Encoding costs d_in·d_sae/experts per token.

        p = softmax((x − b_router)·W_router), e = argmax p
        f = p_e · relu(the k largest pre of part e), others 0

    Loss: mse + balance · d_in · experts · Σ_e share_e · mean p_e + AuxK; experts · Σ is 1 if all experts get
    equal shares. The authors' code trains without AuxK. b_router starts at the geometric median of the first batch.

    Args: experts: parts; must divide d_sae. balance: weight of the balance, per dimension of x. The others as of
    ``sl.TopK``.
    """

    takes_multi = False

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, experts: int = 8, balance: float = 0.03, k_aux: int | None = None,
        seed: int = 0, **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, **wiring)
        if not isinstance(experts, int) or experts < 1 or d_sae % experts:
            raise ValueError(f"experts must divide d_sae={d_sae}, got {experts!r}: they have equal parts of it")
        self.experts, self.balance = experts, balance
        self.check_sparsity(k)
        check_weight("balance", balance)
        self.config |= {"experts": experts, "balance": balance}
        generator = torch.Generator().manual_seed(seed + 1)
        self.W_router = nn.Parameter(torch.randn(d_in, experts, generator=generator) / d_in)
        self.b_router = nn.Parameter(torch.zeros(d_in))

    def check_sparsity(self, value: float) -> None:
        super().check_sparsity(value)
        if value > (size := self.d_sae // self.experts):
            raise ValueError(f"k={value} is more than the {size} features of one expert: lower k or use fewer experts")

    @torch.no_grad()
    def begin(self, batch: Batch) -> None:
        """Start from the first batch: b_router at the geometric median of x, unless it is set."""
        super().begin(batch)
        if not bool(self.b_router.any()):
            self.b_router.copy_(losses.geometric_median(batch.x.flatten(1)))

    def route(self, x: Tensor) -> Tensor:
        """The router's probabilities p, "batch experts"."""
        return portable.routes(x, self.eval_act()[1])

    def eval_act(self):
        own = {"W_router": self.W_router, "b_router": self.b_router, "experts": self.experts, "k": self.k}
        return portable.routed, own

    def _codes(self, x: Tensor) -> tuple[Tensor, Codes]:
        """pre is filled only at each token's own expert, and 0 elsewhere."""
        probability, expert = self.route(x).max(-1)
        size = self.d_sae // self.experts
        with torch.no_grad():
            pre = x.new_zeros(len(x), self.d_sae)
            features = torch.empty(len(x), self.k, dtype=torch.long, device=x.device)
            bias = self.read_bias()
            for e in range(self.experts):
                rows, part = (expert == e).nonzero().flatten(), slice(e * size, (e + 1) * size)
                if len(rows):
                    scores = kernels.affine(x[rows], self.W_enc[:, part], bias[part], self.precision)
                    pre[rows, part] = scores
                    features[rows] = scores.topk(self.k, sorted=False).indices + e * size
            chosen = kernels.equal_rows(pre.gather(1, features), features, self.d_sae)
        chosen = self._encode_at(chosen, x)
        return pre, chosen._replace(values=chosen.values.relu() * probability.repeat_interleave(self.k))

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        probabilities = self.route(self._rows(batch.x)[0])
        share = torch.bincount(probabilities.argmax(-1), minlength=self.experts) / len(probabilities)
        balance = self.experts * (share * probabilities.mean(0)).sum()
        terms = super().terms(batch, out, progress=progress, dead=dead)
        return terms | {"balance": self.balance * self.d_in * balance}

    @torch.no_grad()
    def fold(self, scale: float | Tensor, target_scale: float | Tensor | None = None) -> None:
        super().fold(scale, target_scale)
        self.W_router *= scale
        self.b_router /= scale
