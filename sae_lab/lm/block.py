"""One block of a model: which kinds of site it has, where they lie, and why it lacks the others.

Read off one watched pass (``observing.watch``): a tensor's form says which tensors it is a sum of, with which factors.
So what a block adds to the stream is found after norms and multipliers too, whatever its modules are called.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae_lab.lm.observing import ROWS, TOKENS, Flow, Form, Seen, frozen, less, times
from sae_lab.lm.passes import Place
from sae_lab.types import LAYER_KINDS, Site

# The largest difference between a sum of parts and the whole: this share of the update, plus ROUNDING eps of the whole.
TOLERANCE, ROUNDING = 0.01, 8
SUMS = (
    (("resid_pre", "attn_out"), "resid_mid"),
    (("resid_mid", "mlp_out"), "resid_post"),
    (("resid_pre", "attn_out", "mlp_out"), "resid_post"),
)
SUMMED = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass
class Block:
    """One layer: the places of its kinds of site, and why it lacks the others."""

    path: str
    places: dict[str, Place] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    w_o: str | None = None  # attention's output projection, which reads attn_z
    after_attention: str | None = None  # the norm between W_O and the stream (Gemma, OLMo 2)
    w_o_factor: float | None = None  # the stream gains this · the output of W_O (or of that norm); None: no such factor
    adds: bool = False  # whether resid_post is resid_pre plus what the sub-layers add
    hands_on: bool = False  # whether the next block reads resid_post unchanged
    before_mlp: str | None = None  # the norm between resid_mid and mlp_in
    heads: int | None = None


def read_block(model: Any, flow: Flow, path: str, layer: int) -> Block:
    """The block at ``path.format(layer)``, read off a watched pass of the model."""
    return _Reader(model, flow, path, layer).block()


def broken_sums(x: Mapping[str, Tensor], dtype: torch.dtype) -> list[tuple[tuple[str, ...], str]]:
    """Which sums of a block do not hold, as (parts, whole). x: activations by kind, one row per token."""
    broken = []
    for parts, whole in SUMS:
        if not all(kind in x for kind in (*parts, whole)) or (len(parts) == 3 and "resid_mid" in x):
            continue
        update = torch.stack([x[kind] for kind in parts[1:]]).sum(0)
        off = (x[parts[0]] + update - x[whole]).norm(dim=-1)
        allowed = TOLERANCE * update.norm(dim=-1) + ROUNDING * torch.finfo(dtype).eps * x[whole].norm(dim=-1)
        if bool((off > allowed).any()):
            broken.append((parts, whole))
    return broken


class _Reader:
    """Reads one block off the flow. path: of the blocks, with {} for the layer."""

    def __init__(self, model: Any, flow: Flow, path: str, layer: int):
        self.model, self.flow, self.layer = model, flow, layer
        self.path, seen = path.format(layer), flow.seen
        self.enter, self.leave = seen[self.path, "input"], seen[self.path, "output"]
        self.before = seen.get((path.format(layer - 1), "output"))
        self.after = seen.get((path.format(layer + 1), "input"))
        [self.stream] = self.enter.form  # ``watch`` gave the stream a new atom here
        self.points = {
            end: point for end, point in seen.items()
            if end[0].startswith(f"{self.path}.") and point.calls == 1
            and self.enter.when < point.when < self.leave.when
        }  # fmt: skip
        for path in [p for p, end in self.points if end == "output" and self._is_all_of_it(p)]:
            self.points.pop((path, "input"))
            self.points.pop((path, "output"))
        self.found = Block(self.path)

    def _is_all_of_it(self, path: str) -> bool:
        """Whether a module inside the block has the block's own input and output (torch.compile wraps blocks so)."""
        came = self.points.get((path, "input"))
        return came is not None and (came.form, self.points[path, "output"].form) == (self.enter.form, self.leave.form)

    def block(self) -> Block:
        block, (rows, tokens, *rest) = self.found, self.enter.shape
        config = self.model.config.get_text_config()
        why, d = None, getattr(config, "hidden_size", rest[-1])
        if len(rest) != 1:
            why = f"its blocks hand on a tensor of {2 + len(rest)} axes"
        elif min(self.enter.streams, self.leave.streams) > 1:
            why = f"its blocks hand on {self.leave.streams} streams"
        elif (rows, tokens) != (ROWS, TOKENS):
            why = f"its blocks read {tokens} vectors for {TOKENS} tokens"
        if why is not None:
            why += ", not one residual stream (batch pos d): take a module's path inside a block"
            block.missing = dict.fromkeys(LAYER_KINDS, why)
            return block
        self._ends()
        if isinstance(d, int) and rest[0] > d and rest[0] % d == 0:
            self._say_of_sub_layers(f"the stream is {rest[0] // d} streams of width {d} side by side")
            block.missing["mlp_in"] = block.missing["attn_z"] = block.missing["mlp_out"]
        else:
            self._inside()
        self._check()
        for kind in LAYER_KINDS:
            if kind not in block.places:
                block.missing.setdefault(kind, "no tensor of the block is that")
        return block

    def _ends(self) -> None:
        block = self.found
        before, after = self.before, self.after
        block.adds = self.leave.form.get(self.stream) == 1.0
        block.hands_on = after is None or self._same(self.leave, after)
        block.places["resid_post"] = Place(self.path, "output")
        if before is None or self._same(before, self.enter):
            block.places["resid_pre"] = Place(self.path, "input")
        else:
            block.missing["resid_pre"] = (
                f"the model changes the stream between layers {self.layer - 1} and {self.layer}; read resid_post of "
                f"layer {self.layer - 1}"
            )

    def _same(self, before: Seen, after: Seen) -> bool:
        if before.form == after.handed:
            return True
        if before.sketch is None or after.sketch is None:
            return before.storage == after.storage and before.shape == after.shape
        return torch.equal(before.sketch, after.sketch)

    def _inside(self) -> None:
        stream, out = {self.stream: 1.0}, self.leave.form
        added = less(out, stream) if out.get(self.stream) == 1.0 else None
        mid = self._middle(out)
        if mid is not None:
            self._serial(mid, out)
        elif added is not None:
            self._side_by_side(added)
        else:
            self._say_of_sub_layers("the block does not hand its stream on by adding to it (it norms or scales it)")
        self._heads()
        if "mlp_in" not in self.found.places and self.found.w_o and "mlp_in" not in self.found.missing:
            done = self.points[self.found.w_o, "output"].when
            self._mlp_in(self._made_of(out, {}), {}, done)

    def _middle(self, out: Form) -> Form | None:
        """The form of the stream between attention and MLP: what a module reads or returns, to which the MLP's output,
        and nothing else, is then added."""
        return self._between(out, strongly=False) or self._between(out, strongly=True)

    def _between(self, out: Form, strongly: bool) -> Form | None:
        forms = {frozen(s.form): s.form for s in self.points.values() if self._is_stream(s)}
        best: tuple[float, Form] | None = None
        for form in forms.values():
            rest = less(out, form)
            if form == {self.stream: 1.0} or not rest or not set(form) <= set(out):
                continue
            if form.get(self.stream) != 1.0 and (self.stream in out or set(rest) & set(form)):
                continue
            own = self._made_of(rest, form)
            behind = self._made_of(form, {})
            reads = self.flow.made_of(rest, {self.stream} - set(form)) & set(form)
            if self.flow.mixes(own, strongly) or not behind or not reads:
                continue
            if strongly and not (self._kind(behind) == "attention" and self._adds(rest)):
                continue
            size = sum(abs(v) for v in form.values())
            if best is None or size < best[0]:
                best = (size, form)
        return best[1] if best else None

    def _serial(self, mid: Form, out: Form) -> None:
        block = self.found
        where = self._stream_place(mid)
        before = less(mid, {self.stream: 1.0})
        if where is None:
            self._say_of_sub_layers("no module reads the stream between attention and MLP")
            return
        parts = self._parts(before)
        if self.stream in mid and any(part and not self.flow.mixes(part) for part in parts.values()):
            self._say_of_sub_layers("the block has more than one attention and one MLP")
            block.missing["mlp_in"] = block.missing["mlp_out"]
            return
        block.places["resid_mid"] = where
        rest, kind = less(out, mid), self._kind(self._made_of(mid, {}))
        mlp = self._put("mlp_out", self._adds(rest), "what is added after the MLP is no one module's output")
        self._mlp_in(self._made_of(rest, mid), mid)
        if kind != "attention":
            block.missing["attn_out"] = f"it has no attention here, but {kind}"
        elif mid.get(self.stream) == 1.0:
            self._put("attn_out", self._adds(before), "what is added before the MLP is not attention's output alone")
        elif mlp and len(mid) == 1:
            # The skip connection is changed too (MiniMax norms it), so that attention's part is a difference of two
            # tensors.
            block.places["attn_out"] = where._replace(less=Site("resid_pre", self.layer).key)
        one_step = all(not (self._made_of({a: 1.0}, {}) - {a}) & set(rest) for a in rest)  # no part is made of another
        if not mlp and "attn_out" in block.places and one_step:
            # Several modules of the MLP add side by side (routed experts and a shared one).
            block.places["mlp_out"] = Place(self.path, "output", less=Site("resid_mid", self.layer).key)
            block.missing.pop("mlp_out")

    def _put(self, kind: str, place: Place | None, why: str) -> bool:
        """Note a kind's place, or why it has none; returns whether it has one."""
        if place is None:
            self.found.missing[kind] = why
        else:
            self.found.places[kind] = place
        return place is not None

    def _parts(self, added: Form) -> dict[int, set[int]]:
        """For each part of a sum, all atoms that it was made of, except the other parts."""
        return {a: self._made_of({a: 1.0}, {b: 1.0 for b in added if b != a}) for a in added}

    def _check(self) -> None:
        """Drop the kinds of site whose sums do not hold for the activations of the watched pass."""
        seen = [(kind, p, self.flow.seen[p.path, p.end].sketch) for kind, p in self.found.places.items()]
        x = {kind: place.factor * sketch for kind, place, sketch in seen if sketch is not None and not place.less}
        for parts, whole in broken_sums(x, self.enter.dtype):
            for kind in parts[1:]:
                self.found.places.pop(kind, None)
                self.found.missing[kind] = f"{' + '.join(parts)} is not {whole} in numbers"

    def _side_by_side(self, added: Form) -> None:
        block = self.found
        parts = self._parts(added)
        mixing = {a: v for a, v in added.items() if self.flow.mixes(parts[a])}
        still = {a: v for a, v in added.items() if a not in mixing}
        why = "attention and MLP read the same stream and are added together: there is no middle"
        block.missing["resid_mid"] = why if mixing and still else "the block has one sub-layer"
        if still:
            self._put("mlp_out", self._adds(still), "what the MLP adds is no one module's output")
            self._mlp_in(set().union(*(parts[a] for a in still)), {self.stream: 1.0})
        else:
            block.missing["mlp_out"] = block.missing["mlp_in"] = "the block has no MLP"
        kind = self._kind(set().union(*(parts[a] for a in mixing))) if mixing else "no attention"
        place = self._adds(mixing) if mixing and kind == "attention" else None
        self._put("attn_out", place, f"it has {kind}" if kind != "attention" else "attention does not add alone")

    def _say_of_sub_layers(self, why: str) -> None:
        for kind in ("attn_out", "resid_mid", "mlp_out"):
            self.found.missing[kind] = why

    def _kind(self, atoms: set[int]) -> str:
        """What a sub-layer is, in words: "attention", or another mixer of tokens, or none."""
        if self.flow.attends(atoms) or self._named(atoms, ("attn", "attention")):
            return "attention"
        return "a mixer of tokens without attention" if self.flow.mixes(atoms) else "no attention"

    def _named(self, atoms: set[int], names: tuple[str, ...]) -> bool:
        """Whether the path of a module with weights that makes one of the atoms has one of these names: it tells linear
        attention, and kernels whose operations cannot be watched."""
        return any(n in path[len(self.path) :].lower() for path in self._working(atoms) for n in names)

    def _made_of(self, form: Form, stop: Form) -> set[int]:
        """All of the block's atoms that went into a form, up to and without ``stop`` and the stream."""
        return self.flow.made_of(form, {**stop, self.stream: 1.0})

    def _is_stream(self, seen: Seen) -> bool:
        return self._is_wide(seen) and seen.shape[-1] == self.enter.shape[-1]

    def _adds(self, form: Form, last: bool = True) -> Place | None:
        """The module whose output, times one number, is this part of the stream; of several, the last or the first."""
        found = [
            (factor != 1.0, path.count("."), -seen.when if last else seen.when, path, factor)
            for (path, end), seen in self.points.items()
            if end == "output" and self._is_stream(seen) and (factor := times(seen.form, form)) is not None
        ]
        return Place(min(found)[3], "output", None, min(found)[4]) if found else None

    def _stream_place(self, form: Form) -> Place | None:
        """Where a write to the stream of this form changes the skip connection too: at the input of a module that
        reads the same memory as the skip connection, or at the output of a module that returns it."""
        inputs = [
            (path.count("."), seen.when, path)
            for (path, end), seen in self.points.items()
            if end == "input" and self._is_stream(seen) and times(seen.form, form) == 1.0
            and (frozen(seen.form), seen.storage) in self.flow.operands
        ]  # fmt: skip
        return Place(min(inputs)[2], "input", in_place=True) if inputs else self._adds(form, last=False)

    def _working(self, atoms: set[int]) -> dict[str, int]:
        """Modules that make one of these atoms and hold a matrix, also in a submodule: path -> when they begin."""
        found = {}
        for (path, end), seen in self.points.items():
            made = end == "output" and set(seen.form) & atoms and (path, "input") in self.points
            if made and self._has_matrix(path):
                found[path] = self.points[path, "input"].when
        return found

    def _has_matrix(self, path: str) -> bool:
        """Whether a module or a submodule has weights of two axes or more; a quantised module keeps them packed."""
        module = self.model.get_submodule(path)
        packed = (not isinstance(getattr(m, "weight", None), torch.Tensor | type(None)) for m in module.modules())
        return any(p.dim() > 1 for p in module.parameters()) or any(packed)

    def _mlp_in(self, atoms: set[int], before: Form, begin: int = 0) -> None:
        """Find mlp_in: what the MLP reads after its norm. atoms: some of the MLP's."""
        block, ins = self.found, {p: s for (p, end), s in self.points.items() if end == "input"}
        makers = {p: when for p, when in self._working(atoms).items() if when > begin}
        norms = [p for p in makers if self._is_gated_norm(p, makers, before)]
        makers = {p: when for p, when in makers.items() if not any(f"{p}.".startswith(f"{q}.") for q in norms)}
        top = sorted((p for p in makers if not any(p.startswith(q + ".") for q in makers)), key=lambda p: makers[p])
        if not top:
            block.missing["mlp_in"] = "no tensor (batch pos d) goes into its MLP"
            return
        first = self._past_its_norm(top[0], makers, before)
        form = ins[first].form
        giving = [p for (p, end), s in self.points.items() if end == "output" and s.form == form and p in ins]
        block.before_mlp = next((p for p in giving if ins[p].form == before), None)
        readers = [p for p in top if ins[p].form == form]
        if len(readers) > 1 and (block.before_mlp is None or "resid_mid" not in block.places):
            block.missing["mlp_in"] = f"several modules read it ({', '.join(p.split('.')[-1] for p in readers)})"
            return
        own = (block.before_mlp, "output") if len(readers) > 1 else (first, "input")
        seen = next(end for end in [own, *self.points] if self.points[end].form == form)
        block.places["mlp_in"] = Place(*seen)

    def _is_gated_norm(self, path: str, makers: dict[str, int], before: Form) -> bool:
        """Whether a module with a matrix is only a norm: it reads the stream, and a later module reads its output."""
        out = self.points[path, "output"]
        later = [p for p in makers if makers[p] > out.when and self.points[p, "input"].form == out.form]
        return bool(later) and self._is_stream(out) and self.points[path, "input"].form == before

    def _past_its_norm(self, path: str, makers: dict[str, int], before: Form) -> str:
        """The module itself, or the module inside it that follows its norm."""
        inside = sorted((when, p) for p, when in makers.items() if p.startswith(path + "."))
        own = self.points[path, "input"].form
        if inside and times(own, before) is not None and self.points[inside[0][1], "input"].form != own:
            return inside[0][1]
        return path

    def _is_wide(self, seen: Seen) -> bool:
        return tuple(seen.shape[:-1]) in ((ROWS, TOKENS), (ROWS * TOKENS,))

    def _heads(self) -> None:
        """attn_z: what W_O reads, the first module with a matrix after attention has mixed tokens."""
        block, flow = self.found, self.flow
        made = self._made_of(self.leave.form, {})
        sources = {a for a in made if flow.atoms[a].softmax and flow.over_scores(a)}
        soft = bool(sources)
        if not soft and self._named(made, ("attn", "attention")):  # linear attention
            sources = {a for a in made if flow.atoms[a].scores}
        block.missing["attn_z"] = "it has no attention here"
        for (path, end), seen in sorted(self.points.items(), key=lambda kv: kv[1].when):
            inside = any(other.startswith(path + ".") for other, _ in self.points)
            if end != "input" or inside or (path, "output") not in self.points:
                continue
            out = self.points[path, "output"]
            if not self._has_matrix(path) or not self._is_stream(out):
                continue
            if not sources & self._made_of(seen.form, {}):
                continue
            path = self._with_adapters(path)
            out = self.points[path, "output"]
            after = self._to_the_stream(out.form)
            if after is None:
                block.missing["attn_z"] = "what attention's heads make reaches the stream by more than W_O and a norm"
            elif not self._is_wide(seen):
                block.missing["attn_z"] = f"W_O reads a tensor of {len(seen.shape)} axes here"
            else:
                block.w_o, block.after_attention, block.w_o_factor = path, *after
                config = self.model.config.get_text_config()
                block.heads = getattr(config, "num_attention_heads", None) if soft else None
                block.places["attn_z"] = Place(path, "input")
                block.missing.pop("attn_z")
            return

    def _with_adapters(self, path: str) -> str:
        """The outermost module around a linear one with the same input that only adds to its output (as LoRA does)."""
        read, gives = self.points[path, "input"].form, set(self.points[path, "output"].form)
        for around in sorted((p for p, end in self.points if end == "output" and path.startswith(f"{p}.")), key=len):
            came, out = self.points.get((around, "input")), self.points[around, "output"].form
            if came is None or came.form != read or not gives <= set(out):
                continue
            if not self.flow.made_of(set(out) - gives, read) & {self.stream, *gives}:
                return around
        return path

    def _to_the_stream(self, form: Form) -> tuple[str | None, float | None] | None:
        """form: of W_O's output. (the norm that it passes before the block adds it up, or None; its factor in the
        stream). None if the block never adds it up."""
        sums = [self.leave.form, *(s.form for s in self.points.values() if self._is_stream(s))]
        sums = [f for f in sums if len(f) > 1]

        def added(part: Form) -> bool:
            return any(set(part) < set(f) for f in sums)

        def factor(part: Form) -> float | None:
            form = min((f for f in sums if f.get(self.stream) == 1.0 and set(part) < set(f)), key=len, default=None)
            if form is None or set(part) & self._made_of({a: 1.0 for a in form if a not in part}, {}):
                return None  # another part of that sum is made of it (an adapter behind W_O)
            return times(part, {a: form[a] for a in part})

        if added(form):
            return None, factor(form)
        for (path, end), seen in self.points.items():
            if end == "input" and times(seen.form, form) is not None and (path, "output") in self.points:
                normed = self.points[path, "output"].form
                if not self._has_matrix(path) and added(normed):
                    return path, factor(normed)
        return None
