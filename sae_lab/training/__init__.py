"""Training. ``start`` has ``sl.train``: ``config`` says how, ``loop`` does it, ``run`` is what it returns. ``process``
is the one that trains, ``ranks`` are several; ``checkpoint`` is a run on disk; ``control`` changes a training while it
runs, ``watching`` keeps its curves. ``sweeping`` trains many coders in one pass. ``estimating`` says what a call will
take, ``costing`` what a training will."""

from sae_lab.training.config import TrainConfig
from sae_lab.training.run import Run
from sae_lab.training.start import meta_sae, train

__all__ = ["Run", "TrainConfig", "meta_sae", "train"]
