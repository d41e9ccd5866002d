"""Changes of a model through a coder's codes: ``edit`` has the edits, ``grouping`` joins those that act together,
``rules`` are the functions that the model runs."""
