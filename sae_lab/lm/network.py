"""Network: what language models and other networks share: sites that are read and written in one pass, and edits."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sae_lab.arguments import as_annotated
from sae_lab.lm.passes import Step
from sae_lab.types import Site, TokenBatch, TokenMask, Write


class Network:
    """Base of ``LM`` and ``Net``: a module, nnsight's envoy of it, and a map of its sites.

    ``_sites.place(site)`` says how a site is read and written, ``_sites.when(site)`` in which order the module computes
    sites, ``_sites.width(site)`` how wide they are.
    """

    IN_WORDS = "an LM or a Net"

    _nn: Any  # nnsight's envoy
    _module: Any
    _sites: Any
    _server: Any = None
    _lock: threading.RLock
    _batch: Callable[..., Any]  # (inputs, site) -> a TokenBatch, whose tokens are the places of the site
    _passes: Callable[..., Iterator[TokenBatch]]  # (text or data, site) -> its batches
    _reading: Any  # the token ids of each text of the vocabulary
    id: str
    run: Callable[..., tuple[dict[Site, Any], Any]]
    mask: Callable[[], TokenMask]

    @property
    def device(self) -> torch.device:
        """The device of inputs and activations."""
        if self._server:
            return torch.device("cpu")
        return next((t.device for t in (*self._module.parameters(), *self._module.buffers())), torch.device("cpu"))

    @property
    def remote(self) -> bool:
        """Whether it runs on a server."""
        return self._server is not None

    @property
    def vocabulary(self) -> list[str]:
        """The text of every token id."""
        raise ValueError("positions are named by text in a language model alone: name a network's places by number")

    @as_annotated
    def width(self, site: Site | str) -> int:
        """The width d of the activations at a site."""
        return self._sites.width(Site.of(site))

    def fingerprint(self) -> str:
        """A hash of the weights (bit sums of all parameters, and samples of each); for a model on a server, of its name
        and revision."""
        if self._server:
            return hashlib.sha256(self._nn.to_model_key().encode()).hexdigest()[:16]
        digest = hashlib.sha256()
        for name, p in _weights(self._module.state_dict()):
            flat = p.detach().contiguous().reshape(-1).view(torch.uint8)
            flat = flat.clone() if flat.storage_offset() % 4 else flat  # int32 needs its alignment
            whole, rest = flat[: len(flat) // 4 * 4].view(torch.int32), flat[len(flat) // 4 * 4 :]
            sample = torch.cat([flat[:: max(1, len(flat) // 4096)], rest]).cpu().numpy().tobytes()
            # numpy adds 32-bit numbers into 64 bits in half of torch's time.
            total = whole.numpy().sum(dtype=np.int64) if whole.is_cpu else whole.sum(dtype=torch.int64).item()
            digest.update(f"{name} {tuple(p.shape)} {p.dtype} {total}".encode() + sample)
        return digest.hexdigest()[:16]

    def _in_order(self, reads: Iterable[Site], writes: Iterable[Write], after: Any) -> list[tuple[Site, Step]]:
        """The steps of a pass with their sites, see ``passes.through``, in the order in which the model computes the
        sites. At one place (one head's place is that of all heads) the reads that an edit needs from before all writes
        come first, then the writes in the order given, then the other reads."""
        reads, writes = list(dict.fromkeys(reads)), list(writes)
        place, when = self._sites.place, self._sites.when
        for w in writes:
            if late := [s for s in w.reads if when(s) >= when(w.site)]:
                raise ValueError(
                    f"an edit that reads {late[0]} cannot change {w.site}, which the model computes before: set the "
                    "coder's reads and writes to the sites it was trained on"
                )
        early = list(dict.fromkeys(s for w in writes for s in w.before))
        needed = [s for w in writes for s in w.reads]
        needed += [Site.of(less) for s in [*reads, *early, *(w.site for w in writes)] if (less := place(s).less)]
        steps = [(when(s), 0, s, Step(f"before {s.key}", place(s))) for s in early]
        for w in writes:
            names = (*(s.key for s in w.reads), *(f"before {s.key}" for s in w.before))
            steps.append((when(w.site), 1, w.site, Step(w.site.key, place(w.site), change=w.fn, needs=names)))
        for s in reads:
            keep: Any = after[s] if isinstance(after, Mapping) and s in after else after
            steps.append((when(s), 2, s, Step(s.key, place(s), keep)))
        steps += [(when(s), 2, s, Step(s.key, place(s))) for s in dict.fromkeys(needed) if s not in reads]
        return [(site, step) for _, _, site, step in sorted(steps, key=lambda s: s[:2])]

    def _writes(self, edits: Iterable[Any], batch: TokenBatch, new: int = 0) -> list[Write]:
        """The writes of a list of edits. Edits that act together share theirs (``Edit.together``)."""
        edits = listed_edits(edits)
        together = next((edit.together for edit in edits if hasattr(edit, "together")), None)
        with self._server.aside() if self._server else nullcontext():  # an edit may read the model itself
            if together is not None:
                return together(edits, self, batch, new)
            return [w for edit in edits for w in edit.writes(self, batch, new)]


def listed_edits(edits: Any) -> list[Any]:
    """One edit or several as a list. ValueError for an object that is no edit."""
    edits = list(edits) if isinstance(edits, Iterable) else [edits]
    if wrong := [edit for edit in edits if isinstance(edit, type) or not hasattr(edit, "writes")]:
        raise ValueError(f"edits is a list of edits, such as edits=[sl.Steer(sae, 7)], got {wrong[0]!r} in it")
    return edits


def _weights(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a state dict; quantised modules keep theirs in tuples, as integers, and tensors made of
    others (torchao's) in themselves."""
    for name, value in values.items():
        if is_traceable_wrapper_subclass(value):
            yield from _weights({f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]})
        elif isinstance(value, Tensor):
            yield name, value.int_repr() if value.is_quantized else value
        elif isinstance(value, list | tuple):
            yield from _weights({f"{name}.{i}": v for i, v in enumerate(value)})
