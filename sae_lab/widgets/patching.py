"""PatchingGrid."""

from .panel import STATIC, Panel


class PatchingGrid(Panel):
    _esm = STATIC / "patching.js"
    _css = STATIC / "patching.css"
