"""gunicorn's settings for NDIF's API: NDIF's own, after all of anyio.

nnsight gives every object an attribute ``save``, and anyio 4.16, which loads its parts when first used, refuses to
define a class with an attribute that it does not know. Loaded before nnsight it does not notice.
"""

import anyio.abc
import anyio.streams.memory  # noqa: F401
from anyio._backends import _asyncio  # noqa: F401
from ndif.services.api.gunicorn_conf import *  # noqa: F403
