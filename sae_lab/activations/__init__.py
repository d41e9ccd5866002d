"""What a model does inside: ``harvesting`` writes a ``store``, ``reading`` reads prompts through a coder, ``contexts``
and ``reconstructing`` measure how well a coder stands in for what it read, ``world`` is rows whose truth is known."""
