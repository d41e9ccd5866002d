"""SteeringSliders."""

from .panel import STATIC, Panel


class SteeringSliders(Panel):
    _esm = STATIC / "steering.js"
    _css = STATIC / "steering.css"
