"""One pass through a model, as functions that run inside a trace: here, or on a server that has no sae_lab.

They get nnsight's root envoy, plain data and tensors. nnsight sends their source to the server, as it does with those
of ``saes.portable``: they may use torch, nnsight and each other, and nothing else. (``no_type_check`` keeps the tests'
type checker from wrapping them; nnsight could not send the source of a wrapped function.)
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, no_type_check

import torch


class Place(NamedTuple):
    """How a site is read and written: its value is ``factor`` times the tensor at one end of a module, less the value
    of another site.

    path: of the module. end: "input" or "output". columns: (start, stop) on the last axis; None: all. less: key of an
    earlier site. in_place: whether a write changes the tensor itself. It must for the stream in mid-block: the model
    keeps that tensor for its skip connection. Of networks that are no language models, part: the key of the value in
    the mapping that the module returns; axes: of the tensor, in the order (batch, *places, channel), the batch -1 where
    the tensor has none.
    """

    path: str
    end: str
    columns: tuple[int, int] | None = None
    factor: float = 1.0
    less: str | None = None
    in_place: bool = False
    part: str | None = None
    axes: tuple[int, ...] | None = None


class Step(NamedTuple):
    """One step of a pass: a write where ``change`` is given, else a read.

    name: of a read's activation, for later steps. keep: the read returns keep(x, tokens); None: it returns nothing and
    only serves later steps. change: change(x, tokens, *activations) -> x'. needs: the names of the reads whose
    activations ``change`` gets.
    """

    name: str
    place: Place
    keep: Callable[..., Any] | None = None
    change: Callable[..., Any] | None = None
    needs: tuple[str, ...] = ()


def plain(step: Place | Step) -> SimpleNamespace:
    """A place or a step as a plain namespace, since a server does not have this library's classes."""
    return SimpleNamespace(**{k: plain(v) if isinstance(v, Place) else v for k, v in step._asdict().items()})


@no_type_check
def first_tensor(value):
    """A module's main value: itself, or the first tensor of the tuple, list or mapping it comes in."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


@no_type_check
def with_first(value, new):
    """The same tuple, list or mapping with another first tensor."""
    if isinstance(value, torch.Tensor):
        return new
    if isinstance(value, dict):
        name = next(name for name, v in value.items() if isinstance(v, torch.Tensor))
        return type(value)(**{**value, name: new})
    at = next(i for i, v in enumerate(value) if isinstance(v, torch.Tensor))
    parts = [*value[:at], new, *value[at + 1 :]]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@no_type_check
def envoy_at(root, path):
    """nnsight's envoy of the module at ``path``, or the module itself in a model that is no envoy."""
    for name in path.split("."):
        # nnsight serves "output", "input" and the like on every envoy, and moves a module of that name (BERT's).
        moved = vars(root).get("E_" + name)
        root = moved if moved is not None else root[int(name)] if name.isdigit() else getattr(root, name)
    return root


@no_type_check
def as_rows(x, axes):
    """A tensor as "batch place d". axes: see ``Place``."""
    x, axes = (x[None], [0, *(a + 1 for a in axes[1:])]) if axes[0] < 0 else (x, axes)
    return x.permute(*axes).reshape(x.shape[axes[0]], -1, x.shape[axes[-1]])


@no_type_check
def from_rows(new, like, axes):
    """What ``as_rows`` made, in the form of the tensor ``like``."""
    alone = axes[0] < 0
    like, axes = (like[None], [0, *(a + 1 for a in axes[1:])]) if alone else (like, list(axes))
    new = new.reshape([like.shape[a] for a in axes]).permute(*[axes.index(a) for a in range(len(axes))])
    return new[0] if alone else new


@no_type_check
def read(root, place, length):
    """The tensor at a place, "batch pos d"; length: tokens of a row. (Some models, OPT among them, join the axes of
    rows and tokens.)"""
    envoy = envoy_at(root, place.path)
    value = envoy.input if place.end == "input" else envoy.output
    value = first_tensor(value if place.part is None else value[place.part])
    if place.axes is not None:
        return as_rows(value, place.axes)
    value = value.unflatten(0, (-1, length)) if value.dim() == 2 else value
    return value if place.columns is None else value[..., slice(*place.columns)]


