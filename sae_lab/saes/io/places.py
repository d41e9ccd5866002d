"""Where a coder of another library reads: its names for places in a model, as sites.

What these names mean, and where they differ from ours:

- TransformerLens's ``hook_mlp_in`` is the residual stream before the MLP's norm.
- Its ``ln2.hook_normalized`` is that stream after the norm's division, without the norm's gain and bias. Our ``mlp_in``
  has them. A transcoder from there reads the stream and normalises it, which needs no weights of the model; an
  autoencoder reads ``mlp_in`` and needs ``fold_gain`` first.
- With ``center_writing_weights`` (LayerNorm models only) what is written to the residual stream has mean 0. The coder
  gives on raw x the codes it gave on x − mean(x); x_hat stays centred, as ``sae.meta["centred"]`` says. Splicing it in
  gives the same logits as if the mean were added, since the norms of these models take the mean off the stream.
- A module's path means its output. In models that norm a sub-layer's output before they add it (Gemma 2 and 3,
  OLMo 2), ``layers.8.mlp`` is before that norm, and so is not ``mlp_out``.
"""

import re
from typing import Literal, NamedTuple

from sae_lab.types import Site

_RMS = re.compile(r"gemma|llama|mistral|mixtral|qwen|olmo-?[23]|phi-?[34]|deepseek|gpt-oss|smollm|apertus", re.I)
_LAYER_NORM = re.compile(
    r"gpt-?2|gpt-?neo|gpt-?j|pythia|opt-|bloom|gelu|solu|attn-only|tinystories|phi-?[12]|falcon|stablelm|codegen", re.I
)
_PARALLEL = re.compile(r"pythia|gpt-?neox|gpt-?j|falcon|phi-?[12]\b|codegen", re.I)
_POST_NORM = re.compile(r"gemma-?[23]|olmo-?[23]", re.I)
_HUB_IDS = (
    (r"gpt2-small|gpt2", "gpt2"),
    (r"(gemma-.*)", r"google/\1"),
    (r"(pythia-.*)", r"EleutherAI/\1"),
    (r"mistral-7b", "mistralai/Mistral-7B-v0.1"),
    (r"(qwen[23].*)", r"Qwen/\1"),
)


class Place(NamedTuple):
    """A site, and how what the coder knew as x follows from the activation there.

    norm: "rms" or "layer": x is the activation after that norm's division. no_gain: x lacks the gain (and bias) of the
    norm before the site. centred: x had mean 0 over d_in. name: the other library's name.
    """

    site: Site | None
    name: str
    norm: Literal["rms", "layer"] | None = None
    no_gain: bool = False
    centred: bool = False


def norm_of(model: str | None) -> Literal["rms", "layer"] | None:
    """The kind of norm a model of this name has; None where the name tells nothing."""
    if not model:
        return None
    return "rms" if _RMS.search(model) else "layer" if _LAYER_NORM.search(model) else None


def hub_id(model: str | None) -> str | None:
    """The hub's id for a model that TransformerLens knows by a short name; any other name stays."""
    if not model or "/" in model:
        return model
    for pattern, known in _HUB_IDS:
        if match := re.fullmatch(pattern, model, re.I):
            return match.expand(known)
    return model


def place(name: str | None, model: str | None, *, head: int | None = None, centred: bool = False) -> Place | None:
    """The place that a hook name or a module's path means. None without a name."""
    if not name:
        return None
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        found = _lens(name, int(match[1]), match[2], model, head)
    elif name == "hook_embed":
        found = Place(Site("embed"), name)
    else:
        found = Place(_module(name, model), name)
    return found._replace(centred=centred and can_be_centred(found, model))


def can_be_centred(spot: Place, model: str | None) -> bool:
    """Whether TransformerLens's ``center_writing_weights`` changes what is there. It centres only models with
    LayerNorm; an unknown model is taken at its config's word."""
    writes_stream = spot.site is not None and spot.site.kind not in ("attn_z", "mlp_in", "module")
    return writes_stream and not spot.norm and norm_of(model) != "rms"


