"""A widget as one HTML file: its bundle over state that is in the page."""

import base64
from typing import Any

from sae_lab.results import Html, escaped, in_script

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


def page(title: str, esm: str, css: str, state: dict[str, Any], fallback: Html) -> str:
    """The text of the file. fallback: for a reader without scripts."""
    style, source = css.replace("</", "<\\/"), base64.b64encode(esm.encode()).decode()
    return _PAGE.format(title=escaped(title), css=style, fallback=fallback, state=in_script(state), esm=source)
