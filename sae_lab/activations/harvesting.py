"""harvest(): one pass of a network over text or other data writes a store; an interrupted one is resumed."""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from sae_lab import costs, processes
from sae_lab.activations import items, sharding
from sae_lab.activations.sharding import ORDER, Harvest, folder_of, tokens_of
from sae_lab.activations.store import Store
from sae_lab.arguments import as_annotated
from sae_lab.costs import Cost, timed
from sae_lab.lm.model import LM
from sae_lab.lm.text import WINDOW_DOCUMENTS, Text, as_text
from sae_lab.lm.tokens import pad
from sae_lab.nets.net import Net
from sae_lab.results import counted
from sae_lab.saes.base import SparseCoder
from sae_lab.types import Site, TokenMask, as_sites

log = logging.getLogger(__name__)


@as_annotated
def harvest(
    lm: LM | Net,
    sites: Site | str | Iterable[Site | str],
    text: Any,
    tokens: int = 100_000,
    *,
    path: str | Path | None = None,
    context: int = 128,
    pack: bool = False,
    mask: TokenMask | None = None,
    roles: str | Sequence[str] = (),
    coder: SparseCoder | None = None,
) -> Store:
    """``store = sl.harvest(lm, site, text)``: read ``tokens`` kept activations at the sites into a store on disk, or
    open the store if it exists.

    Of a ``sl.Net``, text is the data that it reads (a tensor, a list, a data set, a ``DataLoader``), and every place of
    an item is a token: ``sl.harvest(net, "blocks.3", images)``, with ``mask=net.mask(keep=[0], places=197)`` for some.

    One pass serves all sites and stops at the deepest. After an interruption the same call goes on from the last whole
    shard; a call for more tokens adds shards; a damaged shard is made again.

    Args:
        path: a folder; None is one in the cache, named by model, sites, text and settings.
        context: tokens the model sees at once, prefix included.
        pack: let contexts span documents.
        mask: which tokens are kept; None: ``lm.mask()`` with a largest norm of 4 medians of the first shard.
        roles: of chats, keep only tokens of these roles ("assistant", "user"...; "template": what the chat template
            adds). They become part of the store's mask, and so of the mask of a coder trained on it.
        coder: keep the coder's codes, under its mask, in place of activations. They take less disk, and less traffic
            from a server; such a store can be indexed (``sl.index_features``) with that coder, but not trained on.

    On a CPU one pass of the model reads about 1,400 tokens, elsewhere about 4,200; where memory runs out, that and all
    later passes are half as large. With a model on a server, the server applies the mask and sends the activations in
    half precision.

    ``torchrun --nproc-per-node N script.py`` shares the text among N processes, each with a model of its own: a rank
    makes every N-th shard, and all return the store that one process with as many threads would have made, bit for
    bit. Every rank must make the call. A harvest may go on over another number of ranks.

    Raises ValueError when the folder holds a store of another model, site or text (the difference is named), the text
    is empty or shorter than a context, a single context does not fit into memory, or activations are not finite; and
    of several ranks, when their arguments differ, or not all of them see the folder.
    """
    made: Any = prepared if isinstance(lm, LM) else items.prepared
    call = made(lm, sites, text, tokens, path, context, pack, mask, roles, coder)
    if processes.started() == 1:
        return call.run(tokens)
    with processes.peers() as peers:
        return call.run_with(peers, tokens)


def prepared(
    lm: LM, sites: Site | str | Iterable[Site | str], text: Any, tokens: int, path: str | Path | None,
    context: int, pack: bool, mask: TokenMask | None, roles: str | Sequence[str], coder: SparseCoder | None,
) -> "Harvest":  # fmt: skip
    """A call of ``harvest`` with checked arguments."""
    if tokens < 1 or context < 2:
        raise ValueError(f"harvest needs tokens >= 1 and context >= 2, got tokens={tokens}, context={context}")
    text = as_text(text)
    wanted = as_sites(sites)
    if coder is not None:
        if wanted != [coder.site]:
            raise ValueError(f"a store of codes has the site its coder reads, {coder.site!r}, got {wanted}")
        if mask is not None or roles:
            raise ValueError("a store of codes is made by the coder's own mask: leave mask= and roles= out")
        mask = coder.mask or lm.mask()
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    if mask is not None and roles:
        mask, roles = replace(mask, roles=roles), ()
    for site in wanted:
        lm.width(site)  # an unknown site is refused before anything is written
    if context > lm.max_length:
        raise ValueError(f"context={context} is longer than the {lm.max_length} tokens this model reads")
    identity = {
        "model": lm.id,
        "model_fingerprint": lm.fingerprint(),
        "prefix_id": lm.prefix_id,
        "sites": [s.key for s in wanted],
        "text": text.name,
        "text_fingerprint": text.fingerprint,
        "context": context,
        "pack": pack,
        "order": ORDER,
        "mask": "default" if mask is None else mask.to_dict(),
    }
    if roles:
        identity["roles"] = list(roles)
    if coder is not None:
        identity["coder"] = coder.fingerprint()
    return Harvest(lm, wanted, text, folder_of(path, identity), identity, mask, roles, coder)


