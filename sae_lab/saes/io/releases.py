"""Published coders by the names people know, and any hub repository: which files, and what they do not say themselves.

    sl.load("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    sl.load("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    sl.load("EleutherAI/sae-llama-3-8b-32x", "layers.24")

Names and ids are SAELens's. An id is a folder (or file) of the release's repository, by a rule or a table.
"""

import contextlib
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sae_lab import cache
from sae_lab.saes.io.peers import FILES, OURS, coders_in, format_of, home, named


@dataclass(frozen=True)
class Release:
    """repo: on the hub. format: of ``peers.FILES``, or "file". ids: a table id -> path, or rules (pattern of ids,
    template of paths, an example). facts: what readers are told; of one id where the key is the id."""

    repo: str
    format: str
    ids: Mapping[str, str] | tuple[str, str, str] | list[tuple[str, str, str]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def path(self, id: str) -> str | None:
        """The path of an id in the repository, None for an unknown id."""
        if isinstance(self.ids, Mapping):
            return self.ids.get(id)
        found = (match.expand(path) for pattern, path, _ in self._rules() if (match := re.fullmatch(pattern, id)))
        return next(found, None)

    def _rules(self) -> list[tuple[str, str, str]]:
        return self.ids if isinstance(self.ids, list) else [self.ids] if isinstance(self.ids, tuple) else []

    def known(self) -> list[str]:
        return list(self.ids) if isinstance(self.ids, Mapping) else [example for _, _, example in self._rules()]


# Gemma Scope 1: of each layer's coders the one with L0 nearest 100 is called canonical. By release and width: the L0 of
# layers 0, 1, ..., or {layer: L0}.
CANONICAL: dict[str, dict[str, str | dict[int, int]]] = {
    "2b-pt-res": {
        "16k": "105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116",
        "65k": "73 121 77 89 89 105 107 107 111 118 128 70 72 75 73 127 128 125 116 115 114 111 116 123 124 93",
        "1m": {5: 114, 12: 107, 19: 88}, "262k": {12: 121}, "32k": {12: 76}, "524k": {12: 115},
    },
    "2b-pt-mlp": {
        "16k": "119 105 95 95 85 114 133 60 136 88 110 98 108 112 97 80 72 68 106 109 109 113 121 128 73 126",
        "65k": "72 127 134 68 66 86 101 115 110 77 95 88 96 98 89 72 66 136 88 88 88 86 92 102 128 107",
    },
    "2b-pt-att": {
        "16k": "104 79 93 117 116 135 61 99 129 127 70 80 85 92 71 98 71 79 72 122 62 65 106 73 96 77",
        "65k": "75 98 125 83 87 99 112 96 112 107 67 75 79 87 66 90 129 70 123 106 102 118 112 140 77 63",
    },
    "9b-pt-res": {
        "16k": "129 69 67 90 91 77 93 92 99 100 113 118 130 132 67 131 75 73 71 132 68 129 123 120 114 114 116 118 119 "
               "119 120 114 111 114 114 120 120 124 128 131 125 113",
        "131k": "41 56 70 103 101 94 120 119 72 75 84 88 96 99 105 103 121 117 113 110 114 109 105 101 97 96 97 96 98 "
                "97 95 92 88 91 89 94 93 96 101 99 94 84",
        "1m": {9: 122, 20: 101, 31: 77}, "32k": {20: 57}, "524k": {20: 48}, "65k": {20: 55},
    },
    "9b-pt-mlp": {
        "16k": "50 128 81 126 66 93 96 101 124 83 114 76 96 94 97 107 91 104 89 98 108 88 85 73 73 72 142 126 115 111 "
               "116 94 98 107 107 108 109 119 98 90 74 126",
        "131k": "30 106 61 109 84 131 72 75 89 129 83 120 77 75 80 89 81 91 82 85 93 79 77 67 67 65 110 99 91 87 89 77 "
                "76 83 82 80 81 90 79 75 125 99",
    },
    "9b-pt-att": {
        "16k": "61 77 69 102 126 125 108 70 65 71 132 67 68 77 81 79 81 110 80 86 76 86 70 80 79 73 75 136 71 76 73 73 "
               "74 78 91 77 69 82 81 77 91 129",
        "131k": "55 116 135 119 75 78 73 106 98 111 97 104 110 126 131 130 71 90 69 71 125 71 115 66 130 115 120 102 "
                "115 128 109 117 117 128 63 124 105 124 135 120 64 92",
    },
    "9b-it-res": {"16k": {9: 88, 20: 91, 31: 76}, "131k": {9: 121, 20: 81, 31: 109}},
    "27b-pt-res": {"131k": {10: 106, 22: 82, 34: 72}},
}  # fmt: skip
# Mean norms were folded into no weights: SAELens's factors for x.
_MLP_TM_SCALE = (
    1.049317316132615, 2.3693984005104283, 1.6411934982190302, 1.8958522157897557, 1.81673478700627, 1.550234472245924,
    1.3237742807210804, 1.1042905114723296, 0.9123762783479742, 0.6955335635232373, 0.3619728926727644,
    0.2851548652550073,
)  # fmt: skip


def _gemma_scope() -> dict[str, Release]:
    found = {}
    for name, widths in CANONICAL.items():
        repo, ids = f"google/gemma-scope-{name}", {}
        for width, l0s in widths.items():
            by_layer = l0s if isinstance(l0s, dict) else dict(enumerate(l0s.split()))
            for layer, l0 in by_layer.items():
                ids[f"layer_{layer}/width_{width}/canonical"] = f"layer_{layer}/width_{width}/average_l0_{l0}"
        some = next(iter(ids.values()))
        found[f"gemma-scope-{name}"] = Release(
            repo, "gemma_scope", (r"((?:layer_\d+|embedding)/width_\w+/average_l0_\d+)", r"\1", some)
        )
        found[f"gemma-scope-{name}-canonical"] = Release(repo, "gemma_scope", ids)
    rule = (r"(layer_\d+/width_\w+/average_l0_\d+)", r"\1", "layer_0/width_16k/average_l0_76")
    found["gemma-scope-2b-pt-transcoders"] = Release("google/gemma-scope-2b-pt-transcoders", "gemma_scope", rule)
    return found


def _gemma_scope_2() -> dict[str, Release]:
    found, coder = {}, r"(layer_\d+_width_\w+_l0_\w+)"
    folders = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoders": "transcoder"}
    for size in ("270m", "1b", "4b", "12b", "27b"):
        for kind in ("pt", "it"):
            model = f"google/gemma-3-{size}" + ("" if (size, kind) == ("270m", "pt") else f"-{kind}")
            for what, folder in folders.items():
                if (size, kind) == ("27b", "pt") and what in ("mlp", "att"):
                    continue
                for every in ("", "_all"):
                    if (size, kind, what, every) == ("27b", "pt", "transcoders", ""):
                        continue
                    prefix = f"(?:{folder}{every}/)?"
                    some = f"{'transcoder/' if (what, every) == ('transcoders', '') else ''}layer_12_width_16k_l0_small"
                    found[f"gemma-scope-2-{size}-{kind}-{what}{every.replace('_', '-')}"] = Release(
                        f"google/gemma-scope-2-{size}-{kind}", "gemma_scope_2",
                        (prefix + coder, rf"{folder}{every}/\1", some), {"model": model},
                    )  # fmt: skip
    return found


def _scopes() -> dict[str, Release]:
    found = {}
    for part in "ram":
        for times in ("8x", "32x"):
            name = f"Llama3_1-8B-Base-L{{}}{part.upper()}-{times}"
            rule = (rf"l(\d+){part}_{times}", name.format(r"\1"), f"l15{part}_{times}")
            found[f"llama_scope_lx{part}_{times}"] = Release(f"fnlp/{name.format('X')}", "llama_scope", rule)
    for model, w50, w100 in (
        ("3-1.7b-base", 32, 32), ("3-8b-base", 64, 64), ("3-30b-a3b-base", 32, 128), ("3.5-2b-base", 32, 32),
        ("3.5-9b-base", 64, 64), ("3.5-27b", 80, 80), ("3.5-35b-a3b-base", 32, 128),
    ):  # fmt: skip
        cased = "Qwen" + model.replace("b", "B").replace("Base", "base").replace("base", "Base").replace("a3B", "A3B")
        for width, k in ((w50, 50), (w100, 100)):
            rule = (r"(layer\d+)", r"\1.sae.pt", "layer12")
            repo = f"Qwen/SAE-Res-{cased}-W{width}K-L0_{k}"
            found[f"qwen-scope-{model}-w{width}k-l{k}"] = Release(repo, "file", rule)
    for model, layer, suffix, l0 in (("3.3-70B", 50, "pt", 121), ("3.1-8B", 19, "pth", 91)):
        stem = f"Llama-{model}-Instruct-SAE-l{layer}"
        found[f"goodfire-llama-{model.lower()}-instruct"] = Release(
            f"Goodfire/{stem}", "file", {f"layer_{layer}": f"{stem}.{suffix}"}, {"l0": float(l0)}
        )
    for model in ("llama-3.1-8b-instruct", "qwen2.5-7b-instruct", "gpt-oss-20b"):
        rule = (
            r"resid_post_layer_(\d+)_trainer_(\d+)",
            r"resid_post_layer_\1/trainer_\2",
            "resid_post_layer_11_trainer_1",
        )
        found[f"{model}-andyrdt"] = Release(f"andyrdt/saes-{model}", "dictionary_learning", rule)
    rules = [
        (rf"l(\d+)r_{id}", rf"{folder}/L\1R", f"l15r_{id}") for id, folder in (
            ("800m_slimpajama", "800M-Slimpajama-0-OpenR1-Math-220k"),
            ("400m_slimpajama_400m_openr1_math", "400M-Slimpajama-400M-OpenR1-Math-220k"),
            ("800m_openr1_math", "0-Slimpajama-800M-OpenR1-Math-220k"),
        )
    ]  # fmt: skip
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    found["llama_scope_r1_distill"] = Release("fnlp/Llama-Scope-R1-Distill", "lm_saes", rules, {"model": model})
    stem = "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    found["deepseek-r1-distill-llama-8b-qresearch"] = Release(
        f"qresearch/{stem}", "file", {"blocks.19.hook_resid_post": f"{stem}.pt"}
    )
    return found


