"""Groups of edits (see ``Edit``): the edits of a list that act together on codes, and the tokens they may change."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.edits import rules
from sae_lab.types import TokenBatch, TokenMask, Write

if TYPE_CHECKING:
    from sae_lab.lm.network import Network

Edit = Any  # ``edits.edit.Edit``, which imports this module


@dataclass(eq=False)
class Group:
    """Edits that act together (several on codes, or one on the activation), or one ``write`` of a user's class. when:
    of the written site, see ``SiteMap.when``; earlier: edits of the same transcoder in earlier groups."""

    when: int
    edits: list[Edit] = field(default_factory=list)
    earlier: list[Edit] = field(default_factory=list)
    write: Write | None = None

    @property
    def first(self) -> Edit:
        return self.edits[0]


def together(edits: Sequence[Any], lm: "Network", batch: TokenBatch, new: int = 0, alone: bool = True) -> list[Write]:
    """The writes of a list of edits, for these prompts and at most ``new`` new tokens. ValueError as from
    ``Edit.writes``. alone: whether nothing but these edits changes the activations that they read."""
    groups, when = _grouped(edits, lm, batch, new), lm._sites.when
    limited = [g for g in groups if g.edits and _limit(g, lm) is not None]
    unseen = [g for g in limited if not alone or any(other.when < when(g.first.read_site) for other in groups)]
    sites = list(dict.fromkeys(g.first.read_site for g in unseen))
    form = Float[Tensor, " ".join(map(str, batch.ids.shape))]
    norms = lm.run(batch, sites, logits=False, after=rules.norms, form=form)[0] if unseen else {}
    return [g.write or _write(g, groups, norms if g in unseen else None, lm, batch) for g in groups]


def _grouped(edits: Sequence[Any], lm: "Network", batch: TokenBatch, new: int) -> list[Group]:
    """The groups, in the order in which those at one place act. (All heads and one head are one place.)"""
    groups: list[Group] = []
    for edit in edits:
        if not hasattr(edit, "together"):  # a user's own class
            groups += [Group(lm._sites.when(w.site), write=w) for w in edit.writes(lm, batch, new)]
            continue
        edit.check(lm, batch, new)
        here = [g for g in groups if g.when == lm._sites.when(edit.write_site)]
        if here and _joins(edit, here[-1]):
            first = here[-1].first
            if (edit.error == "drop") != (first.error == "drop"):
                raise ValueError(
                    f"edits of one coder at one site act on its codes together, and all keep the reconstruction error "
                    f"or all drop it, got {first} with error={first.error!r} and {edit} with error={edit.error!r}: "
                    "give all the same error="
                )
            here[-1].edits.append(edit)
            continue
        earlier = [e for g in here if _joins(edit, g) for e in g.edits] if edit.read_site != edit.write_site else []
        groups.append(Group(lm._sites.when(edit.write_site), [edit], earlier))
    return groups


def _joins(edit: Edit, group: Group) -> bool:
    """Whether an edit acts on the same codes as a group."""
    return bool(group.edits) and edit.ON_CODES and group.first.ON_CODES and _same(edit, group.first)


def _same(a: Edit, b: Edit) -> bool:
    """Whether two edits are of one coder, which may have been loaded twice."""
    if a.coder is b.coder:
        return True
    facts = [
        (type(e.coder), e.read_site, e.write_site, e.coder.config, e.coder.input_norm, e.coder.mask) for e in (a, b)
    ]
    return facts[0] == facts[1] and a.coder.fingerprint() == b.coder.fingerprint()


def _mask(group: Group, lm: "Network") -> TokenMask:
    return group.first.coder.mask or lm.mask()


def _limit(group: Group, lm: "Network") -> float | None:
    """The largest norm of tokens that count, at the site that a group reads; None: no limit."""
    return _mask(group, lm).max_norm.get(group.first.read_site.key)


def _write(group: Group, groups: Sequence[Group], norms: Any, lm: "Network", batch: TokenBatch) -> Write:
    """A group as one write. norms: of the prompts' tokens in a pass without edits, for the sites where only such a pass
    shows which tokens count."""
    edit, edits, mask, limit = group.first, [*group.earlier, *group.edits], _mask(group, lm), _limit(group, lm)
    reads, writes, done = edit.read_site, edit.write_site, len(group.earlier)
    loud = before = None
    if norms is not None:
        loud = torch.zeros(int(batch.row_numbers.max()) + 1, batch.mask.shape[1], dtype=torch.bool)
        loud[batch.row_numbers] = ~(norms[reads] <= limit) & batch.mask  # by the rows' numbers among the user's prompts
    elif limit is not None:  # whether another group writes, before this one, where this one reads
        when = lm._sites.when(reads)
        others = groups[: groups.index(group)] if group.when == when else groups
        before = any(g.when == when for g in others)
    counts = {"special": list(mask.special_ids), "skip_first": mask.skip_first, "limit": limit}
    counts |= {"loud": loud, "before": before}
    change = _coded(edits, done, lm, batch) if edit.ON_CODES else edit.change()
    elsewhere, first, places = reads != writes, (reads,) if before else (), [e.place(lm) for e in edits]
    conditions = [place["when"] for place in places if place["when"]]
    for number, when in enumerate(conditions, elsewhere + len(first)):
        when["read"] = number
    fn = partial(rules.edited, mask=counts, places=places, done=done, elsewhere=elsewhere, change=change)
    return Write(writes, fn, (reads,) if elsewhere else (), (*first, *(when.pop("site") for when in conditions)))


def _coded(edits: Sequence[Edit], done: int, lm: "Network", batch: TokenBatch) -> Any:
    """The change of a group of edits on codes, as a function of ``rules``."""
    features = sorted({f for edit in edits for f in edit.features})
    column = {feature: i for i, feature in enumerate(features)}
    columns = [[column[f] for f in edit.features] for edit in edits]
    drop, amounts = edits[-1].error == "drop", [edit.amount() for edit in edits[done:]]
    if not drop and all(amount is not None for amount in amounts):
        plan = edits[0].coder.portable(features, whole=False)
        plan = {name: plan[name] for name in ("W_some", "input_norm", "transcodes")} | {"own": {}}
        pairs = list(zip(columns[done:], amounts, strict=True))
        return partial(rules.shifted, plan=plan, done=done, amounts=pairs)
    parts = [
        {
            "columns": slice(None) if own == list(range(len(features))) else own, "rule": edit.rule(lm, batch),
            "error": edit.error_of_another_run(lm),
        }
        for edit, own in zip(edits, columns, strict=True)
    ]  # fmt: skip
    plan = edits[0].coder.portable(features, whole=drop or any(part["error"] for part in parts))
    return partial(rules.coded, plan=plan, drop=drop, done=done, parts=parts)
