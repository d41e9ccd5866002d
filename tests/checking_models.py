"""One model checked: what sae_lab says of it, held against plain PyTorch hooks.

    from checking_models import check
    result = check("llama")          # a name of tiny_models.NAMES
    result.verdict, result.findings

Verdicts: "right" (in everything), "refused" (as a whole, by a rule that plain hooks bear out), "WRONG" (a number),
"UNCLEAR" (an error that is no sentence of this library with a remedy), "UNFAIR" (a refusal of what plain hooks find),
"unbuilt". A kind that is refused at a layer where plain hooks find no tensor of its meaning is no finding.
"""

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checking_way_out import WayOut
from plain_blocks import Layer
from plain_hooks import FITS, Edits, Event, Point, adds, run, same
from plain_model import Plain
from tiny_models import UNBUILT, build, tokenizer
from torch import Tensor

import sae_lab as sl
from sae_lab.types import KINDS, LAYER_KINDS, Site, Write

PROMPT = "The quick brown fox"
ROWS = [PROMPT, "Yes.", "In March the ice"]
TEXTS = [
    "The river rose in March, and the ice went out with it.", "No one saw the boats before the bridge gave way.",
    "They rebuilt it in stone, and paid for it with a toll.", "On market days the queue went back to the mill.",
]  # fmt: skip
PARTS = ("reads", "edits", "gradients", "generation", "rows", "lens", "direct", "evals")
NEW = 8  # tokens to generate
CLOSE = 1e-4  # of the largest logit: two ways to compute the same in float32


class Finding(NamedTuple):
    """kind: "WRONG", "UNCLEAR", "UNFAIR", or "refused" where the refusal is fair."""

    kind: str
    what: str
    text: str


class Refused(str):
    """The sentence of a ValueError of this library."""


@dataclass
class Result:
    name: str
    findings: list[Finding] = field(default_factory=list)
    kinds: dict[str, list[int]] = field(default_factory=dict)
    layers: int = 0
    attention: bool = False
    whole: str = ""  # why the model is refused, or not built
    done: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        for kind in ("WRONG", "UNCLEAR", "UNFAIR"):
            if any(f.kind == kind for f in self.findings):
                return kind
        return "unbuilt" if self.name in UNBUILT else "refused" if self.whole else "right"


class Add:
    """An edit: a vector added at a site, at every token."""

    def __init__(self, site: Site, by: Tensor):
        self.site, self.by = site, by

    def writes(self, lm: Any, batch: Any, new: int = 0) -> list[Write]:
        return [Write(self.site, lambda x, tokens: x + self.by.to(x))]


def check(name: str, parts: tuple[str, ...] = ()) -> Result:
    """All checks of one model, or only some of PARTS."""
    result = Result(name)
    if name in UNBUILT:
        result.whole = UNBUILT[name]
        return result
    with torch.random.fork_rng(devices=[]):
        Checker(result, build(name)).everything(parts)
    return result


