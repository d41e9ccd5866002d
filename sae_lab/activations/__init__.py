"""Activations: ``harvesting`` writes a ``store``, ``reading`` reads prompts through a coder, ``contexts`` and
``reconstructing`` measure how well a coder replaces the activations, ``world`` is data with known features."""
