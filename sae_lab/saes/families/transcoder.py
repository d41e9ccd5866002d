"""Transcoder: the sparse stand-in of a layer, from what it reads to what it writes (Dunefsky et al. 2024,
arXiv:2406.11944); with a skip, Paulo et al. 2025, arXiv:2501.18823."""

from sae_lab.saes.families.batchtopk import BatchTopK


class Transcoder(BatchTopK):
    """y_hat = f·W_dec + b_dec, f = BatchTopK of x·W_enc + b_enc. Loss: ‖y − y_hat‖² + AuxK, y not x but what the layer
    makes of it.

    ``sl.train(coder, store)`` with a store of two sites, e.g. mlp_in and mlp_out, reads the first and writes the
    second; or pass ``sl.Batch(x, target)``. Any other family becomes a transcoder with ``d_out=``.

    Args: d_out: width of y; None is d_in.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, d_out: int | None = None,
        skip: bool = False,
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, d_out=d_in if d_out is None else d_out, skip=skip)


class SkipTranscoder(Transcoder):
    """y_hat = f·W_dec + b_dec + x·W_skip: the linear part of the layer needs no features."""

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, d_out: int | None = None
    ):
        super().__init__(d_in, d_sae, k, k_aux, seed, d_out, skip=True)
        del self.config["skip"]
