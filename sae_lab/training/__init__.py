"""Training: ``loop`` trains one coder, ``sweeping`` many in one pass; ``control`` changes a training that runs,
``watching`` measures it, ``checkpoint`` saves it, ``ranks`` shares it among processes, ``estimating`` says its cost."""

from sae_lab.training.loop import Run, TrainConfig, meta_sae, train

__all__ = ["Run", "TrainConfig", "meta_sae", "train"]
