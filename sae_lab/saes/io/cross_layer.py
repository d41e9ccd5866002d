"""Published cross-layer transcoders (CLTs): circuit-tracer's files, Gemma Scope 2's and EleutherAI's (sparsify).

Encoders are read whole, rows of decoders from their files when they are asked for: all decoders of a CLT would take
(layers + 1)/2 times what those of as many transcoders take.

- circuit-tracer: ``W_enc_3.safetensors`` (W_enc_3 "width d", b_enc_3, b_dec_3, and threshold_3 for a JumpReLU) and
  ``W_dec_3.safetensors`` (W_dec_3 "width layers-3 d"), beside ``config.yaml``.
- Gemma Scope 2: ``params_layer_3.safetensors`` (w_enc "d width", w_dec "width layers d", b_enc, b_dec, threshold,
  affine_skip_connection "d d"), by themselves or named in a ``config.yaml`` of circuit-tracer.
- sparsify with ``coalesce_topk`` "concat": ``layers.3.mlp/cfg.json`` and ``sae.safetensors``. Each layer has one
  decoder, which the features of all earlier layers share; what a feature gives to layer t is (f + post_encs[t])·
  scale[t] where f is on. x and y are divided by their mean norms, which is undone here.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lab import files
from sae_lab.saes.io import tracer
from sae_lab.saes.io.gemma_scope import RENAMED
from sae_lab.saes.io.layouts import must_hold, read_file
from sae_lab.saes.io.places import Place, place
from sae_lab.saes.io.tracer import CONFIG, Source

_AGAIN = "download it again"
_PARAMS = "params_layer_{}.safetensors"
Of = Callable[[int, int, Tensor], Tensor]  # (layer, layer written to, features of the layer) -> something for each


class Layers(NamedTuple):
    """A CLT. tensors: W_enc "width·layers d_in", b_enc, b_dec " layers·d_out", threshold of all features (None with k,
    that of a layer), W_skip "layers d_in d_out". rows, offsets: of W_dec, and what is added to a code there."""

    format: str
    where: str
    model: str | None
    reads: list[Place | None]
    writes: list[Place | None]
    tensors: dict[str, Tensor]
    k: int | None
    rows: Of
    offsets: Of | None = None


def read(path: str | Path, id: str | None, model: str | None) -> Layers:
    """The CLT in a folder or a repository. ValueError for a format that is unknown or not supported."""
    where = tracer.source(path, id)
    if CONFIG in where.names:
        config = tracer.config_of(where, "cross_layer_transcoder")
        return _of_config(where, config, model or config.get("model_name"))
    if _PARAMS.format(0) in where.names:
        count = _count(where, _PARAMS)
        size = re.search(r"gemma-scope-2-(\w+)-(pt|it)", where.where)
        known = f"google/gemma-3-{size[1]}-{size[2]}".replace("270m-pt", "270m") if size else None
        hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
        return _gemma(where, [where.get(_PARAMS.format(n)) for n in range(count)], hooks, model or known)
    if folders := [n for n in where.names if re.fullmatch(r"layers\.\d+\.mlp/cfg\.json", n)]:
        return _sparsify(where, len(folders), model)
    raise ValueError(
        f"no cross-layer transcoder in {where.where}: supported are circuit-tracer's ({CONFIG}, W_enc_0.safetensors, "
        "...), Gemma Scope 2's (params_layer_0.safetensors, ...) and sparsify's (layers.0.mlp, ...)"
    )


def _of_config(where: Source, config: dict[str, Any], model: str | None) -> Layers:
    if "transcoders" in config:
        listed = {layer: file for layer, file, _ in tracer.weights(config, where)}
        if sorted(listed) != list(range(len(listed))):
            raise ValueError(f"{where.where}/{CONFIG} must name weights of layers 0, 1, 2, ..., got {sorted(listed)}")
        return _gemma(where, [listed[n] for n in range(len(listed))], config, model)
    count = _count(where, "W_enc_{}.safetensors")
    read, decoders = [], []
    for n in range(count):
        file = where.get(f"W_enc_{n}.safetensors")
        names = {f"{name}_{n}": name for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        t = _tensors(file, names, may=("threshold",))
        read.append(t | {"W_enc": t["W_enc"].T})
        width, d_out = len(t["b_enc"]), len(t["b_dec"])
        decoders.append(_Rows(where.get(f"W_dec_{n}.safetensors"), f"W_dec_{n}", (width, count - n, d_out)))
    return _layers("circuit-tracer CLT", where, config, model, read, lambda n, t, f: decoders[n](f, t - n))


def _gemma(where: Source, found: list[Path], config: dict[str, Any], model: str | None) -> Layers:
    read, decoders = [], []
    theirs = ("w_enc", "b_enc", "b_dec", "threshold", "affine_skip_connection")
    names = {name: RENAMED.get(name, name) for name in theirs}
    for file in found:
        read.append(_tensors(file, names, may=("W_skip",), surplus=("w_dec",)))
        shape = (len(read[-1]["b_enc"]), len(found), len(read[-1]["b_dec"]))
        decoders.append(_Rows(file, "w_dec", shape))
    return _layers("Gemma Scope 2 CLT", where, config, model, read, lambda n, t, f: decoders[n](f, t))


def _sparsify(where: Source, count: int, model: str | None) -> Layers:
    run = read_file(where.get("config.json")) if "config.json" in where.names else {}
    read, decoders, gains, offsets, scales, ks = [], [], [], [], [], set()
    for n in range(count):
        cfg = read_file(where.get(f"layers.{n}.mlp/cfg.json"))
        _check_sparsify(cfg, where, n)
        targets, ends = range(cfg["n_targets"]), ("in_norm", "out_norm") if cfg.get("normalize_io") else ()
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "b_dec": "b_dec", "W_skip": "W_skip"}
        named = [f"{kind}.{i}" for kind in ("post_encs", "post_enc_scales") for i in targets]
        file = where.get(f"layers.{n}.mlp/sae.safetensors")
        may = () if cfg.get("skip_connection") else ("W_skip",)
        t = _tensors(file, names | {name: name for name in (*ends, *named)}, may=(*may, *named), surplus=("W_dec",))
        (width, d_in), d_out = t["W_enc"].shape, len(t["b_dec"])
        into, out = (float(t.pop(end)) / d**0.5 if ends else 1.0 for end, d in (("in_norm", d_in), ("out_norm", d_out)))
        none = torch.zeros(width)
        offsets.append([t.pop(f"post_encs.{i}", none) for i in targets])
        scales.append([t.pop(f"post_enc_scales.{i}", none + 1) for i in targets])
        if cfg.get("skip_connection"):
            t["W_skip"] = t["W_skip"].T * (out / into)
        read.append(t | {"W_enc": t["W_enc"].T / into, "b_dec": t["b_dec"] * out})
        decoders.append(_Rows(file, "W_dec", (width, d_out)))
        gains.append(out)
        ks.add(cfg["k"])
    if len(ks) > 1:
        raise ValueError(f"{where.where}: all layers must have the same k, got {sorted(ks)}")

    def rows(n: int, t: int, features: Tensor) -> Tensor:
        if t - n >= len(scales[n]):
            return torch.zeros(len(features), read[t]["b_dec"].shape[0])
        return decoders[t](features) * (scales[n][t - n][features] * gains[t])[:, None]

    def offset(n: int, t: int, features: Tensor) -> Tensor:
        return offsets[n][t - n][features] if t - n < len(offsets[n]) else torch.zeros(len(features))

    shifted = any(bool(o.any()) for per_layer in offsets for o in per_layer)
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    found = _layers("sparsify CLT", where, hooks, model or run.get("model"), read, rows, ks.pop())
    return found._replace(offsets=offset if shifted else None)


def _check_sparsify(cfg: dict[str, Any], where: Source, layer: int) -> None:
    wanted = {"activation": "topk", "transcode": True, "coalesce_topk": "concat", "topk_coalesced": False,
              "secondary_target_tied": False}  # fmt: skip
    usual = {"activation": "topk", "topk_coalesced": False, "secondary_target_tied": False}
    for name, value in wanted.items():
        if (said := cfg.get(name, usual.get(name))) != value:
            raise ValueError(f"{where.where}: layer {layer} has {name} {said!r}; supported is {value!r}")
    for name in ("n_targets", "k"):
        if isinstance(cfg.get(name), bool) or not isinstance(cfg.get(name), int) or cfg[name] < 1:
            raise ValueError(f"{where.where}: layer {layer} must have {name} of at least 1, got {cfg.get(name)!r:.40}")


def _layers(
    format: str, where: Source, config: dict[str, Any], model: str | None, read: list[dict[str, Tensor]], rows: Of,
    k: int | None = None,
) -> Layers:  # fmt: skip
    """The layers side by side. read: W_enc "d_in width" and the others of each."""
    shapes = {tuple((name, tuple(t.shape)) for name, t in sorted(one.items())) for one in read}
    if len(shapes) > 1:
        raise ValueError(f"{where.where}: all layers must hold the same tensors in the same shapes, and they do not")
    if len(read) < 2:
        raise ValueError(f"{where.where} has one layer: a cross-layer transcoder has several")
    d_in, width = read[0]["W_enc"].shape
    if len(read[0]["b_enc"]) != width:
        raise ValueError(f"{where.where}: b_enc has {len(read[0]['b_enc'])} entries, W_enc {width} features")
    W_enc = torch.empty(len(read) * width, d_in)
    for n, one in enumerate(read):
        W_enc[n * width : (n + 1) * width] = one.pop("W_enc").T
    joined = {name: torch.stack([one[name] for one in read]) for name in read[0]}
    tensors = {"W_enc": W_enc, **{name: t if name == "W_skip" else t.flatten() for name, t in joined.items()}}
    if wrong := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{where.where}: {wrong[0]} holds NaN or Inf; its training failed or a file is damaged")
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        raise ValueError(f"{where.where}: a threshold below 0 lets codes be negative, which coders here cannot have")
    if k is None:
        tensors.setdefault("threshold", torch.zeros(len(W_enc)))  # ReLU
    ends = [tracer.hooks(config, n) for n in range(len(read))]
    reads, writes = ([place(end[key], model) for end in ends] for key in ("reads", "writes"))
    return Layers(format, where.where, model, reads, writes, tensors, k, rows)


def _count(where: Source, pattern: str) -> int:
    """How many files of this pattern there are. ValueError unless they are numbered from 0 without a gap."""
    count = sum(1 for name in where.names if re.fullmatch(re.escape(pattern).replace(r"\{\}", r"\d+"), name))
    if missing := [n for n in range(count) if pattern.format(n) not in where.names]:
        raise ValueError(f"{where.where} has {count} files {pattern.format('…')}, and none of layer {missing[0]}")
    if not count:
        raise ValueError(f"{where.where} has no {pattern.format(0)}")
    return count


def _tensors(
    file: Path, names: dict[str, str], may: tuple[str, ...] = (), surplus: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Some tensors of a file, as floats, by our names. may: those of ours that may be missing. surplus: left alone."""
    there = files.read_header(file)[0] if file.is_file() else {}
    needed = [name for name, ours in names.items() if ours not in may]
    must_hold(there, needed, file, may=[*names, *surplus])
    return {ours: _Rows(file, name)(slice(None)) for name, ours in names.items() if name in there}


