"""Tables that a benchmark measures, put into the documentation between two marks.

``put("docs/zoo.md", "zoo", table)`` replaces what stands between ``<!-- zoo -->`` and ``<!-- end of zoo -->``.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def put(page: str, mark: str, text: str, root: Path = ROOT) -> None:
    """Replace a marked part of a page below ``root``. Raises ValueError where the page does not have both marks."""
    path = root / page
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- end of {mark} -->")
    if not (begin and end):
        raise ValueError(f"{page} needs the marks <!-- {mark} --> and <!-- end of {mark} -->: put them back")
    path.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")
