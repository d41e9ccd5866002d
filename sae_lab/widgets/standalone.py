"""A widget as one HTML file: the same bundle over a model that is no kernel's."""

import base64
import json
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ margin: 16px; }} @media (prefers-color-scheme: dark) {{ html {{ background: #1b1d21; }} }}
{css}</style>
</head>
<body>
<div id="panel"></div>
<noscript>{fallback}</noscript>
<script type="application/json" id="state">{state}</script>
<script type="module">
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.classList.add("dark");
const widget = await import("data:text/javascript;base64,{esm}");
widget.freeze(document.getElementById("panel"), JSON.parse(document.getElementById("state").textContent));
</script>
</body>
</html>
"""


def page(title: str, esm: str, css: str, state: dict[str, Any], fallback: str) -> str:
    """The file. fallback: HTML for a reader without scripts. State goes in as JSON in which no tag can begin or end."""
    data = json.dumps(state, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    source = base64.b64encode(esm.encode()).decode()
    return _PAGE.format(title=escape(title), css=css.replace("</", "<\\/"), fallback=fallback, state=data, esm=source)
