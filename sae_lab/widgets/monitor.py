"""TrainingMonitor."""

from .panel import STATIC, Panel


class TrainingMonitor(Panel):
    _esm = STATIC / "monitor.js"
    _css = STATIC / "monitor.css"