def _saelens() -> dict[str, Release]:
    """Releases in SAELens's own format. ``centred``: as its table says, for the files of most do not."""

    def blocks(repo: str, hook: str, path: str, **facts: Any) -> Release:
        some = re.sub(r"[()]|\|.*", "", hook).replace(r"\d+", "768")
        facts = {"centred": False, **facts}
        return Release(repo, "saelens", (rf"blocks\.(\d+)\.{hook}", path, f"blocks.8.{some}"), facts)

    found = {
        "gpt2-small-res-jb": blocks(
            "jbloom/GPT2-Small-SAEs-Reformatted", "(hook_resid_pre|hook_resid_post)", r"blocks.\1.\2", centred=True
        ),
        "gpt2-small-res-jb-feature-splitting": blocks(
            "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8", r"(hook_resid_pre_\d+)", r"blocks.\1.\2",
            centred=True,
        ),
        "gpt2-small-mlp-tm": Release(
            "tommmcgrath/gpt2-small-mlp-out-saes", "saelens",
            {f"blocks.{n}.hook_mlp_out": f"sae_group_gpt2_blocks.{n}.hook_mlp_out_24576:v{version}"
             for n, version in enumerate("100000001002")},
            {"centred": True} | {f"blocks.{n}.hook_mlp_out": {"scale": s} for n, s in enumerate(_MLP_TM_SCALE)},
        ),
        "mistral-7b-res-wg": blocks(
            "JoshEngels/Mistral-7B-Residual-Stream-SAEs", "hook_resid_pre", r"mistral_7b_layer_\1",
            normalize="constant_norm_rescale",
        ),
        "llama-3-8b-it-res-jh": blocks(
            "Juliushanhanhan/llama-3-8b-it-res", "hook_resid_post", r"blocks.\1.hook_resid_post"
        ),
        "gemma-2b-it-res-jb": blocks(
            "jbloom/Gemma-2b-IT-Residual-Stream-SAEs", "hook_resid_post", r"gemma_2b_it_blocks.\1.hook_resid_post_16384"
        ),
        "gemma-2b-res-jb": Release(
            "jbloom/Gemma-2b-Residual-Stream-SAEs", "saelens",
            {f"blocks.{n}.hook_resid_post": f"gemma_2b_blocks.{n}.hook_resid_post_16384{more}"
             for n, more in ((0, "_anthropic"), (6, "_anthropic_fast_lr"), (10, ""), (12, ""), (17, ""))},
            {"centred": False, "blocks.12.hook_resid_post": {"scale": 0.21381938399317255}},
        ),
    }  # fmt: skip
    for what in ("sce", "scefr", "scl", "sle", "slefr", "sll"):
        repo = f"neuronpedia/gpt2-small__res_{what}-ajt"
        found[f"gpt2-small-res_{what}-ajt"] = blocks(repo, "hook_resid_pre", rf"\1-res_{what}-ajt")
    for width in ("32k", "128k"):
        for part in ("attn-out", "mlp-out", "resid-mid", "resid-post"):
            file = rf"v5_{width}_layer_\1" + (".pt" if (width, part) == ("32k", "resid-post") else "")
            found[f"gpt2-small-{part}-v5-{width}"] = blocks(
                f"jbloom/GPT2-Small-OAI-v5-{width}-{part}-SAEs", f"hook_{part.replace('-', '_')}", file
            )
    for part, hook in (("att", "hook_attn_out"), ("mlp", "hook_mlp_out"), ("res", "hook_resid_post")):
        repo = f"ctigges/pythia-70m-deduped__{part}-sm_processed"
        ids = {f"blocks.{n}.{hook}": f"{n}-{part}-sm" for n in range(6)}
        ids |= {"blocks.0.hook_resid_pre": "e-res-sm"} if part == "res" else {}
        found[f"pythia-70m-deduped-{part}-sm"] = Release(repo, "saelens", ids, {"centred": False})
    for model, l0, folder in (("gemma-2-2b", 40, "standard/"), ("gemma-2-9b", 60, ""), ("gemma-3-1b", 40, "")):
        repo = f"chanind/{model}-batch-topk-matryoshka-saes-w-32k-l0-{l0}"
        path = rf"{folder}blocks.\1.hook_resid_post"
        found[f"{model}-res-matryoshka-dc"] = blocks(repo, "hook_resid_post", path)
        if folder:
            snap = path.replace("standard", "snap")
            found[f"{model}-res-snap-matryoshka-dc"] = blocks(repo, "hook_resid_post", snap)
    return found


