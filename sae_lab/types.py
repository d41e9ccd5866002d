"""The types that every room shares: Site, TokenMask, TokenBatch, Batch, Codes, Output, Write.

Legend of axes, the same everywhere: ``batch`` prompts or rows, ``pos`` token positions, ``layer`` blocks,
``d_in``/``d_out`` widths a coder reads/writes, ``d_sae`` features, ``k`` active features, ``vocab`` token ids.
"""

import math
import operator
import re
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sae_lab.arguments import as_annotated
from sae_lab.results import counted, visible

LAYER_KINDS = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
KINDS = ("embed", *LAYER_KINDS)

# TransformerLens's names. Its `hook_mlp_in` is absent on purpose: there it is the residual stream before the
# norm, so reading it as the MLP's own input would be silently wrong.
_TL_NAMES = {
    "resid_pre": "hook_resid_pre", "attn_z": "attn.hook_z", "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid", "mlp_in": "ln2.hook_normalized", "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}  # fmt: skip
_TL_KINDS = {name: kind for kind, name in _TL_NAMES.items()}
_BLOCK_PATH = re.compile(
    r"^(?:(?:model|transformer|gpt_neox|model\.language_model|language_model\.model)\.)?"
    r"(?:layers|h|blocks)\.(\d+)(?:\.(self_attn|attn|attention|mlp))?$"
)


@as_annotated
@dataclass(frozen=True, init=False)
class Site:
    """A place in a language model where activations are read or written.

    ``Site("resid_post", layer=8)``, ``Site("attn_z", 8, head=3)``, TransformerLens's
    ``Site("blocks.8.hook_resid_post")``, a block's module path ``Site("layers.8")`` (the block's output, layers
    counted from 0; with ``.mlp`` or ``.self_attn`` what that part adds to the stream), or any other module path, which
    means that module's output. ``Site("module-conv1")``: a module of a ``sl.Net`` by its path.

    Kinds: ``embed``; ``resid_pre``, ``resid_mid``, ``resid_post`` (the residual stream before, inside and after
    block ``layer``); ``attn_z`` (heads' outputs before W_O, shape ``batch pos heads*d_head``, or one head's
    ``d_head``); ``attn_out`` and ``mlp_out`` (what the sub-layer adds to the stream); ``mlp_in`` (the MLP's input,
    after its norm).

    Raises ValueError for an unknown kind, a missing or negative layer, or a head anywhere but at ``attn_z``.
    Whether the model has that layer is checked by the ``LM``.
    """

    kind: str
    layer: int | None
    head: int | None
    path: str | None
    spelling: str | None = field(default=None, repr=False, compare=False)  # the name that was given instead of a kind

    def __init__(self, kind: str, layer: int | None = None, head: int | None = None):
        path, spelling = None, kind if kind not in KINDS else None
        if kind not in KINDS:
            kind, layer, head, path = _parse(kind, layer, head)
        if kind in LAYER_KINDS and layer is None:
            raise ValueError(f"Site({kind!r}) needs a layer: write Site({kind!r}, layer=8)")
        if kind == "embed" and layer is not None:
            raise ValueError("Site('embed') is before the first block and takes no layer")
        if layer is not None and layer < 0:
            raise ValueError(f"a site's layer counts from 0, got {layer}: the first block's output is layer=0")
        if head is not None and (kind != "attn_z" or head < 0):
            raise ValueError(f"head={head} needs kind 'attn_z' and counts from 0, got kind {kind!r}")
        for name, value in (("kind", kind), ("layer", layer), ("head", head), ("path", path), ("spelling", spelling)):
            object.__setattr__(self, name, value)

    @property
    def hook_name(self) -> str:
        """TransformerLens's spelling of this site (without the head), or the module path where it has none."""
        if self.kind == "module":
            return str(self.path)
        return "hook_embed" if self.kind == "embed" else f"blocks.{self.layer}.{_TL_NAMES[self.kind]}"

    @property
    def key(self) -> str:
        """A short name safe in files and tensors: ``resid_post-8``, ``attn_z-8-head3``."""
        if self.kind == "module":
            return _spelled(str(self.path))
        parts = [self.kind]
        parts += [str(self.layer)] if self.layer is not None else []
        parts += [f"head{self.head}"] if self.head is not None else []
        return "-".join(parts)

    @classmethod
    def of(cls, site: "Site | str") -> "Site":
        """The site itself, or the one its spelling (also its ``key``) names."""
        if isinstance(site, Site):
            return site
        match = re.fullmatch(r"(\w+)-(\d+)(?:-head(\d+))?", site)
        if match and match[1] in LAYER_KINDS:
            return cls(match[1], int(match[2]), int(match[3]) if match[3] else None)
        return cls(site)

    def __repr__(self) -> str:
        parts = [repr(_spelled(str(self.path)) if self.kind == "module" else self.kind)]
        parts += [f"layer={self.layer}"] if self.layer is not None else []
        parts += [f"head={self.head}"] if self.head is not None else []
        return f"Site({', '.join(parts)})"


MODULE = "module-"  # before a path that alone would be read as another site, or as none


def _spelled(path: str) -> str:
    """A module's path as ``Site.of`` reads it back."""
    try:
        plain = Site.of(path)
    except ValueError:
        return MODULE + path
    return path if (plain.kind, plain.path) == ("module", path) else MODULE + path


def _parse(name: str, layer: int | None, head: int | None):
    """(kind, layer, head, path) of a TransformerLens name or a module path."""
    listing = f"kinds: {', '.join(KINDS)}; or 'blocks.8.hook_resid_post', 'layers.8', or a module's path"
    if layer is not None or not name:
        raise ValueError(f"unknown site kind {name!r}; {listing}")
    if name == "hook_embed":
        return "embed", None, head, None
    if name.startswith(MODULE) and re.fullmatch(r"[\w.-]+(@[\w-]+)*", name):
        return "module", None, head, name.removeprefix(MODULE)
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        if match[2] == "hook_mlp_in":
            raise ValueError(
                f"{name!r} is TransformerLens's residual stream before the MLP's norm: write "
                f"Site('resid_mid', layer={match[1]}), or Site('mlp_in', layer={match[1]}) for the MLP's own input"
            )
        if match[2] in _TL_KINDS:
            return _TL_KINDS[match[2]], int(match[1]), head, None
        if "hook_" in match[2]:
            raise ValueError(f"unknown TransformerLens site {name!r}; known after 'blocks.N.': {', '.join(_TL_KINDS)}")
    if match := _BLOCK_PATH.match(name):
        kind = {None: "resid_post", "mlp": "mlp_out"}.get(match[2], "attn_out")
        return kind, int(match[1]), head, None
    if "." not in name or not re.fullmatch(r"[\w.-]+", name):  # it becomes a file's name, and is shown
        raise ValueError(f"unknown site {name!r}; {listing}")
    return "module", None, head, name


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of several prompts, padded on the right; position 0 is the first token, prefix included.

    ids: ``batch pos``. mask: ``batch pos``, True at real tokens. positions: ``batch pos``, absolute. roles: for chat
    prompts one list of role names per row ("template" for what the chat template adds), else None. rows: each row's
    number among the user's prompts, in a batch of some of them. step: the number of the pass in a generation; one per
    position if a pass reads the whole text.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    roles: list[list[str]] | None = None
    rows: Int[Tensor, " batch"] | None = None
    step: int | Int[Tensor, " pos"] = 0

    @property
    def row_numbers(self) -> Int[Tensor, " batch"]:
        """Each row's number among the user's prompts."""
        return torch.arange(len(self.ids)) if self.rows is None else self.rows

    def plain(self) -> SimpleNamespace:
        """The same as plain data, for functions that run where sae_lab is not installed."""
        names = ("ids", "mask", "positions", "row_numbers", "step")
        return SimpleNamespace(**{name: getattr(self, name) for name in names})

    def role_mask(self, *roles: str) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of these roles ("user", "assistant", ...). ValueError for prompts that are no chat."""
        if self.roles is None:
            raise ValueError("these prompts carry no roles: pass chat messages ([{'role': ..., 'content': ...}])")
        width = self.ids.shape[1]
        return torch.tensor([[r in roles for r in row] + [False] * (width - len(row)) for row in self.roles])


@as_annotated
@dataclass(frozen=True)
class TokenMask:
    """Which tokens count: one rule for harvest, training, evals, index and edits.

    A token is left out when its id is special, when it stands at position 0 (an attention sink in most models), or
    when its activation's norm at any known site exceeds ``max_norm[site.key]`` (4x the median norm of a store's
    first shard). A token left out at one site of a store is left out at all. In chats, ``roles`` names the roles whose
    tokens count ("template": tokens that the chat template adds); empty, all roles. Plain text has no roles, and edits
    act on tokens of every role.
    """

    special_ids: tuple[int, ...] = ()
    skip_first: bool = True
    max_norm: Mapping[str, float] = field(default_factory=dict)
    roles: tuple[str, ...] = ()

    def keep(
        self,
        ids: Int[Tensor, "*tokens"],
        positions: Int[Tensor, "*tokens"],
        acts: Mapping[Site, Float[Tensor, "*tokens d"]] | None = None,
    ) -> Bool[Tensor, "*tokens"]:
        """True at the tokens that count. Sites of ``acts`` without a known maximum norm do not filter."""
        kept = torch.ones_like(ids, dtype=torch.bool)
        if self.special_ids:
            kept &= ~torch.isin(ids, torch.tensor(self.special_ids, device=ids.device))
        if self.skip_first:
            kept &= positions != 0
        for site, x in (acts or {}).items():
            limit = self.max_norm.get(site.key)
            if limit is not None:
                kept &= (x.float().norm(dim=-1) <= limit).to(kept.device)
        return kept

    def of(
        self, batch: TokenBatch, acts: Mapping[Site, Float[Tensor, "batch pos d"]] | None = None
    ) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of a batch that count, by ``keep`` and by role; False at padding."""
        kept = self.keep(batch.ids, batch.positions, acts) & batch.mask
        return kept & batch.role_mask(*self.roles) if self.roles and batch.roles is not None else kept

    def to_dict(self) -> dict[str, Any]:
        same = {"special_ids": list(self.special_ids), "skip_first": self.skip_first, "max_norm": dict(self.max_norm)}
        return same | ({"roles": list(self.roles)} if self.roles else {})

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "TokenMask":
        """What ``to_dict`` gave. ValueError for anything else, as a file that others wrote may hold."""
        ids, first, norms = (d.get(key) for key in ("special_ids", "skip_first", "max_norm"))
        if not isinstance(ids, list | tuple) or not all(type(i) is int and 0 <= i < 1 << 63 for i in ids):
            raise ValueError(f"a mask's special_ids must be token ids from 0 on, got {str(ids)[:60]}")
        if not isinstance(first, bool):
            raise ValueError(f"a mask's skip_first must be true or false, got {str(first)[:60]!r}")
        if not isinstance(norms, Mapping) or not all(
            isinstance(site, str) and type(limit) in (int, float) and limit >= 0 for site, limit in norms.items()
        ):
            raise ValueError(f"a mask's max_norm must give sites numbers from 0 on, got {str(norms)[:60]}")
        roles = d.get("roles", ())
        if not isinstance(roles, list | tuple) or not all(isinstance(role, str) and role for role in roles):
            raise ValueError(f"a mask's roles must be a list of names, got {str(roles)[:60]}")
        return cls(tuple(ids), first, dict(norms), tuple(roles))

    def __str__(self) -> str:
        rules = [counted(len(self.special_ids), "special id")] if self.special_ids else []
        rules += ["position 0"] if self.skip_first else []
        rules += [f"norm > {limit:.4g} at {visible(site)}" for site, limit in self.max_norm.items()]
        rules += [f"chat tokens of other roles than {', '.join(map(visible, self.roles))}"] if self.roles else []
        return "left out: " + (", ".join(rules) or "nothing")


