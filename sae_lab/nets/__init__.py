"""Networks that are no language models: ``net`` is ``sl.Net``, ``shapes`` finds what its modules pass on and which axis
is which, ``inputs`` are what it reads."""