def _dictionary_learning() -> dict[str, Release]:
    """SAEBench's and its forerunner's. Steps of training lie in a folder beside the finished coders'."""
    found = {}

    def add(name: str, repo: str, folder: str, some: str, steps: bool = False) -> None:
        hook, some = r"blocks\.(\d+)\.hook_resid_post__", f"blocks.{some.replace(' ', '.hook_resid_post__')}"
        rules = [(hook + r"(trainer_\d+)", rf"{folder}/resid_post_layer_\1/\2", some)]
        if steps:
            path = rf"{folder}/resid_post_layer_\1_checkpoints/\2"
            rules.append((hook + r"(trainer_\d+_step_\d+)", path, f"{some}_step_0"))
        found[name] = Release(repo, "dictionary_learning", rules)

    for kind in ("topk", "vanilla"):
        for width in (12, 14, 16):
            folder = f"gemma-2-2b_{kind}_width-2pow{width}_date-1109"
            repo = f"canrager/saebench_gemma-2-2b_width-2pow{width}_date-1109"
            add(f"sae_bench_{folder}", repo, folder, "12 trainer_0", steps=width < 16)
    for folder in ("gated_ctx128_0730", "panneal_ctx128_0730", "standard_ctx128_0712", "topk_ctx128_0730"):
        some = {"panneal_ctx128_0730": 16, "standard_ctx128_0712": 10}.get(folder, 0)
        folder = f"pythia70m_sweep_{folder}"
        add(f"sae_bench_{folder}", "canrager/lm_sae", folder, f"3 trainer_{some}")
    for width, date, maker, folder in (
        (12, "0108", "adamkarvonen", "MatryoshkaBatchTopK_gemma-2-2b__0108"),
        (14, "0107", "canrager", "gemma-2-2b_matryoshka_batch_top_k_width-2pow14_date-0107"),
        (16, "0107", "canrager", "gemma-2-2b_matryoshka_batch_top_k_width-2pow16_date-0107"),
    ):
        name = f"saebench_gemma-2-2b_width-2pow{width}_date-{date}"
        add(name, f"{maker}/{name}", folder, "12 trainer_0")
    return found


