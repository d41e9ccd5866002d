"""Coders on disk: ``ours``, ``peers`` (other libraries), ``releases`` (published coders); ``opening`` has ``load``."""