@no_type_check
def write(root, place, new):
    """Replace the tensor at a place; the other columns, and the rest of its tuple, stay as they are."""
    envoy = envoy_at(root, place.path)
    whole = envoy.input if place.end == "input" else envoy.output
    old = first_tensor(whole if place.part is None else whole[place.part])
    new = new.to(old.dtype)
    if place.axes is not None:
        new = from_rows(new, old, place.axes)
    elif old.dim() == 2:
        new = new.flatten(0, 1)
    if place.in_place:
        old[..., slice(None) if place.columns is None else slice(*place.columns)] = new
        return
    if place.columns is not None:
        start, stop = place.columns
        new = torch.cat([old[..., :start], new, old[..., stop:]], dim=-1)
    if place.end == "input":
        envoy.input = new
    elif place.part is not None:
        envoy.output = type(whole)(**{**whole, place.part: new})
    else:
        envoy.output = with_first(whole, new)


@no_type_check
def value_of(x, place, held):
    """The value of a site, from the tensor x at its place. held: the values of earlier sites by name."""
    x = x if place.factor == 1.0 else place.factor * x
    return x if place.less is None else x - held[place.less].to(x)


@no_type_check
def put(root, place, there, value, new):
    """Give a site a new value. there: the tensor that its place holds. If the site's value is computed from ``there``,
    the value's change is added to ``there``: a change of 0 then leaves the model bit-equal."""
    if place.factor == 1.0 and place.less is None:
        write(root, place, new)
    else:
        write(root, place, there + ((new.to(value) - value) / place.factor).to(there))


@no_type_check
def through(root, steps, tokens, found, held=None):
    """Take the steps (``Step``, plain) of a pass, in the order in which the model computes their sites. ``found`` gets
    what each read returns, by name. held: what earlier steps of this pass have read, where they were taken apart."""
    held = {} if held is None else held
    for step in steps:
        there = read(root, step.place, tokens.ids.shape[1])
        x = value_of(there, step.place, held)
        if step.change is not None:
            put(root, step.place, there, x, step.change(x, tokens, *[held[name] for name in step.needs]))
            continue
        # A copy: some models change tensors in place, as Falcon does with its MLP's output.
        held[step.name] = x.to(torch.float32, copy=True)
        if step.keep is not None:
            found[step.name] = step.keep(held[step.name], tokens)


@no_type_check
def whole(x, tokens):
    """The whole activation."""
    return x


@no_type_check
def real(x, tokens):
    """The rows of real tokens, "tokens d", without padding."""
    return x[tokens.mask.to(x.device)]


@no_type_check
def last(x, tokens):
    """The last position, "batch d" float32 on the CPU."""
    return x[:, -1].float().cpu()


@no_type_check
def counting_tokens(ids, positions, special, skip_first):
    """The part of a TokenMask that needs no activations: True at tokens that are neither special nor first."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    if special:
        keep &= ~torch.isin(ids, torch.tensor(special, device=ids.device))
    return keep & (positions != 0) if skip_first else keep


@no_type_check
def packed(x, tokens, special, skip_first, limit, scale):
    """ "x": the real tokens that count, as a store keeps them: x/scale in half precision, or in float32 where a value
    overflows; and "keep": which of the real tokens they are."""
    rows = x[tokens.mask.to(x.device)].float()
    ids, positions = tokens.ids[tokens.mask], tokens.positions[tokens.mask]
    keep = counting_tokens(ids, positions, special, skip_first)
    norms = rows.norm(dim=-1)
    keep &= ~((norms > limit) & norms.isfinite()).cpu()  # harvest refuses activations that are not finite
    kept = rows[keep.to(x.device)]
    fits = bool((kept.abs() <= 6e4 * scale).all())
    return {"keep": keep, "x": ((kept / scale).half() if fits else kept).cpu()}


@no_type_check
def token_losses(logits, tokens):
    """Loss of each token given the ones before it, nats, "batch pos"; NaN at position 0 and padding."""
    losses = torch.full(tokens.ids.shape, float("nan"))
    targets = tokens.ids[:, 1:, None].to(logits.device)
    for row in range(len(losses)):  # a copy of all would cost more
        scores = logits[row, :-1].float()
        losses[row, 1:] = (scores.logsumexp(-1) - scores.gather(-1, targets[row])[:, 0]).cpu()
    return losses.masked_fill(~tokens.mask.cpu(), float("nan"))


@no_type_check
def slope(logits, tokens, there, metric):
    """The gradient of the metric, summed over rows, with respect to an earlier activation ``there``."""
    return torch.autograd.grad(metric(logits.float(), tokens).sum(), [there])[0].float()


@no_type_check
def decode(last_logits, ids, new, ends, temperature, generator):
    """The next tokens of rows of one length, a list per pass; -1 for a row that has met an end token. last_logits: (all
    ids so far "batch pos", number of the pass) -> logits of the next token, "batch vocab"."""
    done = torch.zeros(len(ids), dtype=torch.bool)
    for number in range(new):
        token = pick(last_logits(ids, number), temperature, generator)
        done |= torch.tensor([t in ends for t in token.flatten().tolist()])
        if bool(done.all()):
            return
        yield [-1 if end else t for t, end in zip(token.flatten().tolist(), done.tolist(), strict=True)]
        ids = torch.cat([ids, token.to(ids)], dim=1)


@no_type_check
def pick(logits, temperature, generator):
    """The next token of each row, "batch 1": the likeliest at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@no_type_check
