"""TokenFeatures."""

from .panel import STATIC, Panel


class TokenFeatures(Panel):
    _esm = STATIC / "tokens.js"
    _css = STATIC / "tokens.css"