def cost(
    lm: LM | Net, sites: Site | str | Iterable[Site | str], text: Any, tokens: int, path: str | Path | None,
    context: int, pack: bool, mask: TokenMask | None, roles: str | Sequence[str], coder: SparseCoder | None,
    ranks: int = 1,
) -> Cost:  # fmt: skip
    """The cost of ``harvest`` with these arguments, by ``ranks`` processes. The trial harvests a shard of the first
    documents, or as much of it as a slow model reads in a few seconds, into a folder that is deleted."""
    if not isinstance(lm, LM):
        raise ValueError("what a harvest costs is told for language models alone: try few tokens, and time it")
    call, once = timed(prepared, lm, sites, text, tokens, path, context, pack, mask, roles, coder)
    there = call.rows_there()
    if there >= tokens:
        return Cost(f"{call.folder} holds these tokens")
    found, _, _ = tried(call, tokens, there, ranks)
    return found._replace(seconds=once + found.seconds)


def tried(
    call: Harvest, tokens: int, there: float, ranks: int = 1
) -> tuple[Cost, dict[str, Tensor], Mapping[str, float]]:
    """(the cost of reading ``tokens`` rows of which some are there, the rows of the trial, their scales). Each rank
    cuts the whole text into tokens, and reads its share of the shards; the first shard is a round of its own."""
    context = call.identity["context"]
    first = cast(Text, call.text)[:WINDOW_DOCUMENTS]
    assert isinstance(first, Text)
    with tempfile.TemporaryDirectory() as scratch, costs.peak() as peak:
        trial = replace(call, text=first, folder=Path(scratch))
        shards, cutting = timed(lambda: list(trial.shards()))
        all_passes = [contexts for shard in shards for contexts in shard]
        cut = sum(map(tokens_of, all_passes))
        shortest = pad([min(all_passes, key=tokens_of)[0].ids])
        timed(call.lm.run, shortest, call.sites, logits=False)  # the first pass is slow
        _, warm = timed(call.lm.run, shortest, call.sites, logits=False)
        enough = max(context, costs.TRIAL_SECONDS / warm * int(shortest.mask.sum()))
        passes = [p for i, p in enumerate(shards[0]) if sum(map(tokens_of, shards[0][:i])) < enough]
        trial.manifest = trial._open()
        (tensors, excluded), reading = timed(trial.read, passes)
        _, writing = timed(trial._write, 0, tensors, excluded)
        manifest_bytes = (trial.folder / "manifest.json").stat().st_size
    [shard] = trial.manifest["shards"]
    read = sum(map(tokens_of, passes))
    kept = shard["rows"] / read
    in_text = kept * cut * max(1.0, _documents(cast(Text, call.text)) / WINDOW_DOCUMENTS)
    shard_rows = shard["rows"] if len(passes) == len(shards[0]) else kept * max(sharding.SHARD_TOKENS, context)
    rows = max(0.0, min(-((there - tokens) // shard_rows) * shard_rows, in_text - there))  # whole shards
    to_cut = min(-(-(there + rows) // (kept * cut)) * cut, in_text / kept)
    seconds = (reading + writing) / shard["rows"]
    rounds = many = rows / shard_rows
    if ranks > 1:  # whole rounds, of which the first makes one shard
        rounds = min(many, 1.0) - (-max(0.0, many - 1) // ranks)
    found = Cost(
        f"{counted(read, 'token')} harvested in {reading + writing:.1f} s",
        seconds=to_cut * cutting / cut + rounds * shard_rows * seconds,
        disk=manifest_bytes + int(rows * shard["bytes"] / shard["rows"]),
        ram=peak.ram,
        vram=peak.vram,
        parts={
            "tokens to harvest": rows,
            "tokens per second": ranks / seconds,
            "bytes per token": shard["bytes"] / shard["rows"],
        },
    )
    return found, tensors, trial.manifest["scales"]


def _documents(text: Text) -> float:
    """The number of documents; infinite for a stream, whose length is not known."""
    try:
        return len(text)
    except TypeError:
        return float("inf")