def told(spot: Site | str | Place, model: str | None, centred: bool) -> Place:
    """The place that a caller names: a site of ours, or another library's name. ValueError for no place."""
    if isinstance(spot, Place):
        found = spot
    elif isinstance(spot, str) and not re.fullmatch(r"\w+-\d+(-head\d+)?", spot):  # that is a site's key
        found = place(spot, model)
    else:
        found = Place(Site.of(spot), repr(spot))
    if found is None or found.site is None:
        raise ValueError(f"{spot!r} names no place: write sl.Site('resid_post', 8), or 'blocks.8.hook_resid_post'")
    return found._replace(centred=centred and can_be_centred(found, model))


def _lens(name: str, layer: int, hook: str, model: str | None, head: int | None) -> Place:
    """TransformerLens's names, also those of its bridge."""
    stream = "resid_pre" if _PARALLEL.search(model or "") else "resid_mid"  # what the MLP's norm reads
    if hook == "ln2.hook_normalized":
        norm = norm_of(model)
        return Place(Site(stream, layer) if norm else Site("mlp_in", layer), name, norm, no_gain=norm is None)
    kinds = {"hook_mlp_in": stream, "mlp.hook_in": "mlp_in", "hook_in": "resid_pre", "hook_out": "resid_post"}
    if hook == "mlp.hook_out":  # the module's output: before a post-norm, where there is one
        return Place(_module(f"layers.{layer}.mlp", model), name)
    if hook in kinds:
        return Place(Site(kinds[hook], layer), name)
    try:
        return Place(Site(Site(name).kind, layer, head if hook == "attn.hook_z" else None), name)
    except ValueError:
        return Place(None, name)


def _module(path: str, model: str | None) -> Site | None:
    """A module's path, with or without its model's prefix and a trailing ``.output`` or ``.input``."""
    bare = path.removesuffix(".output")
    if re.fullmatch(r"(?:.*\.)?(?:embed_tokens|wte|embed_in)", bare):
        return Site("embed")
    match = re.fullmatch(r"(.*\.)?((?:layers|h)\.(\d+))(?:\.(.+))?", bare)
    if match is None:
        return None
    prefix, block, layer, part = match[1], match[2], int(match[3]), match[4] or ""
    post = bool(_POST_NORM.search(model or ""))
    kinds = {
        "": "resid_post", "input": "resid_pre", "mlp.input": "mlp_in", "ln_2": "mlp_in",
        "pre_feedforward_layernorm": "mlp_in", "post_feedforward_layernorm": "mlp_out",
        "post_attention_layernorm": "attn_out" if post else "mlp_in",
    }  # fmt: skip
    if not post:
        kinds |= {"mlp": "mlp_out"} | dict.fromkeys(("self_attn", "attn", "attention"), "attn_out")
    if part in kinds:
        return Site(kinds[part], layer)
    if re.fullmatch(r"(?:self_attn|attn|attention)\.(?:o_proj|c_proj|dense|out_proj)\.input", part):
        return Site("attn_z", layer)
    if part.endswith("input"):
        return None
    # Before the post-norm there is no site of ours, but the last matrix has the same output.
    last = {"mlp": "mlp.down_proj", "self_attn": "self_attn.o_proj"}.get(part, part)
    neox = re.search(r"pythia|neox", model or "", re.I)
    home = "transformer." if block.startswith("h.") else "gpt_neox." if neox else "model."
    return Site(f"{prefix or home}{block}.{last}")


def lens_name(site: Site) -> str:
    """TransformerLens's name for a site of ours. Its ``ln2.hook_normalized`` lacks the gain that our mlp_in has."""
    return f"blocks.{site.layer}.mlp.hook_in" if site.kind == "mlp_in" else site.hook_name