class _Rows:
    """``rows(numbers)``, ``rows(numbers, at)``: some rows of a tensor in a safetensors file, as floats."""

    def __init__(self, file: Path, name: str, shape: tuple[int, ...] | None = None):
        try:
            info = files.read_header(file)[0].get(name)
        except (FileNotFoundError, ValueError) as err:
            raise ValueError(f"{file} is no whole safetensors file ({err}): {_AGAIN}") from err
        if info is None or (shape is not None and tuple(info["shape"]) != shape):
            raise ValueError(f"{file} must hold {name} of shape {shape}, it has {info and tuple(info['shape'])}")
        if info["dtype"] not in ("F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} holds {info['dtype']}, not floats")
        self.file, self.name, self.bits = file, name, info["dtype"] == "BF16"
        self.table = files.map_tensors(file, _AGAIN)[name]

    def __call__(self, rows: Any, at: int | None = None) -> Tensor:
        rows = rows.numpy() if isinstance(rows, Tensor) else rows
        found = torch.from_numpy(np.array(self.table[rows if at is None else (rows, at)]))
        found = (found.view(torch.bfloat16) if self.bits else found).float()
        if not bool(found.isfinite().all()):
            raise ValueError(f"{self.file}: {self.name} holds NaN or Inf; its training failed or the file is damaged")
        return found
