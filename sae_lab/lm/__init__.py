"""Language models: ``model`` is ``sl.LM``, ``site`` and ``block`` find its sites, ``text`` and ``tokens`` are what it
reads, ``passes`` and ``generation`` run it, ``remote`` runs it on an NDIF server, ``loading`` loads it."""
