"""Harvests of networks that are no language models: an item is a context, and its places are the tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lab.activations import sharding
from sae_lab.activations.sharding import ORDER, Harvest, folder_of, tokens_of
from sae_lab.nets.inputs import Inputs
from sae_lab.nets.net import Net
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenBatch, TokenMask, as_sites


def prepared(
    net: Net, sites: Any, data: Any, tokens: int, path: str | Path | None, context: int, pack: bool,
    mask: TokenMask | None, roles: Any, coder: SparseCoder | None,
) -> "Harvest":  # fmt: skip
    """A call of ``harvest`` of a ``sl.Net``, with checked arguments."""
    if context != 128 or pack or roles:
        raise ValueError("context=, pack= and roles= are for text: leave them out for the data of a sl.Net")
    if tokens < 1:
        raise ValueError(f"harvest needs tokens >= 1, got tokens={tokens}")
    inputs = Inputs(data, net.accepts)
    wanted = as_sites([net.site(s) for s in ([sites] if isinstance(sites, Site | str) else sites)])
    if coder is not None and (wanted != [coder.site] or mask is not None):
        raise ValueError(
            f"a store of codes is made at its coder's site, {coder.site}, and by its mask: leave mask= out"
        )
    places = net.places(inputs.first, wanted)
    mask = (coder and coder.mask) or mask or net.mask()
    identity = {
        "model": net.id, "model_fingerprint": net.fingerprint(), "prefix_id": None, "sites": [s.key for s in wanted],
        "text": inputs.name, "text_fingerprint": inputs.fingerprint, "context": places, "pack": False, "order": ORDER,
        "mask": mask.to_dict(),
    }  # fmt: skip
    identity["grid"] = net.grid(inputs.first, wanted[0])
    if coder is not None:
        identity["coder"] = coder.fingerprint()
    return ItemHarvest(net, wanted, inputs, folder_of(path, identity), identity, mask, (), coder)


@dataclass
class ItemHarvest(Harvest):
    """A harvest of a network that is no language model: a context is an item, and its tokens are the item's places."""

    def shards(self) -> Iterator[list[list[Any]]]:
        """Passes of items of one shape, in groups of about SHARD_TOKENS places."""
        group: list[list[Any]] = []
        for some in self.lm.in_batches(self.text, self.sites):
            group.append(some)
            if sum(map(tokens_of, group)) >= sharding.SHARD_TOKENS:
                yield group
                group = []
        if group:
            yield group

    def padded(self, group: list[Any]) -> TokenBatch:
        return self.lm.joined([item.call for item in group], self.sites)
