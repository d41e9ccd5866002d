from sae_lab.saes.families.batchtopk import BatchTopK


class Transcoder(BatchTopK):
    """``sl.Transcoder(d_in=576, d_sae=4608, k=32)``: a sparse replacement for a layer, from its input x to its output
    y (Dunefsky et al. 2024, arXiv:2406.11944).

        f = BatchTopK of x·W_enc + b_enc
        y_hat = f·W_dec + b_dec

    Loss: ‖y − y_hat‖² + AuxK. ``sl.train(sae, store)`` with a store of two sites, e.g. mlp_in and mlp_out, reads the
    first and writes the second; or pass ``sl.Batch(x, target)``. Other families become transcoders with ``d_out=``.

    Args: d_out: width of y; None: d_in. skip: add x·W_skip to y_hat. The others as of ``sl.TopK``.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, d_out: int | None = None,
        skip: bool = False,
    ):  # fmt: skip
        super().__init__(d_in, d_sae, k, k_aux, seed, d_out=d_in if d_out is None else d_out, skip=skip)


class SkipTranscoder(Transcoder):
    """``sl.SkipTranscoder(d_in=576, d_sae=4608, k=32)``: a transcoder with a skip, so that the linear part of the
    layer needs no features (Paulo et al. 2025, arXiv:2501.18823).

        y_hat = f·W_dec + b_dec + x·W_skip, f as of Transcoder

    Loss and arguments: as of ``sl.Transcoder``.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int = 32, k_aux: int | None = None, seed: int = 0, d_out: int | None = None
    ):
        super().__init__(d_in, d_sae, k, k_aux, seed, d_out, skip=True)
        del self.config["skip"]
