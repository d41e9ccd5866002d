"""SparseCoder: read (x -> pre), act (pre -> codes), write (codes -> x_hat). One class for training and inference."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab import costs, noting
from sae_lab.arguments import as_annotated, check_least
from sae_lab.costs import Cost
from sae_lab.results import Shown, counted
from sae_lab.saes import kernels, losses, portable, publishing, writing
from sae_lab.saes.kernels import T
from sae_lab.types import Batch, Codes, Output, Site, TokenMask, check_feature

log = logging.getLogger(__name__)

AUX_WEIGHT = 1 / 32  # Gao et al. 2024
EVERY = slice(None)  # all features: act's default
SPARSE_BELOW = 0.1  # share of features on, up to which sparse gradients are cheaper than dense ones
CALIBRATION_ROWS = 4096  # encoded at a time: pre-activations of all rows would be large
BYTES_A_CODE = 64  # while codes are sorted: value and feature twice over, and five numbers of eight bytes
HASHED_ROWS = 4096
QUANTILE = 0.999  # f_scale: this quantile of a feature's activations where it fires


class Wiring(TypedDict, total=False):
    """What every family takes: see ``SparseCoder``."""

    d_out: int | None
    skip: bool


class SparseCoder(nn.Module):
    """``out = sae(x)``; ``sae.encode(x)``, ``sae.decode(f)``, ``sae.codes_of(x)``, ``sae.save(path)``. Every family:

        pre = (x - b_dec)·W_enc + b_enc
        f = act(pre)
        x_hat = f·W_dec + b_dec

    A family names its activation (``eval_act``, ``act``) and its loss terms (``terms``). Sparse families return
    ``Codes`` from ``act``, so that training makes no dense ``batch d_sae`` gradient. A row of ``W_dec`` is a feature's
    direction.

    Args:
        d_in: width of x. d_sae: number of features. seed: of the random start, at least 0.
        d_out: makes a transcoder: the target is another activation, of this width, and b_dec is not subtracted from x.
        skip: add x·W_skip to x_hat; needs d_out.

    Attributes:
        W_enc "d_in d_sae", W_dec "d_sae d_out" (training keeps rows at unit norm), b_enc " d_sae", b_dec " d_out".
        f_scale " d_sae": 99.9th percentile of each feature's activations where it fires, on training text; 0: dead.
        pre_bias: whether b_dec is subtracted from x.
        input_norm: how each x is normalised before encoding, which x_hat undoes: "none", "layer" (mean 0, standard
            deviation 1) or "length" (norm √d_in).
        reads, writes: its sites. meta: facts of its training (model, token mask, dead features, text).
    """

    W_enc: Tensor
    W_dec: Tensor
    dense = False  # True: act needs gradients through the whole matrix of pre-activations
    elementwise = False  # True: a code depends on its entry of pre and on parameters of its feature alone
    tied = False  # True: the family defines W_enc out of W_dec
    input_norm: Literal["none", "layer", "length"] = "none"
    code_units: tuple[str, ...] = ("b_enc",)  # parameters and buffers that scale as the codes do, for fold
    out_units: tuple[str, ...] = ("b_dec",)  # those that scale as x_hat does
    sparsity_name: str | None = None  # the argument that sets sparsity (such as k), which may change in training
    holds_l0 = False  # True: where target_l0 is set, the penalty of terms brings L0 to it
    target_l0: float | None = None  # training sets it, by TrainConfig(target_l0=)
    precision = "float32"  # of dense products; within a training step that of its TrainConfig
    any_dead: bool | None = None  # whether a feature is dead, where training knows it without asking the device
    select = kernels.Selector()  # chooses the largest pre-activations; several ranks set one that spans them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the arguments of a family's constructor and methods, as those of this class are checked."""
        super().__init_subclass__(**kwargs)
        for name, method in list(vars(cls).items()):
            if name == "__init__" or hasattr(getattr(SparseCoder, name, None), "as_annotated"):
                setattr(cls, name, as_annotated(method))

    @as_annotated
    def __init__(
        self, d_in: int, d_sae: int, config: dict[str, Any], *, seed: int = 0, d_out: int | None = None,
        skip: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_least(1, d_in=d_in, d_sae=d_sae, d_out=d_in if d_out is None else d_out)
        if skip and d_out is None:
            raise ValueError("skip=True needs d_out: only a transcoder has a skip, an SAE's would learn the identity")
        self.config = {"d_in": d_in, "d_sae": d_sae, "seed": seed, **config}
        self.config |= ({} if d_out is None else {"d_out": d_out}) | ({"skip": True} if skip else {})
        self.transcodes = d_out is not None
        self.pre_bias = not self.transcodes
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out or d_in
        self.in_shape: tuple[int, ...] = (d_in,)
        self.out_shape: tuple[int, ...] = (self.d_out,)
        generator = torch.Generator().manual_seed(seed)
        self._make_weights(generator)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, self.d_out)) if skip else None
        self.register_buffer("f_scale", torch.zeros(d_sae))
        self.f_scale: Tensor
        self.reads: tuple[Site, ...] = ()
        self.writes: tuple[Site, ...] = ()
        self.meta: dict[str, Any] = {}
        self.path = None
        self.in_raw_units = False  # False in training, which scales activations; True: weights fit raw ones
        self.scratch: kernels.Memory | None = None  # training's
        self.progress = 1.0  # of training, 0 to 1: for an act that warms up or anneals

    def _make_weights(self, generator: torch.Generator) -> None:
        """W_dec random unit rows; W_enc its transpose (random unit columns for a transcoder). The encoder is
        stored feature by feature, as its gradients are."""
        directions = nn.functional.normalize(torch.randn(self.d_sae, self.d_in, generator=generator), dim=1)
        if not self.tied:
            self.W_enc = nn.Parameter(directions.clone().T)
        if self.transcodes:
            directions = nn.functional.normalize(torch.randn(self.d_sae, self.d_out, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep weights in float32 under any cast: a coder computes in float32, and ``.half()`` rounds its weights."""
        super()._apply(fn, recurse)
        other = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point() and t.dtype != torch.float32]
        for tensor in other:
            dtype, tensor.data = tensor.dtype, tensor.data.float()
        if other:
            log.warning("a coder computes in float32: its weights, cast to %s, are kept as float32", dtype)
        return self

    def eval_act(self) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """(a function of ``saes.portable``, the family's own tensors and numbers) that make codes of pre-activations in
        eval mode. A family without ``eval_act`` works on this machine only, and defines ``act``."""
        return portable.by_itself, {"coder": self}

    def act(self, pre: Float[Tensor, "..."], features: Tensor | slice = EVERY) -> Codes | Tensor:
        """Codes from pre-activations, by ``eval_act`` unless a family trains in another way.

        Of an ``elementwise`` family: the codes of all of pre, or of some entries that belong to ``features``.
        """
        function, own = self.eval_act()
        if function is portable.by_itself:
            raise NotImplementedError(f"{type(self).__name__} must define act, eval_act or both")
        if not self.elementwise:
            return function(pre, None, own, self._choose)
        return function(pre, None, {n: t[features] if getattr(t, "shape", ()) else t for n, t in own.items()})

    def _choose(self, pre: Tensor, k: float) -> Codes:
        """The k largest pre-activations of each row."""
        return self.select.per_row(pre, round(k))

    def reach(self, pre: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, "batch d_sae"]:
        """Bool: where an ``elementwise`` family's codes or their gradients can differ from 0."""
        return pre > 0

    def terms(self, batch: Batch, out: Output, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        """Named loss terms whose sum is the objective. ``progress`` runs from 0 to 1 over training."""
        return {"mse": losses.mse(out.x_hat, batch.target)}

    @torch.no_grad()
    def begin(self, batch: Batch) -> None:
        """Start from the first batch: b_dec at the target's geometric median, unless it is set."""
        if not bool(self.b_dec.any()):
            self.b_dec.copy_(losses.geometric_median(batch.target.flatten(1)))

    def fit_threshold(self, blocks: Iterable[Tensor]) -> None:
        """Fit the threshold of eval mode on training activations, in families that have one."""

    @as_annotated
    @torch.no_grad()
    def fold(self, scale: float | Tensor, target_scale: float | Tensor | None = None) -> None:
        """``sae.fold(scale)``: make weights that were trained on scale·x serve x.

        Args: scale: of x, a number, or one per layer of a crosscoder. target_scale: of the target; None: the same.
        Codes come out in units of the target. With one number for both, only biases and thresholds change; else W_enc
        and W_dec are rescaled too. ValueError for a scale that is not positive and finite.
        """
        if self.input_norm != "none":  # normalised activations have no unit
            return
        into = self._per_column(scale, self.in_shape)
        out = self._per_column(scale if target_scale is None else target_scale, self.out_shape)
        # Codes take the unit of the outputs, the geometric mean where layers differ: 1/scale then undoes scale.
        common = out[0] if bool((out == out[0]).all()) else out.log().mean().exp()
        for name in self.code_units:
            self.get_parameter_or_buffer(name).div_(common)
        for name in self.out_units:
            self.get_parameter_or_buffer(name).div_(out)
        if self.W_skip is not None:
            self.W_skip.mul_(into[:, None] / out)
        if not bool((into == common).all() and (out == common).all()):
            self.W_enc.mul_((into / common)[:, None])
            self.W_dec.mul_(common / out)

    def _per_column(self, scale: float | Tensor, shape: tuple[int, ...]) -> Tensor:
        column = torch.as_tensor(scale, dtype=torch.float32, device=self.b_dec.device)
        if not bool(((column > 0) & column.isfinite()).all()):
            raise ValueError(f"scale must be positive and finite, got {scale}: activations are multiplied by it")
        return column.reshape(*column.shape, *[1] * (len(shape) - column.dim())).expand(shape).reshape(-1)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self.state_dict(keep_vars=True)[name]

    def choose_sites(self, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """(reads, writes) among a store's sites: those set on the coder, else the store's only one; a transcoder reads
        the first and writes the second. ValueError, with the remedy, if several choices are possible."""
        if self.transcodes:
            if self.reads and self.writes:
                return self.reads, self.writes
            if len(sites) != 2:
                raise ValueError(
                    f"a transcoder needs a target: a store of two sites, the one it reads and the one it writes, got "
                    f"{len(sites)} ({', '.join(map(repr, sites))}); or set sae.reads and sae.writes"
                )
            return (sites[0],), (sites[1],)
        if len(sites) == 1:
            return (sites[0],), (sites[0],)
        if self.reads and self.reads[0] in sites:
            return self.reads, self.reads
        raise ValueError(f"this store has several sites ({', '.join(map(repr, sites))}): choose with store.at(site)")

    @as_annotated
    def forward(self, x: Float[Tensor, "..."], tokens: Tensor | None = None) -> Output:
        """x "*batch d_in" -> Output(x_hat, codes, pre), in float32, for any leading axes.

        tokens: the ids, "*batch", for families that ask for them.
        """
        return self.output(x, tokens)

    def output(self, x: Tensor, tokens: Tensor | None = None) -> Output:
        """``forward`` without its check of the data: the training loop checks once a step."""
        rows, lead = self._rows_here(x)
        pre, codes = self._codes(self._enter(rows)[0])
        x_hat = self._leave(codes, rows, tokens)
        return Output(x_hat.reshape(*lead, *self.out_shape), codes, pre)

    @as_annotated
    def encode(self, x: Float[Tensor, "..."], tokens: Tensor | None = None) -> Float[Tensor, "*batch d_sae"]:
        """The dense codes f of x, ``batch d_sae``."""
        codes = self.codes(x)
        dense = codes.dense() if isinstance(codes, Codes) else codes
        return dense.reshape(*x.shape[: x.dim() - len(self.in_shape)], self.d_sae)

    @as_annotated
    def codes(self, x: Float[Tensor, "..."]) -> Codes | Tensor:
        """The codes of x's rows as the family makes them: sparse ``Codes``, or dense."""
        return self._codes(self._enter(self._rows_here(x)[0])[0])[1]

    @as_annotated
    def sparse_codes(self, x: Float[Tensor, "..."]) -> Codes:
        """The codes of x's rows as sparse ``Codes``, whatever the family; only positive ones, no gradients."""
        with torch.no_grad():
            return kernels.positive(self.codes(x))

    @as_annotated
    @torch.no_grad()
    def codes_of(self, x: Tensor | Iterable[Tensor], strengths: bool = False) -> Codes:
        """``sae.codes_of(x)``: the codes of any number of rows, as one sparse ``Codes`` on the CPU.

        In eval mode, without gradients, some thousand rows at a time on the coder's device; only positive codes.

        Args: x: rows, or blocks of rows one after another, on any device. strengths: give ``sae.strengths`` of the
        codes.
        """
        parts, blocks = [], [x] if isinstance(x, Tensor) else x
        most = min(CALIBRATION_ROWS, len(x)) if isinstance(x, Tensor) else CALIBRATION_ROWS
        with self.evaluating(), self.reusing(most):
            for rows in (part.to(self.W_dec.device) for block in blocks for part in block.split(CALIBRATION_ROWS)):
                codes = self.sparse_codes(rows)
                codes = self.strengths(codes, rows) if strengths else codes
                parts.append(kernels.joined([codes], self.d_sae))  # on the CPU
        return kernels.joined(parts, self.d_sae)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """``with sae.evaluating(): ...``: in eval mode, where the codes of a row depend on that row alone; afterwards
        in the mode it was in."""
        before = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(before)

    @as_annotated
    def decode(self, f: Float[Tensor, "*batch d_sae"], tokens: Tensor | None = None) -> Float[Tensor, "..."]:
        """x_hat = f·W_dec + b_dec for dense codes; what a skip adds, and an ``input_norm``, need x: see forward."""
        if f.dim() < 1 or f.shape[-1] != self.d_sae:
            raise ValueError(f"f's last axis must be d_sae={self.d_sae}, got shape {tuple(f.shape)}")
        x_hat = self._write(f.reshape(-1, self.d_sae).float(), None, None if tokens is None else tokens.reshape(-1))
        return x_hat.reshape(*f.shape[:-1], *self.out_shape)

    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Rows of W_dec at unit norm; a row of zeros stays zero."""
        return nn.functional.normalize(self.W_dec.detach().float(), dim=1)

    @as_annotated
    def sizes(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch 1"]:
        """The factor by which f·W_dec of each row of x is multiplied: 1 without an ``input_norm``."""
        rows, lead = self._rows(x)
        size = None if self.transcodes else self._enter(rows)[2]
        return (torch.ones_like(rows[:, :1]) if size is None else size).reshape(*lead, 1)

    @overload
    def strengths(self, codes: Codes, x: Tensor) -> Codes: ...
    @overload
    def strengths(self, codes: Tensor, x: Tensor) -> Tensor: ...
    @as_annotated
    @torch.no_grad()
    def strengths(self, codes: Codes | Tensor, x: Float[Tensor, "..."]) -> Codes | Tensor:
        """``sae.strengths(codes, x)``: the length of each feature's contribution to x_hat, f_i·‖W_dec[i]‖·sizes(x).

            x_hat = strengths·directions + silent(x)

        Codes depend on their unit (f_i/c with c·W_dec[i] is the same coder), and on an ``input_norm``; strengths do
        not. Args: codes: of rows x, dense "*batch d_sae" or sparse.
        """
        device = codes.values.device if isinstance(codes, Codes) else codes.device  # read codes are on the CPU
        norms, sizes = (t.to(device) for t in (self.W_dec.detach().float().norm(dim=1), self.sizes(x)))
        if isinstance(codes, Codes):
            return codes._replace(values=codes.values * norms[codes.features] * sizes.flatten()[codes.rows])
        return codes * norms * sizes

    @as_annotated
    @torch.no_grad()
    def silent(self, x: Float[Tensor, "..."], tokens: Tensor | None = None) -> Float[Tensor, "..."]:
        """``sae.silent(x)``: x_hat of rows x if no feature fired: b_dec, plus the contributions of a skip, a lookup
        and the mean that an ``input_norm`` subtracts."""
        rows, lead = self._rows_here(x)
        nothing = torch.zeros(0, device=rows.device)
        none = Codes(nothing, nothing.long(), nothing.new_zeros(len(rows) + 1).long(), self.d_sae)
        return self._leave(none, rows, tokens).reshape(*lead, *self.out_shape)

    def portable(self, features: Sequence[int] | None = None, whole: bool = True) -> dict[str, Any]:
        """The coder in eval mode as a plan for the functions of ``saes.portable``, which run without this library.

        Args: features: those whose codes are wanted; None: all. whole: whether the plan can decode; if not, it has only
        the weights that the features' codes need.

        Raises ValueError for a coder of several layers.
        """
        if len(self.in_shape) > 1:
            raise ValueError(f"a {type(self).__name__} reads several sites at once: edits need a coder of one site")
        self._require_float32()
        act, own = self.eval_act()
        pick: Any = slice(None) if features is None or list(features) == list(range(self.d_sae)) else list(features)
        with torch.no_grad():
            weights = {"bias": self.read_bias(), "W_enc": self.W_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        weights |= {"W_skip": self.W_skip, "lookup": getattr(self, "lookup", None)}
        weights = {name: None if t is None else t.detach() for name, t in weights.items()}
        own = {name: value.detach() if isinstance(value, Tensor) else value for name, value in own.items()}
        weights["W_some"] = weights["W_dec"] if pick == slice(None) else weights["W_dec"][pick]  # type: ignore[index]
        if not whole:
            weights |= {"W_dec": None, "W_skip": None, "lookup": None}
            if pick != slice(None) and act in portable.ONE_BY_ONE:
                weights |= {"W_enc": weights["W_enc"][:, pick], "bias": weights["bias"][pick]}  # type: ignore[index]
                own = {name: value[pick] if getattr(value, "shape", ()) else value for name, value in own.items()}
                pick = slice(None)
        facts = {"act": act, "own": own, "pick": pick, "input_norm": self.input_norm, "transcodes": self.transcodes}
        return weights | facts

    def write_of(
        self, change: Float[Tensor, "batch some"], features: Sequence[int] | slice, x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """The change of x_hat of rows x by a change of the codes of some features."""
        return change @ self.W_dec[features] * self.sizes(x)

    def read_bias(self) -> Float[Tensor, " d_sae"]:
        """b in pre = x·W_enc + b."""
        return self.b_enc - self.b_dec @ self.W_enc if self.pre_bias else self.b_enc

    def _read(self, x: Tensor) -> Tensor:
        """Pre-activations of float rows."""
        bias = self.read_bias()
        memory = None if torch.is_grad_enabled() else self.scratch
        out = memory.pre(len(x), self.d_sae) if memory else None
        return kernels.affine(x, self.W_enc, bias, self.precision, out)

    def _codes(self, x: Tensor) -> tuple[Tensor, Codes | Tensor]:
        """(pre, codes) of float rows. Sparse codes get their gradient at the chosen places only."""
        if self.elementwise:
            return self._elementwise_codes(x)
        if self.dense:
            pre = self._read(x)
            return pre, self.act(pre)
        with torch.no_grad():
            pre = self._read(x)
            chosen = self.act(pre)
        assert isinstance(chosen, Codes)
        chosen = self._encode_at(chosen, x)
        return pre, chosen._replace(values=chosen.values.relu())

    def _elementwise_codes(self, x: Tensor) -> tuple[Tensor, Codes | Tensor]:
        """Sparse codes where they are few, since gradients then cost what is active; else dense ones."""
        with torch.no_grad():
            pre = self._read(x)
            reach = self.reach(pre)
            few = int(reach.count_nonzero()) < SPARSE_BELOW * reach.numel()
        if not few:
            pre = self._encode_at(pre, x)
            return pre, self.act(pre)
        codes = self._encode_at(kernels.where(pre, reach), x)
        return pre, codes._replace(values=self.act(codes.values, codes.features))  # type: ignore[call-arg]

    def _encode_at(self, codes: T, x: Tensor) -> T:
        """The same codes, with gradients where they are on; or the same pre-activations, with all gradients."""
        if not torch.is_grad_enabled():
            return codes
        bias = self.b_dec if self.pre_bias else None
        return kernels.encode_at(codes, x, self.W_enc, self.b_enc, bias, self.scratch, self.precision)

    def _write(self, codes: Codes | Tensor, x: Tensor | None, tokens: Tensor | None) -> Tensor:
        """x_hat of rows of codes. x: the rows they are of; None leaves out what a skip adds."""
        W_skip = None if x is None else self.W_skip
        return portable.written(self._decode(codes), self.b_dec, x, W_skip, tokens, getattr(self, "lookup", None))

    def _decode(self, codes: Codes | Tensor) -> Tensor:
        """codes·W_dec."""
        return weighted_sum(codes, self.W_dec, self.precision)

    def _leave(self, codes: Codes | Tensor, x: Tensor, tokens: Tensor | None) -> Tensor:
        """x_hat of float rows x and their codes, with an ``input_norm`` undone."""
        rows, mean, size = self._enter(x)
        x_hat = self._write(codes, rows, None if tokens is None else tokens.reshape(-1))
        return x_hat if size is None or self.transcodes else x_hat * size + mean  # a transcoder's target is left raw

    def _rows(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """(x as float rows, its leading axes). ValueError for a width that is not the coder's."""
        axes = len(self.in_shape)
        if x.dim() < axes or x.shape[-axes:] != self.in_shape:
            where = f" (trained at {', '.join(map(repr, self.reads))})" if self.reads else ""
            expected = f"x's last axis must be d_in={self.d_in}" if axes == 1 else f"x must end in {self.in_shape}"
            raise ValueError(f"{expected}{where}, got shape {tuple(x.shape)}")
        return x.reshape(-1, self.d_in).float(), x.shape[: x.dim() - axes]

    def _rows_here(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """``_rows`` of what meets the weights. ValueError also for another device, and for weights of another dtype."""
        found = self._rows(x)
        if x.device != self.b_dec.device:
            raise ValueError(f"x lies on {x.device} and the coder on {self.b_dec.device}: pass x.to(sae.b_dec.device)")
        self._require_float32()
        return found

    def _require_float32(self) -> None:
        """ValueError for weights that were put there in another dtype; a cast of the coder keeps them in float32."""
        if self.b_dec.dtype != torch.float32:
            raise ValueError(f"a coder computes in float32, and this one's weights are {self.b_dec.dtype}: sae.float()")

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """(normalised rows, mean, size), with x = rows·size + mean; size None without an ``input_norm``."""
        return portable.entered(self.input_norm, x)

    def check_sparsity(self, value: float) -> None:
        """ValueError for a value that the constructor would refuse, and in families without ``sparsity_name``."""
        if self.sparsity_name is None:
            raise ValueError(
                f"a {type(self).__name__} has no argument that sets the sparsity of its codes (such as k or sparsity): "
                "change the learning rate, or train another family"
            )
        check_k(value, self.d_sae) if self.sparsity_name == "k" else check_weight(self.sparsity_name, value)

    @as_annotated
    def set_sparsity(self, value: float) -> None:
        """``sae.set_sparsity(16)``: another k or weight of the penalty, in ``config`` too."""
        self.check_sparsity(value)
        assert self.sparsity_name is not None
        setattr(self, self.sparsity_name, value)
        self.config[self.sparsity_name] = value

    def training_threshold(self, codes: Codes | Tensor) -> Tensor | None:
        """The threshold in training, where activations have norm √d_in: the least code that is on. None in families
        without a threshold. codes: of the last batch."""
        return None

    def loss(self, batch: Batch, *, progress: float, dead: Tensor) -> dict[str, Tensor]:
        """Named scalars whose sum is the objective. ``dead``: bool per feature, the ones AuxK revives."""
        self.progress = progress
        return self.terms(batch, self.output(batch.x, batch.tokens), progress=progress, dead=dead)

    def auxk(self, batch: Batch, out: Output, dead: Tensor, k: int) -> dict[str, Tensor]:
        """AuxK: the k strongest dead features fit the residual, so that they get a gradient (Gao et al. 2024,
        arXiv:2406.04093). Empty while no feature is dead."""
        codes = None if self.any_dead is False else self.select.among(out.pre, dead.nonzero().flatten(), k)
        if codes is None:
            return {}
        codes = self._encode_at(codes, self._rows(batch.x)[0])
        fitted = self._decode(codes._replace(values=codes.values.relu()))
        residual = (batch.target - out.x_hat).detach().flatten(1)
        return {"auxk": AUX_WEIGHT * losses.mse(fitted, residual)}

    @torch.no_grad()
    def project(self) -> None:
        """After each step: decoder rows to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @as_annotated
    @torch.no_grad()
    def calibrate(self, blocks: Iterable[Tensor], unseen: Tensor | None = None) -> dict[str, int | float]:
        """With the final weights, fit ``f_scale`` and count dead features on training activations; fit the threshold on
        activations that training never saw (None: on training activations, which the coder fits better).

        Returns {"dead": share of features that never fire on them, "tokens": their number, "l0": eval-mode L0}.
        """
        parts = [part for x in blocks for part in x.split(CALIBRATION_ROWS)]
        with self.reusing(CALIBRATION_ROWS):
            self.fit_threshold(parts if unseen is None else unseen.split(CALIBRATION_ROWS))
        codes, tokens = self.eval().codes_of(parts), sum(map(len, parts))
        self._fit_scale(codes)
        dead = float((self.f_scale == 0).float().mean())
        return {"dead": dead, "tokens": tokens, "l0": len(codes.values) / tokens}

    @torch.no_grad()
    def _fit_scale(self, codes: Codes) -> None:
        """``f_scale`` from positive codes on the CPU."""
        # The bits of positive floats, as integers, have the floats' order: one integer sort, by feature, then value.
        ordered = ((codes.features << 32) | codes.values.view(torch.int32)).sort().values
        counts = torch.bincount(codes.features, minlength=self.d_sae)
        place = counts.cumsum(0) - counts + (QUANTILE * (counts - 1)).long().clamp_min(0)
        live = counts > 0
        scale = torch.zeros(self.d_sae)
        scale[live] = (ordered[place[live]] & 0xFFFFFFFF).int().view(torch.float32)
        self.f_scale.copy_(scale)

    @contextmanager
    def multiplying(self, precision: str) -> Iterator[None]:
        """While open, dense products are made in a precision of ``TrainConfig``, whatever torch is set to."""
        cuda, before = self.b_dec.is_cuda, ""
        self.precision = precision
        if cuda:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            del self.precision
            if cuda:
                torch.set_float32_matmul_precision(before)

    @contextmanager
    def reusing(self, rows: int) -> Iterator[None]:
        """While open, passes without gradients over at most ``rows`` rows write pre-activations into one buffer."""
        before, self.scratch = self.scratch, kernels.Memory(rows, self.d_sae, self.W_dec.device)
        try:
            yield
        finally:
            self.scratch = before

    @as_annotated
    @torch.no_grad()
    def set_features(
        self, features: Int[Tensor, " some"], directions: Float[Tensor, "some d_out"], reads: Float[Tensor, "some d_in"]
    ) -> None:
        """Replace features: rows of W_dec (brought to unit norm) and columns of W_enc."""
        self.W_dec[features] = directions.to(self.W_dec)
        if not self.tied:
            self.W_enc[:, features] = reads.to(self.W_enc).T
        before = self.W_dec.detach().clone()
        self.project()
        others = torch.ones(self.d_sae, dtype=torch.bool, device=self.W_dec.device)
        others[features] = False
        self.W_dec[others] = before[others]  # their norms need not be 1

    @property
    def mask(self) -> TokenMask | None:
        """The token mask it was trained under, or None where it was trained on plain tensors."""
        return TokenMask.from_dict(self.meta["mask"]) if self.meta.get("mask") else None

    @property
    def site(self) -> Site:
        """The site it reads. ValueError for a coder without one, or with several."""
        if len(self.reads) != 1:
            raise ValueError(
                "this coder does not know its site: train it on a store, or set "
                "sae.reads = sae.writes = (sl.Site(...),)"
            )
        return self.reads[0]

    def feature(self, feature: Any) -> int:
        """A feature's number, checked."""
        return check_feature(feature, self.d_sae)

    @property
    def id(self) -> str:
        """The name under which ``sl.notes`` and labels are kept; calibration and rounding do not change it.

        A hash of the encoder's shape and rows in float16, made once and kept in ``meta``; copies have the same.
        """
        if not noting.is_id(self.meta.get("id")):
            digest = hashlib.sha256(repr(tuple(self.W_enc.shape)).encode())
            for rows in self.W_enc.detach().T.split(HASHED_ROWS):
                digest.update(rows.cpu().half().contiguous().numpy().tobytes())
            self.meta["id"] = digest.hexdigest()[:16]
        return self.meta["id"]

    @property
    def path(self) -> str | None:
        """What it was loaded from or last saved to: a folder, or a name that ``sl.load`` knows."""
        return self._path

    @path.setter
    def path(self, path: str | None) -> None:
        self._path, self._weights_there = path, self._marks()

    @property
    def is_saved(self) -> bool:
        """Whether ``sl.load(sae.path)`` gives it as it is now: it has a path, and no weight has changed since."""
        return self._path is not None and self._marks() == self._weights_there

    def _marks(self) -> list[tuple[int, int]]:
        """What changes with the weights; torch counts changes in place."""
        tensors = self.state_dict().values()
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def fingerprint(self) -> str:
        """A hash of family, config and all weights, and of ``input_norm`` and ``pre_bias`` where they were changed."""
        digest = hashlib.sha256(repr((type(self).__name__, sorted(self.config.items()))).encode())
        if self.input_norm != "none" or self.pre_bias == self.transcodes:
            digest.update(repr((self.input_norm, self.pre_bias)).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @as_annotated
    def save(
        self, path: str | Path, format: str = "sae_lab", dtype: torch.dtype = torch.float32, bits: int | None = None
    ) -> Path:
        """``sae.save(path)``: write the coder into a folder, atomically; ``sl.load(path)`` reads it.

        Args: format: "sae_lab" (config.json and sae.safetensors), "saelens", "sparsify" or "dictionary_learning"; the
        last three keep no ``f_scale``. dtype: of the matrices, in the format "sae_lab"; float16 takes half the disk and
        rounds to 3 digits. bits: 8 or 4, in place of dtype: whole numbers of that size, and a scale for each 64; a
        quarter or a seventh of the disk. Measure what it costs: ``sl.evals.reconstruction``.

        Raises ValueError for an unknown format, a family that the format cannot hold, other bits, and a dtype that is
        no float or cannot hold the weights.
        """
        return writing.save(self, path, format, dtype, bits)

    @as_annotated
    def push_to_hub(self, repo: str, private: bool | None = None, report: Shown | None = None) -> str:
        """``sae.push_to_hub("user/name")``: put the coder on the Hugging Face hub, in one commit; returns its address.

        ``sl.load("user/name")`` reads it; so does SAELens, ``SAE.from_pretrained("user/name", "saelens")``, where its
        format can hold the coder. The model card has the facts of the training and the figures of
        ``sae.meta["card"]``; text that you write around them on the hub stays. Your labels and notes are not sent:
        ``sl.notes(sae).save(file)`` writes them. The token is that of ``hf auth login``, or HF_TOKEN.

        Args: private: whether a new repository is; None: as your account has it. report: a result whose table goes
        into the card, such as that of ``sl.evals.report(sae)``. Raises ValueError where the hub refuses or cannot be
        reached, where private=True meets a public repository, and for one that holds something else than a coder.
        """
        return publishing.push(self, repo, private, report)

    def extra_repr(self) -> str:
        at = f", at {', '.join(map(repr, self.reads))}" if self.reads else ""
        return ", ".join(f"{k}={v}" for k, v in self.config.items() if k != "seed") + at


def check_k(k: float, d_sae: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= d_sae:
        raise ValueError(f"k must be an integer from 1 to d_sae={d_sae}, got {k!r}")


def check_weight(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value}")


def weighted_sum(codes: Codes | Tensor, directions: Tensor, precision: str = "float32") -> Tensor:
    """codes·directions. precision: of a product of dense codes."""
    if isinstance(codes, Codes):
        return kernels.decode(codes, directions)
    return kernels.product(codes, directions, precision)


def calibration_cost(coder: SparseCoder, x: Tensor, unseen: Tensor | None, rows: int) -> Cost:
    """The cost of ``coder.calibrate`` on ``rows`` rows, from a trial on x, which leaves the coder calibrated."""
    with costs.peak() as peak:
        facts, seconds = costs.timed(coder.calibrate, [x], unseen)
    larger = min(CALIBRATION_ROWS, rows) / len(x)  # rows encoded at a time
    codes = int(rows * facts["l0"]) * BYTES_A_CODE
    ram, vram = int(larger * peak.ram) + codes, int(larger * peak.vram)
    return Cost(counted(len(x), "row"), seconds * rows / len(x), 0, ram, vram, {"L0": float(facts["l0"])})
