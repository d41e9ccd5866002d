from typing import Unpack

import torch
from torch import Tensor, nn

from sae_lab.saes.base import Wiring
from sae_lab.saes.families.batchtopk import BatchTopK
from sae_lab.types import Batch, Codes


class Tokenized(BatchTopK):
    """``sl.Tokenized(d_in=576, d_sae=4608, vocab=len(lm.tokenizer), k=32)``: the part of x that the token alone
    determines is looked up, so that the codes hold what its context adds (Dooms & Wilhelm 2024, "Tokenized SAEs").

        f as of BatchTopK
        x_hat = f·W_dec + b_dec + lookup[token]

    Loss: mse + AuxK. ``lookup`` "vocab d_out" starts at each token's mean over the first batch. ``sae(x, tokens)`` and
    ``sae.decode(f, tokens)`` need the token ids; ValueError without.

    Args: vocab: the number of token ids. The others as of ``sl.TopK``.
    """

    out_units = ("b_dec", "lookup")

    def __init__(
        self, d_in: int, d_sae: int, vocab: int, k: int = 32, k_aux: int | None = None, seed: int = 0,
        **wiring: Unpack[Wiring],
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, **wiring)
        if not isinstance(vocab, int) or vocab < 1:
            raise ValueError(f"vocab must be a positive integer, got {vocab!r}: pass len(lm.tokenizer)")
        self.config["vocab"] = vocab
        self.lookup = nn.Parameter(torch.zeros(vocab, self.d_out))

    @torch.no_grad()
    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._check_tokens(batch.tokens)
        if batch.tokens is not None and not bool(self.lookup.any()):
            sums = torch.zeros_like(self.lookup).index_add_(0, batch.tokens, batch.target - self.b_dec)
            counts = torch.bincount(batch.tokens, minlength=len(self.lookup))
            self.lookup.copy_(sums / (counts + 1)[:, None])  # rare tokens start nearer to 0

    def _write(self, codes: Codes | Tensor, x: Tensor | None, tokens: Tensor | None) -> Tensor:
        self._check_tokens(tokens)
        return super()._write(codes, x, tokens)

    def _check_tokens(self, tokens: Tensor | None) -> None:
        if tokens is None:
            raise ValueError("a Tokenized coder needs token ids: call sae(x, tokens), or train it on a store")
        if int(tokens.max()) >= len(self.lookup) or int(tokens.min()) < 0:
            raise ValueError(
                f"token ids must lie from 0 to vocab-1={len(self.lookup) - 1}, got {int(tokens.min())} to "
                f"{int(tokens.max())}: build the coder with vocab=len(lm.tokenizer)"
            )
