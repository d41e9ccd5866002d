"""What the page of all features costs (``index.to_site``), and the files for Neuronpedia (``index.to_neuronpedia``).

The bundled layer-8 coder, all its features, an index of 100,000 tokens of the bundled text. Milliseconds are the
processor's, of one thread: they do not depend on what else the machine does. Everything is written into a temporary
folder, which is deleted; --keep FOLDER keeps the page there.

--only site, --only neuronpedia: that one; the other's figures stay.
--docs: the sentence in docs/howto/share.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from pages import put
from steps import processor

import sae_lab as sl

RESULTS = Path(__file__).parent / "results" / "feature_page.json"
WORDS = (
    "For the {features:,} features of the bundled coder and {tokens:,} tokens of text, the page takes {site_ms:.0f} ms "
    "of the processor and {site_KB:.1f} KB on disk a feature ({site_MB:.0f} MB in all, in {files} files)."
)
MORE = " Neuronpedia's files take {neuronpedia_ms:.0f} ms and {neuronpedia_KB:.1f} KB a feature."


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", choices=["site", "neuronpedia"])
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm, sae = sl.LM(), sl.load("smollm2-135m/resid_post-8")
    index = sl.index_features(sae, lm, sl.harvest(lm, sae.site, sl.load_text(), tokens=100_000))
    found = json.loads(RESULTS.read_text()) if args.only and RESULTS.exists() else {}
    found |= {"machine": processor(), "features": index.d_sae, "tokens": index.tokens_seen}
    with tempfile.TemporaryDirectory() as temporary:
        for name in [args.only] if args.only else ["site", "neuronpedia"]:
            folder = args.keep if name == "site" and args.keep else Path(temporary) / name
            start = time.process_time()
            getattr(index, f"to_{name}")(folder)
            seconds = time.process_time() - start
            found |= {f"{name}_ms": 1e3 * seconds / index.d_sae, f"{name}_KB": size(folder) / 1e3 / index.d_sae}
            if name == "site":
                found |= {"site_MB": size(folder) / 1e6, "files": len(list(folder.iterdir()))}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if args.docs:
        words = WORDS + MORE * ("neuronpedia_ms" in found)
        put("docs/howto/share.md", "site", words.format(**found))


if __name__ == "__main__":
    main()