@as_annotated
@dataclass
class Batch:
    """Rows of a training step. ``target is x`` for an SAE, another tensor for a transcoder; those of a crosscoder have
    an axis of layers after the batch. tokens, positions: of each row, for activations of text."""

    x: Shaped[Tensor, "batch *d_in"]  # floats, whose values training checks
    target: Shaped[Tensor, "batch *d_out"]
    tokens: Int[Tensor, " batch"] | None = None
    positions: Int[Tensor, " batch"] | None = None


def rows_of(offsets: Int[Tensor, " rows_plus_one"], places: int | None = None) -> Int[Tensor, " active"]:
    """The row of every place between offsets[0] and offsets[-1]. places: their number, where it is known: an
    accelerator is then not waited for."""
    counts = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=places)


class Codes(NamedTuple):
    """Sparse codes by row (compressed rows): row b is active on ``features[offsets[b]:offsets[b+1]]``.

    by_feature: the same places in the order of features, which the kernels of ``saes.kernels`` make and share.
    """

    values: Float[Tensor, " active"]
    features: Int[Tensor, " active"]
    offsets: Int[Tensor, " rows_plus_one"]
    d_sae: int
    by_feature: Any = None

    @property
    def rows(self) -> Int[Tensor, " active"]:
        """The row of every value."""
        return rows_of(self.offsets, len(self.values))

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The same codes as a dense matrix (differentiable in ``values``)."""
        zeros = self.values.new_zeros(len(self.offsets) - 1, self.d_sae)
        return zeros.index_put((self.rows, self.features), self.values)


class Output(NamedTuple):
    """What ``sae(x)`` returns. x_hat: ``batch d_out``; codes: sparse or dense, see ``f``; pre: ``batch d_sae``."""

    x_hat: Tensor
    codes: Codes | Tensor
    pre: Tensor

    @property
    def f(self) -> Float[Tensor, "*batch d_sae"]:
        """The codes as a dense ``batch d_sae`` tensor."""
        dense = self.codes.dense() if isinstance(self.codes, Codes) else self.codes
        shape = self.x_hat.shape
        lead = next(i for i in range(len(shape) - 1, -1, -1) if math.prod(shape[:i]) == len(dense))  # layers are none
        return dense.reshape(*shape[:lead], dense.shape[-1])


def check_feature(feature: Any, d_sae: int) -> int:
    """A feature's number as an int (numpy's and torch's count). ValueError when the coder has no such feature."""
    try:
        number = -1 if isinstance(feature, bool) else operator.index(feature)
    except TypeError:
        number = -1
    if not 0 <= number < d_sae:
        raise ValueError(f"feature must be an int from 0 to {d_sae - 1}, got {feature!r}")
    return number


