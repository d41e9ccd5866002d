"""One watched pass through a model: which tensors every module's input and output are sums of.

``Flow`` sees each tensor operation. A tensor's *form* is a weighted sum of other tensors: the stream after a Llama's
block is {stream before: 1, attention's output: 1, MLP's output: 1}. Operations that only add, scale, cast or reshape
pass forms on; any other operation makes a new *atom*, which remembers its operands. So forms show what a sub-layer adds
to the residual stream: whatever its modules are called, after norms and multipliers, and in a model without weights (on
the meta device).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lab.lm.passes import first_tensor

ROWS, TOKENS = 2, 10  # of the watched text: two rows that differ in their last token only
SKETCH = 64  # random directions onto which activations are projected, to check their sums

Form = dict[int, float]  # atom -> factor
End = tuple[str, str]  # (module path, "input" or "output")

# Operations that give the same numbers in another shape, type or place, by their names in torch's dispatcher.
_SAME = {
    "view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "alias", "detach", "clone", "_to_copy", "expand",
    "slice", "lift_fresh", "contiguous", "native_dropout", "select", "split", "copy_",
}  # fmt: skip
_PRODUCTS = {"bmm", "mm", "addmm", "matmul", "baddbmm", "addbmm", "dot", "mv"}
_ALONG_TIME = {"convolution", "cumsum", "constant_pad_nd", "roll", "flip", "_conv_depthwise2d", "cumprod"}


@dataclass(frozen=True)
class Atom:
    """A tensor that is no sum of others. parents: the atoms of its operands. softmax: whether it is a softmax; product:
    a product of matrices; scores: a product of two activations; mixes: made by an operation across tokens."""

    parents: tuple[int, ...] = ()
    softmax: bool = False
    product: bool = False
    scores: bool = False
    mixes: bool = False
    live: bool = False  # depends on the text


@dataclass
class Seen:
    """The tensor at one end of a module, at its first call."""

    when: int
    shape: tuple[int, ...]
    form: Form
    storage: int  # tells whether two tensors share memory
    dtype: torch.dtype
    sketch: Tensor | None = None  # of the first row, "pos SKETCH"
    calls: int = 1
    streams: int = 1  # tensors of this shape in the same input or output
    handed: Form = field(default_factory=dict)  # at a list's member: the form before the stream got a new atom


class Flow(TorchDispatchMode):
    """Forms of all tensors of one pass. Use it as a context manager; module hooks call ``pass_by``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.atoms: list[Atom] = []
        self.forms: dict[int, Form] = {}
        self.seen: dict[End, Seen] = {}
        self.last: dict[End, Seen] = {}  # the same at their last call
        self.operands: set[tuple[tuple[tuple[int, float], ...], int]] = set()  # (form, storage) of what was added up
        self._alive: list[Tensor] = []  # so that no id is given twice
        self._weights = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._directions: dict[int, Tensor] = {}
        self.logits: Form = {}
        self._blind = self._clock = 0

    def form(self, t: Tensor) -> Form:
        """The tensor's form. A tensor that no watched operation made is a weight, or comes from code that cannot be
        watched."""
        if id(t) not in self.forms:
            known = id(t) in self._weights or t.dtype in (torch.bool,)
            self._set(t, self._atom(Atom(live=not known, mixes=not known)))
        return self.forms[id(t)]

    def _atom(self, atom: Atom) -> Form:
        self.atoms.append(atom)
        return {len(self.atoms) - 1: 1.0}

    def _set(self, t: Tensor, form: Form) -> None:
        self._alive.append(t)
        self.forms[id(t)] = form

    def fresh(self, t: Tensor) -> Form:
        """Give a tensor a new atom. Returns its form before."""
        before = self.form(t)
        self.forms[id(t)] = self._atom(Atom(parents=tuple(before), live=True))
        return before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # without weights there are no values; transformers asks whether a text is one piece
        out = func(*args, **(kwargs or {}))
        if not self._blind:
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        results = _tensors(out)
        form = self._sum(name, args, kwargs, results)
        if form is None:
            numbers = any(t.is_floating_point() for t in results)
            form = self._atom(self._made_by(name, _tensors(args, kwargs), numbers))
        for t in results:
            self._set(t, form)
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            self._set(args[0], form)  # changed in place
            if args[0]._base is not None and args[0]._base.shape != args[0].shape:
                self._set(args[0]._base, self._atom(Atom(parents=tuple(form), mixes=True, live=True)))

    def _made_by(self, name: str, sources: list[Tensor], numbers: bool) -> Atom:
        forms = [self.form(t) for t in sources]
        live = [f for f in forms if any(self.atoms[a].live for a in f)]
        attention = "attention" in name
        return Atom(
            parents=tuple({a for f in forms for a in f}),
            softmax="softmax" in name or attention,
            product=attention or name in _PRODUCTS or "linear" in name,
            scores=attention or (name in _PRODUCTS and len(live) > 1),
            mixes=numbers and (attention or name in _ALONG_TIME or (name in _PRODUCTS and len(live) > 1)),
            live=bool(live),
        )

    def _sum(self, name: str, args: Any, kwargs: dict[str, Any], results: list[Tensor]) -> Form | None:
        """The form of the result of an operation that adds, scales or reshapes; None for other operations."""
        if not args or not isinstance(args[0], Tensor) or (len(results) != 1 and name != "native_dropout"):
            return None
        first, second, out = args[0], args[1] if len(args) > 1 else None, results[0]
        plain = name.rstrip("_") if not name.startswith("_") else name
        if name == "copy_" and isinstance(second, Tensor) and second.shape == out.shape:
            return self.form(second)
        if plain in _SAME and out.numel() == first.numel() and out.shape[-1:] == first.shape[-1:]:
            return self.form(first)
        if plain in ("add", "sub") and isinstance(second, Tensor) and first.shape == second.shape == out.shape:
            sign = (1.0 if plain == "add" else -1.0) * float(kwargs.get("alpha", 1))
            a, b = self.form(first), self.form(second)
            for t, f in ((first, a), (second, b)):
                self.operands.add((frozen(f), storage(t)))
            total = {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in {**a, **b}}
            return {k: v for k, v in total.items() if v != 0}
        if plain in ("mul", "div"):
            for t, by in ((first, second), (second, first)) if plain == "mul" else ((first, second),):
                factor = _number(by)
                if isinstance(t, Tensor) and factor is not None and t.shape == out.shape and factor != 0:
                    factor = factor if plain == "mul" else 1 / factor
                    form = {k: factor * v for k, v in self.form(t).items()}
                    self.operands |= {(frozen(form), storage(out))}
                    return form
        return {k: -v for k, v in self.form(first).items()} if plain == "neg" else None

    def pass_by(self, path: str, end: str, value: Any, own: bool = False) -> None:
        """Note the tensor at an end of a module. own: give the stream a new atom here."""
        t = first_tensor(value)
        if t is None or t.dim() < 2:
            return
        self._blind += 1
        try:
            first = (path, end) not in self.seen
            handed = self.fresh(t) if first and own and t.is_floating_point() else {}
            form, sketch = dict(self.form(t)), self._sketched(t)
            many = value if isinstance(value, list | tuple) else ()
            streams = sum(isinstance(v, Tensor) and v.shape == t.shape and v.is_floating_point() for v in many)
            seen = Seen(self._clock, tuple(t.shape), form, storage(t), t.dtype, sketch, 1, max(1, streams), handed)
            self._clock += 1
        finally:
            self._blind -= 1
        self.last[path, end] = seen
        if first:
            self.seen[path, end] = seen
        else:
            self.seen[path, end].calls += 1

    def _sketched(self, t: Tensor) -> Tensor | None:
        if t.is_meta or not t.is_floating_point() or t.shape[:-1] not in ((ROWS, TOKENS), (ROWS * TOKENS,)):
            return None
        width = t.shape[-1]
        if width not in self._directions:
            generator = torch.Generator().manual_seed(width)
            self._directions[width] = torch.randn(width, SKETCH, generator=generator) / width**0.5
        return t.detach().reshape(ROWS, TOKENS, width)[0].float().cpu() @ self._directions[width]

    def made_of(self, form: Iterable[int], stop: Iterable[int]) -> set[int]:
        """All live atoms that a form was made of, back to ``stop``, which is left out."""
        found, todo, stop = set(), list(form), set(stop)
        while todo:
            a = todo.pop()
            if a in found or a in stop or not self.atoms[a].live:
                continue
            found.add(a)
            todo += self.atoms[a].parents
        return found

    def attends(self, atoms: set[int]) -> bool:
        """Whether a softmax over products of activations is among them: attention."""
        return any(self.atoms[a].softmax and self.over_scores(a) for a in atoms)

    def over_scores(self, softmax: int) -> bool:
        """Whether a softmax reads a product of activations, with no other product between (a router's softmax reads a
        product with weights)."""
        todo, known = [softmax], set()
        while todo:
            a = self.atoms[todo.pop()]
            if a.scores:
                return True
            todo += [] if a.product else [p for p in a.parents if p not in known]
            known.update(a.parents)
        return False

    def mixes(self, atoms: set[int], strongly: bool = False) -> bool:
        """Whether one of the atoms moves values between tokens. strongly: by attention-like scores; a short
        convolution or a shift, which some MLPs have, does not count."""
        return any(self.atoms[a].scores if strongly else self.atoms[a].mixes for a in atoms)


