"""make results: the tables of docs/results.md, of published claims and what they came to here, and docs/papers.md.

Every number that was measured here is read from benchmarks/results/*.json by its key; what was published and the
verdicts are written below. ``at("methods", row, title, measure)`` is a figure (value, error, control, its name). Claims
of the notebooks of papers are read from their saved outputs, verdicts too.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pages import put

from sae_lab.evals.claims import MIME

NOTEBOOKS = Path(__file__).parent.parent / "notebooks" / "papers"
RESULTS = Path(__file__).parent / "results"
HOLDS, PART, NOT, OTHER = "holds", "holds in part", "does not hold", "not comparable"
EIGHT, SIXTEEN = "smollm2-135m/resid_post-8", "smollm2-135m/resid_post-16"


class Shown(NamedTuple):
    """A measured figure as text, its control as text, and what the control is."""

    here: str
    control: str = ""
    of: str = ""


class Claim(NamedTuple):
    """One row of the table. ``measured``: (what it is, the figure)."""

    paper: str
    claim: str
    published: str
    measured: list[tuple[str, Shown]]
    verdict: str
    command: str


@cache
def read(file: str) -> Any:
    return json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))


def number(value: float, digits: int = 3) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no minus before a zero


def shown(value: float, error: float | None, control: float | None, name: str, digits: int = 3) -> Shown:
    digits = digits if abs(value) < 100 else 0
    here = number(value, digits) + (f" ± {number(error, digits)}" if error is not None else "")
    return Shown(here, number(control, digits), name) if control is not None else Shown(here)


def at(file: str, *keys: str, digits: int = 3) -> Shown:
    """A figure of methods.json, or a number of another file, by its keys."""
    found = read(file)
    for key in keys:
        found = found[key]
    return shown(*found, digits=digits) if isinstance(found, list) else Shown(number(found, digits))


def reported(coder: str, measure: str, digits: int = 3) -> Shown:
    """A figure of sl.evals.report, as make report measured it."""
    (row,) = [f for f in read("report")["figures"] if (f["coder"], f["measure"]) == (coder, measure)]
    return shown(row["value"], row["error"], row["control"], row["control_name"], digits)


def area(layer: int, pair: str) -> Shown:
    """A difference of areas of benchmarks/ioi.py with its 95 % interval, in nats."""
    value, low, high = read("ioi")[f"directions, layer {layer}"]["areas"][pair]
    return Shown(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")


def family(name: str, column: str) -> Shown:
    return Shown(number(read("zoo")[name][column], 1 if column == "l0" else 3))


def methods(row: int | str) -> str:
    return f"`python benchmarks/methods.py {row}`"


COMPOSED, ABSORBED = "31 composed features", "30 absorption"
HILL, LENS, GEOMETRY = "27 position and Hill", "57 lens and token lists", "70 71 geometry"
RULES, AGENTS = "58 rule explanations", "59 to 61 SAGE, self-explanation, evolved prompts"
MONO, CONSISTENT, LENGTH = "36 monosemanticity", "12 38 73 consistency", "16 description length"

CLAIMS = [
    Claim(
        "Cunningham et al. 2023, [2309.08600](https://arxiv.org/abs/2309.08600)",
        "Patching an answer over takes fewer SAE features than principal components",
        "KL divergence below that of PCA at equal number",
        [("layer 8, area of mean KL over log n, features less PCA", area(8, "features - PCA, by number")),
         ("layer 16", area(16, "features - PCA, by number")),
         ("layer 8, less the model's own axes", area(8, "features - neurons, by number")),
         ("layer 16, less the model's own axes", area(16, "features - neurons, by number")),
         ("layer 8, less PCA of the differences", area(8, "features - differences, by number"))],
        PART, "`python benchmarks/ioi.py`",
    ),
    Claim(
        "Bussmann et al. 2024, [2412.06410](https://arxiv.org/abs/2412.06410)",
        "BatchTopK explains more than TopK at equal k where the number of true features varies",
        "lower error than TopK at equal k",
        [("FVU of BatchTopK, planted world", family("BatchTopK", "fvu")), ("FVU of TopK", family("TopK", "fvu"))],
        HOLDS, "`make zoo`",
    ),
    Claim(
        "Karvonen et al. 2024, [2408.00113](https://arxiv.org/abs/2408.00113)",
        "p-annealing is sparser than L1 at no more error", "better Pareto front than L1",
        [("L0 of PAnneal", family("PAnneal", "l0")), ("L0 of L1", family("L1", "l0")),
         ("FVU of PAnneal", family("PAnneal", "fvu")), ("FVU of L1", family("L1", "fvu"))],
        HOLDS, "`make zoo`",
    ),
    Claim(
        "Rajamanoharan et al. 2024, [2404.16014](https://arxiv.org/abs/2404.16014)",
        "Gated coders explain more than L1 at equal sparsity", "lower error at equal L0",
        [("L0 of Gated", family("Gated", "l0")), ("L0 of L1", family("L1", "l0")),
         ("FVU of Gated", family("Gated", "fvu")), ("FVU of L1", family("L1", "fvu"))],
        HOLDS, "`make zoo`",
    ),
    Claim(
        "KAN-SAE (an unpublished note; splines of [2404.19756](https://arxiv.org/abs/2404.19756))",
        "Splines on pre-activations explain more than a plain activation", "more features alive, lower error",
        [("FVU of Spline", family("Spline", "fvu")), ("FVU of TopK", family("TopK", "fvu"))],
        NOT, "`make zoo`",
    ),
    Claim(
        "Mudide et al. 2024, [2410.08201](https://arxiv.org/abs/2410.08201)",
        "Switch coders explain more for the same computation", "lower error at equal FLOPs",
        [("FVU of Switch, equal width", family("Switch", "fvu")), ("FVU of TopK", family("TopK", "fvu"))],
        OTHER, "`make zoo`",
    ),
    Claim(
        "MDL-SAE 2024", "Description length has its minimum at the true sparsity", "a minimum inside the range of L0",
        [("k preferred, of 8 true ones, BatchTopK, world 0",
          at("methods", LENGTH, "k preferred, BatchTopK, world 0, rho 0.1, of 8.0", digits=0)),
         ("TopK, world 2", at("methods", LENGTH, "k preferred, TopK, world 2, rho 0.05, of 8.0", digits=0)),
         ("bits per token, layer 8", at("methods", LENGTH, "layer 8, rho 0.1", "bits per token"))],
        PART, methods(16),
    ),
    Claim(
        "Reconstructed activations, LessWrong", "Reconstruction gets worse beyond the training context",
        "the loss rises beyond the training context",
        [("rise of ΔCE from positions 64–127 to 128–255, trained on 128",
          at("methods", HILL, "by position", "rise of dCE")),
         ("rise of FVU", at("methods", HILL, "by position", "rise of FVU"))],
        NOT, methods(27),
    ),
    Claim(
        "SAE reports as Hill curves, LessWrong", "Loss recovered follows a Hill curve in L0", "a good fit",
        [("rmse", at("methods", HILL, "Hill", "rmse", digits=4)), ("slope n", at("methods", HILL, "Hill", "slope n")),
         ("L0 at half", at("methods", HILL, "Hill", "L0 at half"))],
        PART, methods(27),
    ),
    Claim(
        "Chanin et al. 2024, [2409.14507](https://arxiv.org/abs/2409.14507)",
        "Letter features are absorbed by features of words", "rates well above zero in larger models",
        [("absorbed, layer 8", at("methods", ABSORBED, "sae_lab", "absorption")),
         ("in SAEBench's convention", at("methods", ABSORBED, "saebench", "absorption"))],
        NOT, methods(30),
    ),
    Claim(
        "Toy models of absorption, LessWrong", "An L1 coder's parent feature goes silent where its child fires",
        "recall alone less recall given a child above 0.5",
        [("L1, sparsity 2, equal sizes",
          at("methods", ABSORBED, "equal sizes, L1, sparsity 2, world 0", "alone less given")),
         ("L1, sparsity 2, sizes 0.5 to 1.5",
          at("methods", ABSORBED, "sizes .5 to 1.5, L1, sparsity 2, world 0", "alone less given")),
         ("TopK, equal sizes", at("methods", ABSORBED, "equal sizes, TopK, world 0", "alone less given")),
         ("BatchTopK, equal sizes", at("methods", ABSORBED, "equal sizes, BatchTopK, world 0", "alone less given"))],
        PART, methods(30),
    ),
    Claim(
        "Bussmann et al. 2025, [2503.17547](https://arxiv.org/abs/2503.17547)", "Matryoshka coders absorb less",
        "less absorption than BatchTopK",
        [("Matryoshka, equal sizes, world 0",
          at("methods", ABSORBED, "equal sizes, Matryoshka, world 0", "alone less given")),
         ("world 1", at("methods", ABSORBED, "equal sizes, Matryoshka, world 1", "alone less given")),
         ("BatchTopK, world 0", at("methods", ABSORBED, "equal sizes, BatchTopK, world 0", "alone less given")),
         ("world 1", at("methods", ABSORBED, "equal sizes, BatchTopK, world 1", "alone less given"))],
        NOT, methods(30),
    ),
    Claim(
        "Composed features, LessWrong", "Correlated features are learnt as sums", "the share of sums rises",
        [("TopK, correlation 0", at("methods", COMPOSED, "TopK, correlation 0.0", "composed")),
         ("0.9", at("methods", COMPOSED, "TopK, correlation 0.9", "composed")),
         ("0.99", at("methods", COMPOSED, "TopK, correlation 0.99", "composed")),
         ("L1, 0.99", at("methods", COMPOSED, "L1, correlation 0.99", "composed"))],
        HOLDS, methods(31),
    ),
    Claim(
        "Composed features, LessWrong", "A penalty on decoder cosines undoes sums", "fewer sums",
        [("TopK, correlation 0.99",
          at("methods", COMPOSED, "TopK with a penalty on cosines, correlation 0.99", "composed")),
         ("without the penalty", at("methods", COMPOSED, "TopK, correlation 0.99", "composed"))],
        NOT, methods(31),
    ),
    Claim(
        "Stitching SAEs of different sizes, LessWrong",
        "Most novel features of a larger SAE lower a smaller one's error when inserted", "more than 80 %",
        [("768 into 3,072 features, layer 8", at("methods", "32 stitching", "768 into 3,072", "novel, MSE falls")),
         ("planted world", at("methods", "32 stitching", "planted, 48 into 128", "novel, MSE falls"))],
        NOT, methods(32),
    ),
    Claim(
        "Gurnee 2024, LessWrong", "Reconstruction errors move the output more than noise of equal norm",
        "a KL divergence 2 to 4 times as large",
        [("layer 8, isotropic noise", at("methods", "33 pathological errors", EIGHT, "ratio, isotropic")),
         ("layer 8, noise that keeps the error's part along x",
          at("methods", "33 pathological errors", EIGHT, "ratio, same_angle")),
         ("layer 16, isotropic noise", at("methods", "33 pathological errors", SIXTEEN, "ratio, isotropic")),
         ("layer 16, the part along x kept", at("methods", "33 pathological errors", SIXTEEN, "ratio, same_angle"))],
        PART, methods(33),
    ),
    Claim(
        "Kantamneni et al. 2025, [2502.16681](https://arxiv.org/abs/2502.16681)",
        "Probes on features do not beat a plain probe", "no gain",
        [("accuracy, features less dense, layer 8", reported("resid_post-8", "features less dense")),
         ("features", reported("resid_post-8", "features, k chosen: accuracy")),
         ("dense", reported("resid_post-8", "dense: accuracy"))],
        HOLDS, "`make report`",
    ),
    Claim(
        "Monosemanticity score (SAEs for vision-language models, 2025)", "Features are more monosemantic than neurons",
        "features above neurons",
        [("less neurons, layer 8", at("methods", MONO, "layer 8", "less neurons")),
         ("less neurons, digits by class", at("methods", MONO, "digits, alike by class", "less neurons")),
         ("less random directions that fire as often, layer 8", at("methods", MONO, "layer 8", "less random")),
         ("layer 16", at("methods", MONO, "layer 16", "less random"))],
        PART, methods(36),
    ),
    Claim(
        "Concept cones 2025 (inspired by it)", "A concept lies in the cone of a few features",
        "no number for this measure",
        [("features a concept", at("methods", "37 concept cones", "thirty tokens", "features a concept", digits=0)),
         ("held-out R²", at("methods", "37 concept cones", "thirty tokens", "r2, held out"))],
        OTHER, methods(37),
    ),
    Claim(
        "Transfer and features through the layers, LessWrong",
        "Layers and kinds of text share features", "matches above shuffled pairs",
        [("matched cosine, layers 8 and 16", at("methods", CONSISTENT, "layers 8 and 16", "stability")),
         ("share of matches above 0.7", at("methods", CONSISTENT, "layers 8 and 16", "shared")),
         ("matched cosine, two seeds", at("methods", CONSISTENT, "two seeds", "stability")),
         ("ΔCE on news less on encyclopedia",
          at("methods", CONSISTENT, "wikipedia, then 161_agnews_0", "dCE, difference"))],
        PART, methods(12),
    ),
    Claim(
        "Falsifying reasoning features, 2025",
        "Most features called reasoning fire on their own tokens in neutral text", "45 to 90 % of features",
        [("features activated, cue words", at("methods", "39 injected tokens", "cue words (because, however, if, thus)",
                                              "features activated")),
         ("ten random features", at("methods", "39 injected tokens", "ten random features", "features activated"))],
        HOLDS, methods(39),
    ),
    Claim(
        "Uncertainty and correctness features, 2025", "Three features tell right answers from wrong", "AUROC 0.79",
        [("AUROC, 160 questions", at("methods", "42 uncertainty", "160 questions", "AUROC, 3 features")),
         ("within one kind of question", at("methods", "42 uncertainty", "160 questions", "AUROC within groups")),
         ("accuracy with confounded features ablated",
          at("methods", "42 uncertainty", "160 questions", "accuracy change"))],
        NOT, methods(42),
    ),
    Claim(
        "Bloom & Lin 2024, LessWrong", "Token features promote their own token", "above 80 % in the top five",
        [("word promoted, layer 8", at("methods", LENS, "lens", "word promoted")),
         ("word among the tokens that fire it", at("methods", LENS, "token lists", "word in the list"))],
        NOT, methods(57),
    ),
    Claim(
        "Paulo et al. 2024, [2410.13928](https://arxiv.org/abs/2410.13928)",
        "Explanations predict where features fire", "scores of language models as explainers",
        [("rules: detection less another feature's rule", at("methods", RULES, "400,000 tokens, seed 0",
                                                             "detection - control")),
         ("fuzzing less another's", at("methods", RULES, "400,000 tokens, seed 0", "fuzzing - control")),
         ("simulation", at("methods", RULES, "400,000 tokens, seed 0", "simulation"))],
        OTHER, methods(58),
    ),
    Claim(
        "SAGE 2025", "Experiments improve explanations", "higher generation accuracy than a single pass",
        [*((f"generation accuracy, '{word}'", at("methods", AGENTS, f"SAGE, '{word}'", "generation accuracy"))
           for word in ("outside", "anarch", "alk", "example")),
         ("gain over the single pass, 'outside'", at("methods", AGENTS, "SAGE, 'outside'", "gain by experiments"))],
        OTHER, methods(59),
    ),
    Claim(
        "SelfIE 2024, [2403.10949](https://arxiv.org/abs/2403.10949)", "A model can name a feature put into its prompt",
        "large models name many",
        [("the word is named, 12 features", at("methods", AGENTS, "self-explanation", "the word is named")),
         ("and not another's", at("methods", AGENTS, "self-explanation", "and not another's"))],
        NOT, methods(60),
    ),
    Claim(
        "Evolved prompts, LessWrong", "Evolved prompts exceed the corpus maximum", "more than half of the features",
        [("from the top context", at("methods", AGENTS, "prompts from the top", "exceed the corpus maximum")),
         ("from random text", at("methods", AGENTS, "prompts from nothing", "exceed the corpus maximum")),
         ("cross-entropy of the prompts", at("methods", AGENTS, "prompts from the top", "cross-entropy"))],
        HOLDS, methods(61),
    ),
    Claim(
        "Engels et al. 2024, [2405.14860](https://arxiv.org/abs/2405.14860)", "Weekdays and months lie on circles",
        "circles in GPT-2 and Mistral",
        [("weekdays in order, of 7, layer 8",
          at("methods", GEOMETRY, f"weekdays, {EIGHT}", "neighbours right", digits=1)),
         ("months, of 12, layer 8", at("methods", GEOMETRY, f"months, {EIGHT}", "neighbours right", digits=1)),
         ("months, layer 16", at("methods", GEOMETRY, f"months, {SIXTEEN}", "neighbours right", digits=1)),
         ("the same without an SAE, months, layer 16",
          at("methods", GEOMETRY, f"months, {SIXTEEN}", "raw: neighbours", digits=1))],
        HOLDS, methods(70),
    ),
    Claim(
        "Clustering decoder rows, LessWrong", "Decoder rows come in clusters", "clusters found by HDBSCAN",
        [("clusters", at("methods", GEOMETRY, "decoder rows", "clusters", digits=0)),
         ("clusters tighter than any random one", at("methods", GEOMETRY, "decoder rows", "tight clusters", digits=1))],
        PART, methods(70),
    ),
    Claim(
        "Activation Pattern SVD (a proposal)", "Features fire in patterns over contexts", "no number",
        [("patterns above shuffled", at("methods", GEOMETRY, "patterns", "rank", digits=0))],
        OTHER, methods(71),
    ),
    Claim(
        "Positional features, LessWrong", "Some features only count the position", "features with R² above 0.8",
        [("features, layer 0", at("methods", "72 positional features", "layer 0, trained here", "features of R2 > 0.8",
                                  digits=0)),
         ("largest R², layer 0", at("methods", "72 positional features", "layer 0, trained here", "largest R2")),
         ("largest R², layer 8", at("methods", "72 positional features", "layer 8", "largest R2"))],
        OTHER, methods(72),
    ),
    Claim(
        "Nanda 2023; Syed et al. 2023, [2310.10348](https://arxiv.org/abs/2310.10348)",
        "One gradient estimates true patches", "close for small parts, far off for whole residual streams",
        [("Pearson, attention outputs", at("patching", "means", "attn_out")),
         ("MLP outputs", at("patching", "means", "mlp_out")),
         ("whole stream", at("patching", "means", "resid_post")),
         ("estimates shuffled", at("patching", "means", "all, estimates shuffled"))],
        HOLDS, "`python benchmarks/patching.py`",
    ),
]  # fmt: skip


def table() -> str:
    lines = ["| Paper | Claim | Published | Here | Control | Verdict | Measured by |", "|---|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        here = "<br>".join(
            f"{name}: **{figure.here}**" + f" against {figure.control}" * bool(figure.control)
            for name, figure in claim.measured
        )
        control = "; ".join(dict.fromkeys(figure.of for _, figure in claim.measured if figure.of)) or "–"
        cells = (claim.paper, claim.claim, claim.published, here, control, claim.verdict, claim.command)
        lines.append("| " + " | ".join(cells) + " |")
    verdicts = [claim.verdict for claim in CLAIMS]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (HOLDS, PART, NOT, OTHER))
    return "\n".join([*lines, "", f"{len(CLAIMS)} claims: {counts}."])


# ---- the notebooks of papers


class Paper(NamedTuple):
    """A notebook: its title, the text of its first cell, and what its cell of claims gave."""

    name: str
    title: str
    idea: str
    said: dict[str, Any]

    @property
    def link(self) -> str:
        return f"notebooks/papers/{self.name}"


def papers() -> list[Paper]:
    found = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title, _, idea = "".join(cells[0]["source"]).partition("\n")
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        found += [Paper(path.name, title.removeprefix("# "), idea.strip(), d[MIME]) for d in outputs if MIME in d]
    return found


def papers_table(found: list[Paper]) -> str:
    lines = ["| Paper | Claim | Published | Threshold | Here | Control | Verdict | Notebook |", "|---" * 8 + "|"]
    for paper in found:
        for claim in paper.said["claims"]:
            cells = [claim[name] or "–" for name in ("claim", "published", "threshold", "here", "beside", "verdict")]
            lines.append("| " + " | ".join([paper.said["paper"], *cells, f"[{paper.title}]({paper.link})"]) + " |")
    verdicts = [claim["verdict"] for paper in found for claim in paper.said["claims"]]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return "\n".join([*lines, "", f"{len(verdicts)} claims of {len(found)} notebooks: {counts}."])


def gallery(found: list[Paper]) -> str:
    lines = []
    for paper in found:
        lines += [f"## [{paper.title}]({paper.link})", "", paper.idea, ""]
        lines += ["| Claim | Here | Verdict |", "|---|---|---|"]
        lines += [f"| {one['claim']} | {one['here']} | {one['verdict']} |" for one in paper.said["claims"]]
        lines += ["", paper.said["setting"], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    put("docs/results.md", "claims", table())
    put("docs/results.md", "papers", papers_table(papers()))
    put("docs/papers.md", "papers", gallery(papers()))