def last_logits_there(ids, number, *, root, steps, rows, past):
    """``last_logits`` for ``decode`` in a session on a server, with the key-value cache ``past``. steps: see
    ``through``; rows: the numbers of these rows among the user's prompts."""
    import nnsight

    begin = ids.shape[1] - 1 if number else 0
    part = ids[:, begin:]
    positions = torch.arange(begin, ids.shape[1]).expand_as(part)
    real = torch.ones_like(part, dtype=torch.bool)
    tokens = SimpleNamespace(ids=part, mask=real, positions=positions, row_numbers=rows, step=number)
    scores = None
    with root.trace({"input_ids": part, "past_key_values": past, "use_cache": True, "logits_to_keep": 1}):
        through(root, steps, tokens, {})
        scores = nnsight.save(root.output.logits[:, -1].float().cpu())
    return scores


@no_type_check
def embedded(root, ids, path, size):
    """Input embeddings of ids, centred on the mean over all of them."""
    embed, total = envoy_at(root, path), 0.0
    for part in torch.arange(size).split(8192):
        total = total + embed(part).double().sum(0)
    return (embed(ids).double() - total / size).float().cpu()


@no_type_check
def lens(root, x, w_o, way, head, of):
    """Logits of directions x, or ``of(logits)``. w_o: (path of W_O, its input width, the columns of that input which x
    fills) if x is written before W_O, else None. way: paths of the norms and linear maps between stream and head."""
    logits = linear(envoy_at(root, head), before_head(root, x, w_o, way))
    return logits if of is None else of(logits)


@no_type_check
def before_head(root, x, w_o, way):
    """Directions mapped to what W_U reads, without the norms' divisions. Arguments: see ``lens``."""
    if w_o is not None:
        path, width, columns = w_o
        full = torch.zeros(len(x), width)
        full[:, slice(None) if columns is None else slice(columns[0], columns[1])] = x.cpu()
        x = linear(envoy_at(root, path), full)
    for path in way:
        x = past(envoy_at(root, path), x)
    return x


@no_type_check
def called(module, x):
    """A module's outputs for rows, in float32 on the CPU; the module gets them in its own device and dtype."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        x = x.to(weight if weight.is_floating_point() else weight.device)
    return first_tensor(module(x.unsqueeze(0)))[0].float().cpu()


@no_type_check
def linear(module, x):
    """Directions through a linear module, without its bias."""
    bias = called(module, torch.zeros_like(x[:1]))
    return called(module, x) - bias if bool(bias.any()) else called(module, x)


@no_type_check
def past(module, x):
    """Directions through a linear map, or through a norm's gain and centring, without its division. The module's kind,
    its gain (Gemma's is 1+w) and whether it centres are told from its outputs."""
    width = x.shape[-1]
    i = torch.arange(width)
    probe = (1.0 - 2.0 * (i % 2)) * (1.0 + (0.618 * i) % 1.0)  # of both signs, and no entry is small
    answers = called(module, torch.stack([probe, 2 * probe, probe + 3.0, torch.zeros(width)]))
    once, twice, moved = answers[:3] - answers[3]
    if bool((twice - 2 * once).norm() < 0.02 * once.norm()):
        return linear(module, x)
    if answers.shape[-1] != width or bool((twice - once).norm() > 0.02 * once.norm()):
        raise ValueError("a module between the last layer and the head is neither a norm nor linear")
    centres = bool((moved - once).norm() < 0.02 * once.norm())
    flat = probe - probe.mean() if centres else probe
    gain = once / (flat / flat.square().mean().sqrt())
    x = x.float().cpu()
    return (x - x.mean(-1, keepdim=True) if centres else x) * gain