class Checker(WayOut):
    prompt = PROMPT

    def __init__(self, result: Result, module: Any):
        self.result, self.module, self.tokenizer, self.by_rule = result, module, tokenizer(), ""

    # ---- asking

    def found(self, kind: str, what: str, text: str) -> None:
        if kind == "UNFAIR" and self.by_rule:
            kind, text = "refused", f"{text} [{self.by_rule}]"
        self.result.findings.append(Finding(kind, what, " ".join(str(text).split())[:400]))

    def ask(self, what: str, fn: Callable[[], Any]) -> Any:
        """What a call gives; Refused; or None, with a finding, where it ends in another error."""
        try:
            return fn()
        except Exception as error:
            text = str(error)
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            ours = isinstance(error, ValueError) and f"{Path(sl.__file__).parent}/" in last
            if ours and (":" in text or ";" in text) and 25 <= len(text) <= 900:
                return Refused(text)
            where = "/".join(Path(last).parts[-3:])
            self.found("UNCLEAR", what, f"{type(error).__name__} from {where}: {text}")
            return None

    def must(self, what: str, fn: Callable[[], Any], fair: str = "") -> Any:
        """What a call gives, else None; a refusal is unfair unless there is a reason for it."""
        got = self.ask(what, fn)
        if isinstance(got, Refused):
            self.found("refused" if fair else "UNFAIR", what, f"{got} [{fair}]" if fair else got)
            return None
        return got

    def equal(self, what: str, got: Tensor, want: Tensor, limit: float = CLOSE) -> None:
        if got.shape != want.shape:
            self.found("WRONG", what, f"shape {tuple(got.shape)}, by plain hooks {tuple(want.shape)}")
        elif not same(got, want, limit):
            off = float((got - want).abs().max() / want.abs().max().clamp(min=1e-9))
            self.found("WRONG", what, f"off by {off:.2g} of the largest entry")

    def coder_at(self, site: Site) -> Any:
        torch.manual_seed(0)
        coder = sl.TopK(self.lm.width(site), 64, k=8).eval()
        coder.reads = coder.writes = (site,)
        coder.f_scale = torch.ones(64)
        return coder

    # ---- all of it

    def everything(self, parts: tuple[str, ...] = ()) -> None:
        ids = torch.tensor([[1] + self.tokenizer(PROMPT)["input_ids"]])
        self.plain = plain = Plain(self.module, ids)
        self.result.attention = any(layer.matrices for layer in plain.layers)
        self.by_rule = self.rule()
        lm = self.ask("LM", lambda: sl.LM(self.module, tokenizer=self.tokenizer, prefix=1, device="cpu"))
        if isinstance(lm, Refused):
            self.result.whole = lm
            self.found("UNFAIR", "LM", lm)
        if lm is None or isinstance(lm, Refused):
            return
        self.lm = lm
        self.result.layers = lm.n_layers
        got = self.must("logits", lambda: lm.logits(PROMPT))
        if got is None:
            return
        self.base = got
        self.equal("logits", got, plain.logits, 1e-6)
        if not plain.causal:
            self.found("WRONG", "LM", "accepted, but a token's logits depend on later tokens")
            return
        self.offered()
        for name in PARTS:
            if not parts or name in parts:
                try:
                    getattr(self, name)()
                except Exception:
                    self.found("UNCLEAR", f"the check itself: {name}", traceback.format_exc()[-350:])
                self.result.done.append(name)

    def rule(self) -> str:
        """The rule by which a model may be refused as a whole, or ""."""
        config = self.module.config
        if not self.plain.causal:
            return "encoder"
        if getattr(config, "is_encoder_decoder", False) or any(
            hasattr(config, key) for key in ("encoder_layers", "num_encoder_layers", "cross_attention_hidden_size")
        ):
            return "encoder-decoder"
        if set(getattr(config, "sub_configs", {})) - {"attn_config", "ffn_config"}:
            return "multimodal"
        blocks = self.plain.modules[self.plain.layers[0].path.rpartition(".")[0]] if self.plain.layers else []
        if len(blocks) > len(self.plain.layers):
            return "multimodal"  # blocks that do not run from text alone
        return self.plain.why

    # ---- what is offered

    def offered(self) -> None:
        """Every kind at every layer: read, or refused; and whether a refusal is fair."""
        plain, self.acts = self.plain, {}
        numbers = {layer.number: layer for layer in plain.layers}
        if plain.layers and self.lm.n_layers <= max(numbers):
            self.found("UNFAIR", "layers", f"{self.lm.n_layers} layers, by plain hooks {len(plain.layers)}")
        for kind in KINDS:
            for number in range(self.lm.n_layers) if kind in LAYER_KINDS else [None]:
                site = Site(kind, number)
                layer = numbers.get(number)
                want = self.meaning(kind, layer)
                got = self.ask(f"read {site.key}", lambda site=site: self.lm.read(PROMPT, site)[site])
                if isinstance(got, Refused):
                    fair = not want
                    self.found("refused" if fair else "UNFAIR", f"read {site.key}", got)
                elif got is not None:
                    self.acts[kind, number] = got
                    self.result.kinds.setdefault(kind, []).append(-1 if number is None else number)
        self.layers = {n: layer for n, layer in numbers.items() if n < self.lm.n_layers}
        # Layers that stand for others like them: the first of each make, and the last.
        makes: dict[Any, int] = {}
        for n, layer in self.layers.items():
            offered = tuple(kind for kind in LAYER_KINDS if (kind, n) in self.acts)
            makes.setdefault((layer.shape, bool(layer.matrices), offered), n)
        self.some = sorted({*makes.values(), max(self.layers, default=0)} & set(self.layers))

    def meaning(self, kind: str, layer: Layer | None) -> list[Tensor]:
        """The tensors that have a kind's meaning by plain hooks; [] where none has, or there are several."""
        if kind == "embed":
            table = self.module.get_input_embeddings()
            path = next((p for p, part in self.plain.modules.items() if part is table), "")
            return [e.tensor for e in self.plain._at(path, "output")][:1]
        if layer is None:
            return []
        if kind in ("attn_out", "attn_z") and not layer.matrices:
            return []  # no softmax attention
        if not kind.startswith("resid_p") and len(layer.matrices) > 1:
            return []  # several
        return {
            "resid_pre": [layer.pre], "resid_post": [layer.post], "resid_mid": layer.middles,
            "attn_out": [part.added for part in layer.attention], "mlp_out": [part.added for part in layer.mlp],
            "attn_z": [e.tensor for e in layer.w_o], "mlp_in": [e.tensor for e in layer.mlp_in] if layer.mlp else [],
        }[kind]  # fmt: skip

    # ---- reads

    def reads(self) -> None:
        a = self.acts
        if not self.plain.layers and (offered := [kind for kind in self.result.kinds if kind != "embed"]):
            self.found("WRONG", "kinds", f"{', '.join(offered)} offered, though {self.plain.why}")
            return
        for (kind, n), got in a.items():
            want = self.meaning(kind, self.layers.get(n) if n is not None else None)
            limit = 1e-6 if kind in ("embed", "resid_pre", "resid_post", "attn_z", "mlp_in") else 2e-5
            if want and not any(same(got, x.reshape(got.shape), limit) for x in want if x.numel() == got.numel()):
                self.found("WRONG", f"read {kind}-{n}", "another tensor than plain hooks find")
            if not want and kind in ("attn_z", "mlp_in") and not self.goes_in(self.layers[n], got):
                self.found("WRONG", f"read {kind}-{n}", "goes into no module of this block")
        for n in self.layers:
            here = {kind: a.get((kind, n)) for kind in LAYER_KINDS}
            pre, mid, post = here["resid_pre"], here["resid_mid"], here["resid_post"]
            if post is not None and (following := a.get(("resid_pre", n + 1))) is not None:
                self.equal(f"resid_post-{n} = resid_pre-{n + 1}", post, following, 1e-6)
            if pre is None or post is None:
                continue
            parts = [x for x in (here["attn_out"], here["mlp_out"]) if x is not None]
            if mid is not None and here["attn_out"] is not None:
                self.sums(f"resid_pre + attn_out = resid_mid at {n}", pre + here["attn_out"], mid, pre)
            if mid is not None and here["mlp_out"] is not None:
                self.sums(f"resid_mid + mlp_out = resid_post at {n}", mid + here["mlp_out"], post, pre)
            if mid is None and len(parts) == 2:
                self.sums(f"resid_pre + attn_out + mlp_out = resid_post at {n}", pre + sum(parts), post, pre)
            if mid is None and len(parts) == 1 and self.layers[n].shape == "single":
                self.sums(f"resid_pre + {parts and 'what is added'} = resid_post at {n}", pre + parts[0], post, pre)
            self.heads(n)

    def sums(self, what: str, got: Tensor, want: Tensor, stream: Tensor) -> None:
        if float((got - want).norm()) > FITS * float(stream.norm()):
            self.found("WRONG", what, f"off by {float((got - want).norm() / stream.norm()):.2g} of the stream's norm")

    def goes_in(self, layer: Layer, x: Tensor) -> list[Event]:
        return [e for e in layer.events if e.point.end == "input" and e.tensor.numel() == x.numel()
                and same(e.tensor.flatten(), x.flatten())]  # fmt: skip

    def heads(self, n: int) -> None:
        """Heads side by side are attn_z, and there are as many as attention has rows of weights."""
        layer, z = self.layers[n], self.acts.get(("attn_z", n))
        if z is None or not layer.matrices or n not in self.some:
            return
        count = layer.matrices[0].shape[0]
        sites = [Site("attn_z", n, head=h) for h in range(count)]
        parts = self.must(f"heads at {n}", lambda: self.lm.read(PROMPT, sites))
        if parts is not None:
            self.equal(f"heads side by side at {n}", torch.cat([parts[s] for s in sites], -1), z, 1e-6)

    # ---- edits

    def edits(self) -> None:
        for (kind, n), x in self.acts.items():
            if n is not None and n not in self.some:
                continue
            site = Site(kind, n)
            by = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(3)) * x.std()
            plain = self.plainly(kind, self.layers.get(n) if n is not None else None, x, by)
            if plain is None:
                continue
            want = run(self.module, self.plain.ids, plain)[0]
            got = self.must(f"edit {site.key}", lambda site=site, by=by: self.lm.logits(PROMPT, edits=[Add(site, by)]))
            if got is not None:
                self.equal(f"edit {site.key}", got, want)
                if same(got, self.base, 1e-6) and not same(want, self.base, 1e-6):
                    self.found("WRONG", f"edit {site.key}", "no effect")
            zero = 0 * by
            got = self.ask(f"no-op {site.key}", lambda site=site, z=zero: self.lm.logits(PROMPT, edits=[Add(site, z)]))
            if isinstance(got, Tensor) and not torch.equal(got, self.base):
                self.found("WRONG", f"no-op {site.key}", "logits are not bit-equal")
            if kind == "attn_z" and plain:
                self.one_head(site, plain[0][0])

    def one_head(self, site: Site, point: Point) -> None:
        layer = self.layers[site.layer]
        head = Site("attn_z", site.layer, head=1)
        width = self.acts["attn_z", site.layer].shape[-1] // layer.matrices[0].shape[0] if layer.matrices else 0
        if not width or layer.matrices[0].shape[0] < 2:
            return
        by = torch.randn(width, generator=torch.Generator().manual_seed(4))
        whole = torch.zeros(self.acts["attn_z", site.layer].shape[-1])
        whole[width : 2 * width] = by
        want = run(self.module, self.plain.ids, [(point, adds(whole))])[0]
        got = self.must(f"edit {head.key}", lambda: self.lm.logits(PROMPT, edits=[Add(head, by)]))
        if got is not None:
            self.equal(f"edit {head.key}", got, want)

    def plainly(self, kind: str, layer: Layer | None, x: Tensor, by: Tensor) -> Edits | None:
        """The same edit by plain hooks, in the stream where it can be; None where hooks cannot say."""
        if kind == "embed":
            table = self.module.get_input_embeddings()
            path = next(p for p, part in self.plain.modules.items() if part is table)
            return [(self.plain._at(path, "output")[0].point, adds(by))]
        assert layer is not None
        end = (layer.end, adds(by))
        if kind == "resid_pre":
            return [(layer.start, adds(by))]
        if kind in ("resid_post", "mlp_out"):  # what the MLP adds is added to the stream behind the block
            return [end]
        if kind in ("attn_out", "resid_mid") and layer.attention:
            part = layer.attention[0]
            return [(part.point, adds(by / part.factor))]
        into = self.goes_in(layer, x)
        if kind == "resid_mid":
            return [*((e.point, adds(by)) for e in self.outermost(layer, into)), end]
        if kind == "attn_out":
            return [end] if layer.shape == "single" else None
        if kind == "attn_z":
            leaf = [e for e in into if self.plain.parts.leaf(e.point.path)]
            return [((layer.w_o or leaf or into)[0].point, adds(by))] if layer.w_o or into else None
        return [(e.point, adds(by)) for e in self.outermost(layer, into)] if into else None

    def outermost(self, layer: Layer, events: list[Event]) -> list[Event]:
        """Of the modules that read a tensor, those that are in no other of them, have no part in attention, and take it
        as their first argument: the stream itself goes as another one into some that add to it."""
        events = [e for e in events if e.point.slot[0] == 1 or e.point.slot == (0, 0)]
        paths = [e.point.path for e in events]
        about = [p for p in paths for a in layer.attends if f"{p}.".startswith(f"{a}.") or f"{a}.".startswith(f"{p}.")]
        return [e for e in events if e.point.path not in about and not any(
            e.point.path.startswith(f"{p}.") for p in paths)]  # fmt: skip

    def gradients(self) -> None:
        """The gradient of one logit by what stands at a site, beside autograd's by what is added there."""
        tokens = self.plain.ids.shape[1]
        batch = self.lm.tokenize(PROMPT)
        for (kind, n), x in self.acts.items():
            if n is not None and n != self.some[0]:
                continue
            by = torch.zeros(1, tokens, x.shape[-1], requires_grad=True)
            plain = self.plainly(kind, self.layers.get(n) if n is not None else None, x, by)
            if not plain:
                continue
            try:
                run(self.module, self.plain.ids, plain, grad=True)[0][0, -1, 7].backward()
            except Exception:  # Reformer's blocks have gradients in training only
                return
            self.module.zero_grad(set_to_none=True)
            site, metric = Site(kind, n), lambda logits, tokens: logits[:, -1, 7]
            got = self.ask(f"gradient {site.key}", lambda s=site, x=x, m=metric: self.lm.gradient(batch, s, m, x))
            if isinstance(got, Refused):  # of what is read as a difference of two tensors
                self.found("refused", f"gradient {site.key}", got)
            elif got is not None and by.grad is not None:
                self.equal(f"gradient {site.key}", got, by.grad, 1e-3)

    # ---- generation, rows

    def generation(self) -> None:
        site = Site("resid_post", 1) if ("resid_post", 1) in self.acts and 1 in self.layers else None
        cases: list[tuple[str, list[Any], Edits]] = [("generate", [], [])]
        if site is not None:
            x = self.acts["resid_post", 1]
            by = 2 * x.std() * torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(6))
            cases.append(("generate with an edit", [Add(site, by)], [(self.layers[1].end, adds(by))]))
        for kind in ("attn_z", "mlp_out"):
            n = max((n for n in self.layers if (kind, n) in self.acts), default=None)
            if n is not None:
                x = self.acts[kind, n]
                by = x.std() * torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(6))
                plain = self.plainly(kind, self.layers[n], x, by)
                cases.append((f"generate with an edit at {kind}", [Add(Site(kind, n), by)], plain or []))
        for what, edits, plain in cases:
            said, sure = self.plain.greedy(NEW, plain)
            if not sure:
                continue
            said = said[: said.index(2)] if 2 in said[:sure] else said[:sure]
            got = self.ask(what, lambda e=edits, n=sure: self.lm.generate(PROMPT, edits=e, max_new_tokens=n))
            if isinstance(got, Refused):
                self.found("refused", what, got)
                continue
            want = self.tokenizer.decode(self.plain.ids[0].tolist() + said, skip_special_tokens=True)
            if got is not None and got != want:
                self.found("WRONG", what, f"{got[len(PROMPT) :]!r}, the argmax without a cache {want[len(PROMPT) :]!r}")
        alone = [self.ask("generate", lambda row=row: self.lm.generate(row, max_new_tokens=4)) for row in ROWS]
        together = self.ask("generate of several", lambda: self.lm.generate(ROWS, max_new_tokens=4))
        if isinstance(together, list) and together != alone:
            self.found("WRONG", "generate of several", f"{together}, alone {alone}")

    def rows(self) -> None:
        together = self.must("rows", lambda: self.lm.logits(ROWS))
        if together is None:
            return
        for i, row in enumerate(ROWS):
            ids = torch.tensor([[1] + self.tokenizer(row)["input_ids"]])
            want = run(self.module, ids)[0][0]
            self.equal(f"row {i} of a batch", together[i, : len(want)], want)

    # ---- evals

    def evals(self) -> None:
        """A coder's edits, reconstruction and a harvest, where the stream is offered."""
        if ("resid_post", 1) not in self.acts:
            return
        site = Site("resid_post", 1)
        coder = self.coder_at(site)
        got = self.must("steer 0", lambda: self.lm.logits(PROMPT, edits=[sl.Steer(coder, 3, strength=0)]))
        if got is not None and not torch.equal(got, self.base):
            self.found("WRONG", "steer 0", "logits are not bit-equal")
        got = self.must("reconstruction", lambda: sl.evals.reconstruction(coder, self.lm, TEXTS, tokens=60, context=16))
        if got is not None and not torch.isfinite(torch.tensor(got.fvu)):
            self.found("WRONG", "reconstruction", f"FVU {got.fvu}")
        with tempfile.TemporaryDirectory() as folder:
            settings = {"tokens": 60, "context": 16, "path": f"{folder}/store"}
            store = self.must("harvest", lambda: sl.harvest(self.lm, site, TEXTS, **settings))
            if store is not None and len(store) < 40:
                self.found("WRONG", "harvest", f"{len(store)} tokens")