def _transcoders() -> dict[str, Release]:
    """Sets of circuit-tracer, one file a layer. They read the MLP's input after the norm, with its gain."""
    found = {}
    for size in ("4b", "8b", "14b", "14b-lowl0", "1.7b-lowl0", "0.6b-lowl0"):
        size, _, low = size.partition("-")
        name = f"mwhanna/qwen3-{size}-transcoders{'-' if low else ''}{low}"
        facts = {"model": f"Qwen/Qwen3-{size.upper()}", "hooks": ("mlp.hook_in", "hook_mlp_out")}
        rule = (r"(layer_\d+)", r"\1.safetensors", "layer_12")
        found[name.replace("/", "-")] = Release(name, "file", rule, facts)
    return found


# gpt2-small-hook-z: a file's name holds the layer's penalty, width, threshold of death and version.
_HOOK_Z = (
    ("1.80e+00", 24576, "1.00e-06", 9), ("8.00e-01", 24576, "1.00e-06", 5), ("1.00e+00", 24576, "1.00e-06", 4),
    ("9.00e-01", 24576, "1.00e-06", 9), ("1.10e+00", 24576, "1.00e-06", 7), ("1.00e+00", 49152, "1.00e-06", 9),
    ("1.10e+00", 24576, "1.00e-06", 9), ("1.10e+00", 49152, "1.00e-06", 9), ("1.30e+00", 24576, "1.00e-05", 6),
    ("1.20e+00", 24576, "1.00e-06", 9), ("1.30e+00", 24576, "1.00e-05", 9), ("3.00e+00", 24576, "3.16e-06", 9),
)  # fmt: skip


