"""Every family's codes and objective in plain dense float64 formulas, for the features that were on. A family that is
not named here has relu(pre) for codes and the squared error for its loss.

Where a family's gradient is not the formula's own (steps), the surrogate stands as a term that is 0 in value: s·(θ − θ)
with the second θ held constant has gradient s.
"""

import torch

PENALISED = ("L1", "Tied", "SqrtL1", "PAnneal", "Hoyer", "SmoothL0")


class Dense:
    """The pieces of one family's formulas: weights p, x, pre."""

    def __init__(self, coder, batch):
        self.name, self.coder, self.batch = type(coder).__name__, coder, batch
        self.p = {n: t.detach().double().requires_grad_() for n, t in coder.named_parameters()}
        p = self.p
        self.x, self.target = batch.x.double().flatten(1), batch.target.double().flatten(1)
        self.W_dec = p["W_dec"] if "W_dec" in p else torch.einsum("fr,fc->frc", p["V"], p["W"]).flatten(1)
        self.W_enc = p.get("W_enc", self.W_dec.T)
        self.centred = self.x - p["b_dec"] if coder.pre_bias else self.x
        self.pre = self.centred @ self.W_enc + (p["b_enc"] if "b_enc" in p else -(self.W_dec**2).sum(1) / 2)

    def codes(self, active):
        p, pre, coder = self.p, self.pre, self.coder
        if self.name == "ProLU":
            pre = pre - p["b_enc"] + (p["b_enc"] - p["b_enc"].detach())
        elif self.name == "Gated":
            pre = p["r_mag"].exp() * (pre - p["b_enc"]) + p["b_mag"]
        elif self.name == "JumpReLU":
            theta, near = p["threshold"], self.near()
            nudge = -(theta.detach() / coder.bandwidth) * (theta - theta.detach())
            return torch.where(active, pre, 0.0) + near * nudge
        elif self.name == "Spline":
            places = torch.linspace(-4, 4, 8, dtype=torch.double)
            hats = (1 - (pre.clamp(-4, 4)[..., None] - places).abs() / (8 / 7)).clamp_min(0)
            pre = pre + (hats * p["bend"]).sum(-1)
        elif self.name == "Switch":
            pre = pre * self.route().max(-1, keepdim=True).values
        elif self.name == "VQ":
            pre = torch.ones_like(pre)
        return torch.where(active, pre, 0.0)

    def near(self):
        return ((self.pre - self.p["threshold"]).abs() < self.coder.bandwidth / 2).double().detach()

    def route(self):
        return ((self.x - self.p["b_router"]) @ self.p["W_router"]).softmax(-1)

    def write(self, f, upto=None):
        x_hat = f[:, :upto] @ self.W_dec[:upto] + self.p["b_dec"]
        if "W_skip" in self.p:
            x_hat = x_hat + self.x @ self.p["W_skip"]
        return x_hat + self.p["lookup"][self.batch.tokens] if "lookup" in self.p else x_hat

    def error(self, x_hat):
        return ((x_hat - self.target) ** 2).sum(1).mean()

    def objective(self, active):
        """The loss at progress 1 with no dead feature."""
        f, coder, p = self.codes(active), self.coder, self.p
        if self.name == "Matryoshka":
            return sum(self.error(self.write(f, upto)) for upto in coder.prefixes) / len(coder.prefixes)
        if self.name == "Ordered":
            return sum(self.error(self.write(f, upto)) for upto in range(1, coder.d_sae + 1)) / coder.d_sae
        total = self.error(self.write(f))
        if self.name in (*PENALISED, "ProLU"):
            total = total + coder.sparsity * self.penalty(f)
        elif self.name == "Gated":
            gate = self.pre.relu()
            total = total + coder.sparsity * gate.sum(1).mean()
            total = total + self.error(gate @ self.W_dec.detach() + p["b_dec"].detach())
        elif self.name == "JumpReLU":
            theta = p["threshold"]
            l0 = active.double() - self.near() / coder.bandwidth * (theta - theta.detach())
            total = total + coder.sparsity * l0.sum(1).mean()
        elif self.name == "Switch":
            route = self.route()
            share = torch.bincount(route.argmax(-1), minlength=coder.experts) / len(route)
            total = total + coder.balance * coder.d_in * coder.experts * (share * route.mean(0)).sum()
        elif self.name == "TopK" and coder.multi > 1:
            more = torch.zeros_like(active)
            more.scatter_(1, self.pre.topk(coder.multi * coder.k).indices, True)
            total = total + self.error(self.write(self.codes(more & (self.pre > 0)))) / 8
        return total

    def penalty(self, f):
        root = torch.where(f > 1e-3, f.clamp_min(1e-3), 1.0)  # flat below 1e-3
        level = torch.where(f > 1e-3, 1.0, 0.0) * (f > 0)
        flat = (f > 0).double() * (1 - level)
        if self.name == "SqrtL1":
            return (level * root.sqrt() + flat * 1e-3**0.5).sum(1).mean()
        if self.name == "PAnneal":
            value = (level * root**0.2 + flat * 1e-3**0.2).sum(1).mean()
            return value * (f.sum(1).mean() / value).detach()  # as strong as L1 where p changed
        if self.name == "Hoyer":
            return (f.sum(1) ** 2 / (f**2).sum(1).clamp_min(1e-6)).mean()
        if self.name == "SmoothL0":
            return (1 - torch.exp(-(f**2) / (2 * self.coder.width**2))).sum(1).mean()
        return f.sum(1).mean()

