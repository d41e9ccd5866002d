"""NDIF's API without the dispatcher that its gunicorn starts."""

import sys

import api_settings  # noqa: F401 (anyio first)
import uvicorn

if __name__ == "__main__":
    uvicorn.run("ndif.services.api.app:app", host=sys.argv[1], port=int(sys.argv[2]))