def _hook_z() -> dict[str, Release]:
    ids, facts = {}, {}
    for layer, (penalty, width, dead, version) in enumerate(_HOOK_Z):
        id = f"blocks.{layer}.hook_z"
        facts[id] = {"hook_point": f"blocks.{layer}.attn.hook_z"}
        ids[id] = (
            f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03_l1{penalty}_ds{width}_bs4096_dc{dead}_rsanthropic_rie25000_nr4_"
            f"v{version}.pt"
        )
    return {"gpt2-small-hook-z-kk": Release("ckkissane/attn-saes-gpt2-small-all-layers", "file", ids, facts)}


RELEASES: dict[str, Release] = {
    **_saelens(), **_gemma_scope(), **_gemma_scope_2(), **_scopes(), **_dictionary_learning(), **_transcoders(),
    **_hook_z(),
}  # fmt: skip
_TEMPORAL = "temporal SAEs, whose codes of a token come from the tokens before it too"
_CLT = "a cross-layer transcoder (CLT), whose features write at several layers; SAELens adds its decoders up"
# Releases of SAELens's directory, and their repositories, that are no coders of one place and one token.
NOT_HERE = {
    "temporal-sae-gemma-2-2b": _TEMPORAL, "temporal-sae-llama-3.1-8b": _TEMPORAL, "canrager/temporalSAEs": _TEMPORAL,
    "mntss-gemma-2-2b-2.5m-clt-as-per-layer": _CLT, "mntss/clt-gemma-2-2b-2.5M": _CLT,
}  # fmt: skip


class Found(NamedTuple):
    """What to fetch: a folder or file of a repository, its format (None: to be seen), what readers are told."""

    repo: str
    path: str
    format: str | None
    facts: dict[str, Any]


def locate(name: str, id: str | None) -> Found | None:
    """A release's coder, or a repository's ("user/name"); None where the name is neither.

    Raises ValueError for an id that the release does not have, with near ones.
    """
    if name in NOT_HERE:
        raise ValueError(f"{name!r} holds {NOT_HERE[name]}: sl.load takes coders that read one place and write at one")
    if name not in RELEASES:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        path = (id or "").strip("/")
        same = [r for r in RELEASES.values() if r.repo == name]  # what is known of the repository holds here too
        known = {key: value for r in same for key, value in r.facts.items() if not isinstance(value, dict)}
        here = {"path": f"{name}/{path}", "hook": path.rsplit("/", 1)[-1], "listed": bool(same)}
        own = next((r.facts.get(i, {}) for r in same for i in _table(r) if r.path(i) == path), {})
        return Found(name, path, None, {**known, **own, **here})
    release = RELEASES[name]
    path = None if id is None else release.path(id)
    if id is None or path is None:
        near = difflib.get_close_matches(id or "", release.known(), n=5, cutoff=0.3) or release.known()[:5]
        raise ValueError(
            f"{name!r} has no coder with the id {id!r}: {'ids look like' if len(near) == 1 else 'near ones are'} "
            f"{', '.join(map(repr, near))}"
        )
    facts = {key: value for key, value in release.facts.items() if not isinstance(value, dict)}
    facts |= release.facts.get(id, {}) | {"path": f"{release.repo}/{path}", "listed": True}
    return Found(release.repo, path, release.format, facts)


