"""Several texts at once, a piece of each in turn."""

from collections.abc import Callable, Iterator, Mapping


def side_by_side(
    streams: Mapping[str, Iterator[str]], check: Callable[[], None], hear: Callable[[str, str], None]
) -> dict[str, str]:
    """Texts by name, generated a piece of each in turn; ``check`` comes before each piece and may raise."""
    said, going = dict.fromkeys(streams, ""), dict(streams)
    try:
        while going:
            for name in list(going):
                check()
                piece = next(going[name], None)
                if piece is None:
                    del going[name]
                    continue
                said[name] += piece
                hear(name, piece)
    finally:
        for stream in streams.values():
            stream.close()  # type: ignore[attr-defined]
    return said
