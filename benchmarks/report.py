"""sl.evals.report of the coders that come with the library; --docs writes the table into docs/coders.md.

    python benchmarks/report.py --docs

The first coder is measured alone, which says what a report of one takes from an empty cache of figures.
"""

import json
import logging
import sys
import time
from pathlib import Path

from pages import put

import sae_lab as sl

ROOT = Path(__file__).parents[1]
CODERS = ("resid_post-8", "resid_post-16", "attn_z-8", "transcoder-8")


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    coders = {name: sl.load(f"smollm2-135m/{name}") for name in CODERS}
    lm, text = sl.LM(), sl.load_text()
    begin = time.perf_counter()
    alone = sl.evals.report({CODERS[0]: coders[CODERS[0]]}, lm, text)
    minutes = (time.perf_counter() - begin) / 60
    print(alone, f"\none coder: {minutes:.1f} min")
    table = sl.evals.report(coders, lm, text)
    print(table)
    results = ROOT / "benchmarks" / "results" / "report.json"
    kept = {"minutes of one coder": round(minutes, 1), "seconds": alone.seconds}
    if min(alone.seconds.values()) == 0 and results.exists():  # read from the cache: the time is an earlier run's
        kept = {key: json.loads(results.read_text(encoding="utf-8"))[key] for key in kept}
    kept["settings"] = table.settings
    figures = json.loads(table.to_pandas().to_json(orient="records"))
    results.write_text(json.dumps(kept | {"figures": figures}, indent=1) + "\n", encoding="utf-8")
    if "--docs" in sys.argv:
        put("docs/coders.md", "report", markdown(table))


def markdown(table: sl.evals.Report) -> str:
    """The table, controls in brackets, and below it what was not measured and why."""
    rows = table._rows()
    keep = [i for i in range(len(rows[0])) if i != len(rows[0]) - 1]  # without the words on each measure
    lines = ["| " + " | ".join(row[i].replace("|", "\\|") for i in keep) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(keep))
    reasons: dict[tuple[str, str], list[str]] = {}
    for (title, name), why in table.left_out.items():
        reasons.setdefault((title, why), []).append(name)
    notes = [f"{title} of {', '.join(names)}: {why}." for (title, why), names in reasons.items()]
    return "\n".join([*lines, "", *notes]).rstrip()


if __name__ == "__main__":
    main()
