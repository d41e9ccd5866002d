"""Adam as the loop uses it."""

from torch import Tensor, nn, optim

from sae_lab.saes.base import SparseCoder


class Adam(optim.Adam):
    """Fused Adam over a coder's parameters. W_enc's memory lies column by column, and the fused kernel would copy its
    gradient at every step: here it is held as its transpose, which is the same memory."""

    def __init__(self, coder: SparseCoder):
        self.parameters = dict(coder.named_parameters())
        self.held = {n: nn.Parameter(self.as_held(n, p.detach())) for n, p in self.parameters.items()}
        super().__init__(self.held.values(), lr=0.0, fused=True)

    def _turned(self, name: str) -> bool:
        return self.parameters[name].dim() == 2 and not self.parameters[name].is_contiguous()

    def as_held(self, name: str, t: Tensor) -> Tensor:
        """A tensor in the parameter's shape, in the shape in which it is held."""
        return t.T if self._turned(name) else t

    def as_parameter(self, name: str, t: Tensor) -> Tensor:
        """A tensor in the shape in which it is held, in the parameter's shape."""
        return t.T if t.dim() == 2 and self._turned(name) else t

    def update(self, lr: float) -> None:
        """One step, with the gradients that the coder's parameters have."""
        for group in self.param_groups:
            group["lr"] = lr
        for name, p in self.parameters.items():
            held = self.held[name]
            assert held.data_ptr() == p.data_ptr(), f"{name} was given other memory while it is trained"
            held.grad = None if p.grad is None else self.as_held(name, p.grad)
        self.step()
