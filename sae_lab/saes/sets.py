"""Transcoders of one model, one a layer, as one object."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab import cache, files
from sae_lab.arguments import as_annotated
from sae_lab.saes.base import SparseCoder
from sae_lab.saes.io import checking, ours, tracer
from sae_lab.types import Site

FORMAT, VERSION, INDEX = "sae_lab transcoder set", 1, "set.json"
READS = ("mlp_in", "resid_mid", "resid_pre")  # where the transcoder of a layer can read


@as_annotated
class TranscoderSet:
    """``coders = sl.TranscoderSet([transcoder_0, transcoder_1, ...])``: transcoders of one model, one a layer.

        coders[3]                     # the transcoder of layer 3; ValueError where that layer has none
        for coder in coders: ...      # in the order of layers; coders.layers are their numbers
        coders.save("folder")         # sl.TranscoderSet.load("folder"), or a set of circuit-tracer
        sl.circuits.trace(lm, coders, prompt)

    Layers may be missing. Each coder tells by ``reads`` and ``writes`` where it belongs: it reads mlp_in, resid_mid or
    resid_pre of a layer and writes mlp_out of the same layer; ``skip=True`` and an ``input_norm`` are allowed, widths
    may differ.

    Attributes: linear: whether what a feature writes is its value times a row of W_dec.

    Raises ValueError for no coder, a coder that is no transcoder, one at other sites, one that lacks the gain of the
    norm before its site, two of one layer, and coders of different models.
    """

    linear = True

    def __init__(self, coders: Iterable[SparseCoder]):
        self._coders: dict[int, SparseCoder] = {}
        for coder in coders:
            layer = _layer(coder)
            if layer in self._coders:
                raise ValueError(f"a set has one transcoder a layer, got two of layer {layer}: leave one of them out")
            self._coders[layer] = coder.eval()
        if not self._coders:
            raise ValueError("a set needs at least one transcoder, got none: pass sl.TranscoderSet([transcoder])")
        self._coders = dict(sorted(self._coders.items()))
        for fact in ("model_fingerprint", "model"):
            known = [(layer, coder.meta.get(fact) or "unknown") for layer, coder in self._coders.items()]
            told = [(layer, model) for layer, model in known if model != "unknown"]
            if other := [(layer, model) for layer, model in told if model != told[0][1]]:
                raise ValueError(
                    f"the transcoders of a set belong to one model: layer {told[0][0]} has {fact} {told[0][1]}, layer "
                    f"{other[0][0]} has {other[0][1]}: make a set of each model"
                )
            if len(told) == len(self):  # a model may have several names
                break

    @property
    def layers(self) -> list[int]:
        """The layers that have a transcoder."""
        return list(self._coders)

    @property
    def sites(self) -> list[Site]:
        """All sites that they read and write."""
        return [site for coder in self for site in (*coder.reads, *coder.writes)]

    def check(self, activations: Mapping[Site, Tensor]) -> dict[int, dict[str, Any]]:
        """``coders.check(lm.read(text, coders.sites))``: by layer, the FVU and L0 of each transcoder on these
        activations, "batch pos d" by site, as ``coder.meta["check"]`` then has them. A warning names what is absurd,
        such as an FVU above 1 of coders at the wrong site. Each row's first position is left out, and padding."""
        found = {}
        for layer, coder in self._coders.items():
            x, y = (activations[site][:, 1:].flatten(0, 1) for site in (coder.reads[0], coder.writes[0]))
            real = x.any(1) | y.any(1)
            device = coder.W_dec.device
            found[layer] = checking.check(coder, (x[real].to(device), y[real].to(device)))
        return found

    def __iter__(self) -> Iterator[SparseCoder]:
        return iter(self._coders.values())

    def __len__(self) -> int:
        return len(self._coders)

    def __contains__(self, layer: object) -> bool:
        return layer in self._coders

    def __getitem__(self, layer: int) -> SparseCoder:
        if layer not in self._coders:
            raise ValueError(f"this set has no transcoder of layer {layer}: it has layers {_listed(self.layers)}")
        return self._coders[layer]

    def sources(self, target: int) -> list[int]:
        """The layers whose features write to mlp_out of a layer."""
        return [target] if target in self else []

    def written(
        self, layer: int, target: int, features: Int[Tensor, " some"], values: Float[Tensor, " some"]
    ) -> Float[Tensor, "some d_out"]:
        """What features of a layer write to mlp_out of a layer at these values."""
        rows = self[layer].W_dec.detach()
        return values[:, None] * rows[features.to(rows.device)].to(values)

    def to(self, device: str | torch.device) -> "TranscoderSet":
        """``coders.to("cuda")``: move all weights to a device; returns the set."""
        for coder in self:
            coder.to(device)
        return self

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32, bits: int | None = None) -> Path:
        """``coders.save("folder")``: write each transcoder into a folder of its own inside, as ``sae.save`` does, and
        an index, last. dtype, bits: of the matrices, as there. Returns the folder."""
        folder = Path(path)
        names = {layer: f"layer_{layer}" for layer in self.layers}
        (folder / INDEX).unlink(missing_ok=True)  # until all are written the folder is no set
        for layer, name in names.items():
            self[layer].save(folder / name, dtype=dtype, bits=bits)
        with cache.atomic(folder / INDEX) as temporary:
            layers = {str(layer): name for layer, name in names.items()}
            files.write_json(temporary, {"format": FORMAT, "version": VERSION, "layers": layers}, indent=2)
        return folder

    @staticmethod
    def load(path: str | Path, id: str | None = None, model: str | None = None) -> "TranscoderSet":
        """``sl.TranscoderSet.load("smollm2-135m/transcoders")``: read the set of the bundled model that comes with the
        library; a folder that ``save`` wrote; or a set of circuit-tracer: a folder with a config.yaml, or a hub
        repository with one, such as ``load("mwhanna/qwen3-4b-transcoders")`` or
        ``load("mwhanna/gemma-scope-2-270m-pt", "transcoder_all/width_16k_l0_small")``.

        Each transcoder reads the place that the config names; one that was trained on a norm's output before the gain
        reads the stream and normalises it. ``coders.check`` measures whether they fit the model.

        Args: id: a folder inside. model: the hub's name of the model, where the config does not tell it. ValueError for
        anything else, and for a cross-layer transcoder.
        """
        folder = Path(path).expanduser() / (id or "")
        shipped = not folder.exists() and (ours.home(folder) / INDEX).is_file()
        if not shipped and not folder.exists() and ours.home(Path(*folder.parts[:1])).is_dir():
            here = ", ".join(sorted(at.parent.relative_to(ours.SHIPPED).as_posix() for at in ours.SHIPPED.rglob(INDEX)))
            raise ValueError(f"no set of transcoders named {folder} comes with the library: it has {here}")
        folder = ours.home(folder) if shipped else folder
        if not (folder / INDEX).is_file():
            return TranscoderSet(tracer.read_set(path, id, model))
        if model is not None:
            raise ValueError(f"{folder} was written by sae_lab, which records the model: leave out model=")
        try:
            layers = _checked(files.read_json(folder / INDEX))
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{folder / INDEX} is no set that this version can read: {err}") from err
        coders = []
        for layer, name in layers.items():
            coder = ours.read(folder / name, {})
            at = folder / name
            coder.path = at.relative_to(ours.SHIPPED).as_posix() if shipped else str(at.resolve())
            if _layer(coder) != layer:
                raise ValueError(f"{folder / name} holds a transcoder of layer {_layer(coder)}, {INDEX} says {layer}")
            coders.append(coder)
        return TranscoderSet(coders)

    def __repr__(self) -> str:
        widths = {coder.d_sae for coder in self}
        width = f"{min(widths)}" if len(widths) == 1 else f"{min(widths)} to {max(widths)}"
        kinds = "+".join(dict.fromkeys(type(coder).__name__ for coder in self))
        return f"TranscoderSet({kinds}, layers {_listed(self.layers)}, {width} features a layer)"