def _table(release: Release) -> Mapping[str, str]:
    return release.ids if isinstance(release.ids, Mapping) else {}


def near(name: str) -> list[str]:
    """Releases and their repositories with a name like this one."""
    return difflib.get_close_matches(name, {*RELEASES, *(r.repo for r in RELEASES.values())}, cutoff=0.5)


# ---------------------------------------------------------------------------------------------- the hub


def fetch(found: Found) -> Path:
    """Download what one coder needs, nothing else, and return its folder (or file) in the hub's cache."""
    if found.format == "file":
        return _download(found.repo, found.path)
    if found.format is None:
        return _fetch_seen(found, _files(found))
    needed, beside, _ = FILES[found.format]
    files = [_download(found.repo, _join(found.path, name)) for name in needed]
    for name in beside:
        _download_if_there(found.repo, _join(found.path, name))
    return files[0].parent


def _fetch_seen(found: Found, names: set[str]) -> Path:
    """The same where only the repository's listing tells what lies there."""
    path = named(found.path, names.__contains__)
    folder = home(path, names.__contains__) if path in names else path
    if folder is None:  # a file that stands for itself, and what may say more about it
        above = str(PurePosixPath(path).parent)
        about = ("config.yaml", "config.json", f"{PurePosixPath(path).stem}_cfg.json", "../config.json")
        for name in names & {_join("" if above == "." else above, name) for name in about}:
            _download(found.repo, name)
        return _download(found.repo, path)
    below = {f.removeprefix(folder + "/" if folder else "") for f in names if f.startswith(folder and folder + "/")}
    kind = format_of(below)
    if kind is None and not set(OURS) <= below:
        known = coders_in(names)
        likely = difflib.get_close_matches(found.path, known, n=5, cutoff=0.3) or known[:5]
        raise ValueError(
            f"{found.repo} has no coder at {found.path or 'its top'!r}: pass id=, "
            + (f"one of {len(known)}, such as {', '.join(map(repr, likely))}" if known else "but it seems to hold none")
        )
    needed, beside = FILES[kind][:2] if kind else (OURS, ())
    files = [_download(found.repo, _join(folder, name)) for name in needed]
    for name in beside:
        if name in below or (name.startswith("..") and _join(folder, name) in names):
            _download(found.repo, _join(folder, name))
    return files[0].parent


def _join(folder: str, name: str) -> str:
    if name.startswith("../"):
        return str(PurePosixPath(folder).parent / name.removeprefix("../"))
    return f"{folder}/{name}" if folder else name


def _files(found: Found) -> set[str]:
    """The repository's files."""
    from huggingface_hub import HfApi

    with _Hub(found):
        if not cache.hub_answers():
            raise ConnectionError
        return set(HfApi().list_repo_files(found.repo))


def _download(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _Hub(Found(repo, file, None, {})):
        try:
            return Path(hf_hub_download(repo, file, local_files_only=not cache.hub_answers()))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as err:
            raise ValueError(f"{repo} has no file {file!r} on the hub: this id names no coder there") from err


def _download_if_there(repo: str, file: str) -> None:
    """A file that not every coder has: without the network, those downloaded before will do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(repo, file, local_files_only=not cache.hub_answers())


class _Hub:
    """The hub's own errors, as this library says things."""

    def __init__(self, found: Found):
        self.what = f"{found.repo}{'/' + found.path if found.path else ''}"
        like = near(found.repo)
        self.like = f"; names like it: {', '.join(like)}" if like and found.repo not in like else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, err: BaseException | None, _: Any) -> None:
        from huggingface_hub import errors

        if isinstance(err, errors.GatedRepoError):
            raise ValueError(f"{self.what} asks you to accept its terms on the hub, and to log in") from err
        if isinstance(err, errors.RepositoryNotFoundError):
            private = "(or it is private: log in)"
            raise ValueError(f"the hub has no repository for {self.what} {private}{self.like}") from err
        # The client's versions talk through different libraries, whose errors have no common base.
        transport = type(err).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
        if transport or isinstance(err, errors.LocalEntryNotFoundError | errors.HfHubHTTPError | OSError):
            raise ValueError(
                f"the hub could not be asked for {self.what} ({type(err).__name__}), and it is not in the local cache: "
                f"check the network and HF_ENDPOINT, or download the folder and pass its path{self.like}"
            ) from err
