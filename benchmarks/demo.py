"""make demo: what the library does, on the bundled model: steer, harvest, train, evaluate, inspect. Smaller than the
quickstart notebook, and each step says how long it took.
"""

import time
from pathlib import Path

import sae_lab as sl

PAGE = Path(__file__).resolve().parent.parent / "notebooks" / "executed" / "inspector.html"
PROMPT = "When I woke up this morning, I"
LEFT = time.perf_counter(), time.process_time()


def step(words: str) -> None:
    """Print the time since the step before ended, and what comes next."""
    global LEFT
    now = time.perf_counter(), time.process_time()
    wall, cpu = (a - b for a, b in zip(now, LEFT, strict=True))
    print(f"    {wall:.1f} s ({cpu:.1f} s of CPU time)\n{words}", flush=True)
    LEFT = time.perf_counter(), time.process_time()


def main() -> None:
    print("A model, and a coder that comes with the library")
    lm = sl.LM()
    shipped = sl.load("smollm2-135m/resid_post-8")
    print(lm, shipped, sep="\n")
    step("\nSteer with its strongest feature on the word 'war'")
    table = sl.features(lm, shipped, "They talked about the war").top(1)
    feature = int(table.feature[-1])
    for strength in (2, 0):
        said = lm.generate(PROMPT, edits=[sl.Steer(shipped, feature, strength=strength)], max_new_tokens=16)
        print(f"feature {feature}, strength {strength}: {said!r}", flush=True)
    step("\nHarvest: the activations behind block 8 on Wikipedia")
    site, text = sl.Site("resid_post", layer=8), sl.load_text()
    store = sl.harvest(lm, site, text, tokens=40_000)
    print(store)
    step("\nTrain a coder of our own: BatchTopK, 32 active features a token")
    sae = sl.BatchTopK(lm.width(site), 4 * lm.width(site), k=32)
    print(sl.train(sae, store, sl.TrainConfig(tokens=400_000)))
    step("\nEvaluate it on documents that it was not trained on")
    print(sl.evals.reconstruction(sae, lm, text.held_out, tokens=2_000))
    step("\nIndex its features, and look at them")
    panel = sl.FeatureInspector(sl.index_features(sae, lm, store))
    PAGE.parent.mkdir(exist_ok=True)
    print(panel, f"The inspector as a page: {panel.to_html(PAGE)}", sep="\n")
    step("\n`make lab` opens the quickstart, which goes on from here.")


if __name__ == "__main__":
    main()