def watch(model: Any, members: set[str]) -> tuple[Flow, Any]:
    """(the flow of one pass over a short text, the model's output). members: paths of modules before which the stream
    gets a new atom."""
    flow, hooks = Flow(model), []
    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = (torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % TOKENS * 7919 + 11) % vocab
    ids[1, -1] = (ids[1, -1] + vocab // 2) % vocab
    ids = ids.to(device)
    for path, module in model.named_modules():
        own = path in members
        hooks += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, p=path, o=own: flow.pass_by(p, "input", (*args, *kwargs.values()), o),
                with_kwargs=True,
            ),
            module.register_forward_hook(lambda _, args, out, p=path: flow.pass_by(p, "output", out)),
        ]
    try:
        with torch.no_grad(), flow:
            flow._set(ids, flow._atom(Atom(live=True)))
            out = model(input_ids=ids, use_cache=False)
            logits = out.logits if hasattr(out, "logits") else first_tensor(out)
            flow.logits = {} if logits is None else dict(flow.form(logits))
    except torch.OutOfMemoryError:
        raise
    except Exception as err:  # the model's own, of any kind
        raise ValueError(
            f"sae_lab finds a model's sites by watching one pass over a short text, and this model does not run so "
            f"({type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}): where it, or its attention, is "
            "compiled (flex_attention), load it with attn_implementation='sdpa'; else try model(input_ids=...) itself"
        ) from err
    finally:
        for hook in hooks:
            hook.remove()
    flow._alive, flow.forms = [], {}  # the pass's tensors are freed
    return flow, out


def frozen(form: Form) -> tuple[tuple[int, float], ...]:
    """A form that can be a dict's key."""
    return tuple(sorted(form.items()))


def times(form: Form, target: Form) -> float | None:
    """The number c with c·form = target, or None."""
    if form.keys() != target.keys() or not form:
        return None
    ratios = [target[a] / form[a] for a in form]
    return ratios[0] if all(abs(r - ratios[0]) < 1e-6 * abs(ratios[0]) for r in ratios) else None


def less(form: Form, other: Form) -> Form:
    """form - other."""
    rest = {a: form.get(a, 0.0) - other.get(a, 0.0) for a in {**form, **other}}
    return {a: v for a, v in rest.items() if abs(v) > 1e-9}


def storage(t: Tensor) -> int:
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return id(t)


def _number(x: Any) -> float | None:
    """A Python number, or the value of a tensor with one element."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta and x.dtype != torch.bool:
        return float(x.detach())
    return None


def _tensors(*values: Any) -> list[Tensor]:
    """Tensors in lists, tuples and dicts. (Called for each operation: pytree takes three times as long.)"""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found