def _layer(coder: SparseCoder) -> int:
    """The layer of a transcoder. ValueError unless it belongs into a set."""
    reads, writes = coder.reads, coder.writes
    if not coder.transcodes or len(coder.in_shape) > 1:
        raise ValueError(f"a set takes transcoders, got a {type(coder).__name__} without d_out: use sl.Transcoder")
    if len(reads) != 1 or len(writes) != 1:
        raise ValueError(
            f"a transcoder of a set reads one site and writes one, this one reads {reads} and writes {writes}: set "
            "coder.reads = (sl.Site('mlp_in', 3),) and coder.writes = (sl.Site('mlp_out', 3),)"
        )
    if reads[0].kind not in READS or writes[0].kind != "mlp_out" or reads[0].layer != writes[0].layer:
        raise ValueError(
            f"a transcoder of a set reads {', '.join(READS)} of a layer and writes mlp_out of the same layer, this one "
            f"reads {reads[0]} and writes {writes[0]}: set coder.reads and coder.writes to its layer's sites"
        )
    if coder.meta.get("needs_gain"):
        raise ValueError(
            f"this transcoder was trained on {reads[0]} without the gain of the norm before it: pass model= when you "
            "load it, or call sae_lab.saes.io.peers.fold_gain(coder, gain, bias) first"
        )
    return int(writes[0].layer or 0)


def _checked(index: dict[str, Any]) -> dict[int, str]:
    if index["format"] != FORMAT or index["version"] != VERSION:
        raise ValueError(f"format {index['format']!r} version {index['version']}, this one reads {FORMAT!r} {VERSION}")
    layers = {int(layer): name for layer, name in index["layers"].items()}
    if wrong := [name for layer, name in layers.items() if name != f"layer_{layer}"]:  # no path leads out of the folder
        raise ValueError(f"its folders are named layer_0, layer_1, ..., got {str(wrong[0])[:40]!r}")
    return layers


def _listed(layers: list[int]) -> str:
    """Numbers as ranges: 0-3, 5."""
    parts: list[list[int]] = []
    for n in layers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