class Write(NamedTuple):
    """A replacement of activations while the model runs: ``fn(x, tokens, *read) -> x'`` at ``site``.

    x is ``batch pos d``; tokens (``TokenBatch.plain()``) tells ids, mask, positions, row_numbers and step. fn must be
    pure; on a server, only a function whose source needs torch alone runs, see ``saes.portable``.
    reads: earlier sites whose activations fn gets too. before: sites, this one or earlier ones, whose activations it
    gets after those, as they were before the first write there.
    """

    site: Site
    fn: Callable[..., Tensor]
    reads: tuple[Site, ...] = ()
    before: tuple[Site, ...] = ()


class Editing(ABC):  # noqa: B024 (any class with a method ``writes``)
    """An edit, of which ``edits=`` takes one or a list: its ``writes(lm, batch, new)`` gives the model's writes."""

    IN_WORDS = "edits (sl.Steer, sl.Clamp...)"

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return callable(getattr(other, "writes", None))  # a coder's ``writes`` are sites, no method


if TYPE_CHECKING:
    Edits = Iterable[Any]  # type checkers see no ancestors, so to them it is any list
else:
    Edits = Iterable[Editing]


def as_sites(sites: "Site | str | Iterable[Site | str]") -> list[Site]:
    """One site or several, in any spelling, as a list without repeats. ValueError when there is none."""
    many = [sites] if isinstance(sites, Site | str) else list(sites)
    unique = list(dict.fromkeys(Site.of(s) for s in many))
    if not unique:
        raise ValueError("no site given: pass at least one, e.g. sl.Site('resid_post', layer=8)")
    return unique
