"""How the items of a network's store look: pictures with a feature's activations on them, or names of their places."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SIDE = 112  # pixels of a picture's longer side, on the screen and in pages
HEAT = (255, 122, 0)
OPAQUE = 0.75  # of the largest activation

Render = Callable[[int], Any]  # the number of an item -> a picture, or the names of its places


def drawn(
    made: Any, values: Sequence[float | None], grid: Sequence[int] | None, largest: float
) -> tuple[str, list[str]]:
    """(a picture with heat as a data address, or ""; the names of places, or none), from what a render function gave.

    values: the feature's activation at every place. grid: (height, width) of the places that lie on the picture; those
    before it (a class token) do not. ValueError for anything but a picture and names.
    """
    if isinstance(made, list | tuple) and all(isinstance(name, str) for name in made):
        if len(made) != len(values):
            raise ValueError(f"render gives a name for each of the item's {len(values)} places, got {len(made)}")
        return "", list(made)
    picture = _picture(made)
    heat = np.array([v or 0.0 for v in values]) / max(largest, 1e-12)
    height, width = _grid(len(heat), grid)
    shown = heat[len(heat) - height * width :].reshape(height, width)
    scale = SIDE / max(picture.shape[:2])
    size = [max(1, round(n * scale)) for n in picture.shape[:2]]
    image, alpha = _resized(picture, size), OPAQUE * _resized(shown.clip(0, 1), size)[..., None]
    return _address((image * (1 - alpha) + np.array(HEAT) * alpha).round().astype(np.uint8)), []


def _grid(places: int, grid: Sequence[int] | None) -> tuple[int, int]:
    """Height and width of the places on a picture. None: those of the store, or a square, a place before it or not."""
    if grid is not None and len(grid) == 2 and grid[0] * grid[1] <= places:
        return int(grid[0]), int(grid[1])
    side = int(places**0.5)
    if (grid is None or len(grid) == 1) and places in (side * side, side * side + 1):
        return side, side
    raise ValueError(
        f"where {places} places lie on a picture is not known: say so, index.draw(render, grid=(height, width))"
    )


def _resized(x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The nearest pixels of a picture of another size."""
    rows, columns = (np.arange(n) * have // n for n, have in zip(size, x.shape[:2], strict=True))
    return x[rows][:, columns]


def _picture(made: Any) -> np.ndarray:
    """"height width 3" from 0 to 255. ValueError for what is no picture."""
    from PIL import Image

    if isinstance(made, bytes):
        try:
            return np.asarray(Image.open(io.BytesIO(made)).convert("RGB"), float)
        except OSError as err:
            raise ValueError(f"render gave {len(made)} bytes that are no picture ({err}): give a PNG") from err
    if isinstance(made, Image.Image):
        return np.asarray(made.convert("RGB"), float)
    x = np.asarray(made.detach().cpu() if hasattr(made, "detach") else made)
    x = x.transpose(1, 2, 0) if x.ndim == 3 and x.shape[0] in (1, 3) and x.shape[2] not in (1, 3) else x
    x = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    if x.ndim not in (2, 3) or x.dtype.kind not in "fiu" or not x.size or (x.ndim == 3 and x.shape[2] != 3):
        raise ValueError(
            f"render gives a PNG, an array (height width) or (height width 3), or a list of names, one for each place; "
            f"got {type(made).__name__} {getattr(made, 'shape', '')}"
        )
    x = x.astype(float) * (255 if x.dtype.kind == "f" else 1)
    return np.repeat(x[..., None], 3, 2) if x.ndim == 2 else x


def _address(pixels: np.ndarray) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def place_names(grid: Sequence[int], places: int) -> list[str]:
    """What places are called: their number, or (row, column) and the like where they have several axes."""
    if len(grid) < 2:
        return [str(i) for i in range(places)]
    return [f"({', '.join(map(str, np.unravel_index(i, grid)))})" for i in range(places)]
