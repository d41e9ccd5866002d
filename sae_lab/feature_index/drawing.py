"""How the items of a network's store look: pictures with a feature's activations on them, or names of their places."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96  # pixels of a picture's longer side, on the screen and in pages
CURVE = (48, 192)  # pixels of a curve, height and width
FRAME, ACROSS, FRAMES = 56, 8, 40  # pixels of a frame's longer side, frames in a line, and frames in all
THIN = 12  # pixels of a picture's shorter side, at least
STRIP, GAP = 10, 4  # pixels beside a picture, for the places that do not lie on it
HEAT, GREY = (255, 122, 0), (128, 128, 128)
OPAQUE = 0.75  # of the largest activation

KINDS = (
    "a PNG, an array (height width) or (height width 3), a list of those (frames) or of names, one for each place, "
    "or a list of finite numbers (a curve)"
)
Render = Callable[[int], Any]  # the number of an item -> a picture, frames, a curve, or the names of its places


class Drawn(NamedTuple):
    """How an item looks. picture: with heat, as an address that holds it, or "". names: of its places, or none. area:
    the place at the first cell of the picture, its rows and columns of cells, and the pixels left of them, which show
    the places before the first."""

    picture: str = ""
    names: Sequence[str] = ()
    area: Sequence[int] = ()


def drawn(
    render: Render, item: int, values: np.ndarray, peak: int, grid: Sequence[int] | None, largest: float
) -> Drawn:
    """An item as ``render`` shows it, with a feature's activations as heat.

    values: the feature's activation at every place, largest: that of full heat; grid: (height, width) of the places on
    a picture. ValueError for a render that raises, or gives anything else than KINDS.
    """
    try:
        made = render(item)
    except Exception as err:
        raise ValueError(f"render({item}) raised {type(err).__name__}: {err}; it takes an item's number") from err
    heat = (values / max(largest, 1e-12)).clip(0, 1)
    parts = list(made) if isinstance(made, list | tuple) else []
    if parts and all(isinstance(name, str) for name in parts):
        _require_each(parts, values, "a name")
        return Drawn(names=parts)
    # Not lists of lists, which are an array, and not numbers, also those of torch, which are a curve.
    if parts and all(not isinstance(part, list | tuple) and np.ndim(_plain(part)) > 1 for part in parts):
        _require_each(parts, values, "a picture")
        return _sheet([_picture(part) for part in parts], heat, peak)
    x = _plain(made)
    if isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype.kind in "fiu" and len(x) > 1 and np.isfinite(x).all():
        return Drawn(_address(_curve(x.astype(float), heat)), (), (0, 1, len(heat), 0))
    picture = _fitted(_picture(made), SIDE)
    height, width = _grid(len(heat), grid)
    first = len(heat) - height * width
    hot = _heated(picture, heat[first:].reshape(height, width), peak - first)
    if not first:
        return Drawn(_address(hot), (), (0, height, width, 0))
    whole = Image.new("RGBA", (STRIP + GAP + hot.width, hot.height))
    whole.paste(hot, (STRIP + GAP, 0))
    whole.paste(_heated(Image.new("RGB", (STRIP, hot.height), GREY), heat[:first, None], peak), (0, 0))
    return Drawn(_address(whole), (), (first, height, width, STRIP + GAP))


def _require_each(parts: Sequence[Any], values: np.ndarray, what: str) -> None:
    if len(parts) != len(values):
        raise ValueError(f"render gives {what} for each of the item's {len(values)} places, got {len(parts)}")


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


def _sheet(frames: Sequence[Image.Image], heat: np.ndarray, peak: int) -> Drawn:
    """Frames in lines, one for each place: at most FRAMES, those around the peak."""
    first = max(0, min(peak - FRAMES // 2, len(frames) - FRAMES))
    shown = [_fitted(frame, FRAME) for frame in frames[first : first + FRAMES]]
    size = max(f.width for f in shown), max(f.height for f in shown)
    columns = min(ACROSS, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGBA", ((size[0] + 2) * columns, (size[1] + 2) * rows))
    for i, frame in enumerate(shown):
        hot = _heated(frame, heat[first + i].reshape(1, 1), peak - first - i)
        sheet.paste(hot, ((size[0] + 2) * (i % columns), (size[1] + 2) * (i // columns)))
    return Drawn(_address(sheet), (), (first, rows, columns, 0))


def _curve(y: np.ndarray, heat: np.ndarray) -> Image.Image:
    """A line from its lowest to its highest value, before its places' heat; grey reads on light and on dark."""
    height, width = CURVE
    alpha = _spread(heat[None], CURVE)
    back = np.concatenate([np.broadcast_to(np.array(HEAT, float), (*CURVE, 3)), 255 * OPAQUE * alpha[..., None]], 2)
    share = (y - y.min()) / max(float(np.ptp(y)), 1e-12)
    line = Image.new("RGBA", (2 * width, 2 * height), (*GREY, 0))
    x, down = (np.arange(len(y)) + 0.5) / len(y) * 2 * width, 2 * (3 + (height - 6) * (1 - share))
    ImageDraw.Draw(line).line(list(zip(x.tolist(), down.tolist(), strict=True)), (*GREY, 255), 3)
    return Image.alpha_composite(Image.fromarray(back.round().astype(np.uint8)), line.reduce(2))


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture of about ``side`` pixels: a small one with whole pixels, a large one averaged."""
    longest = max(picture.size)
    scale = max(1, round(side / longest)) if longest < side else side / longest
    size = max(THIN, round(picture.width * scale)), max(THIN, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _heated(picture: Image.Image, heat: np.ndarray, peak: int) -> Image.Image:
    """A picture with the heat of its cells on it, and a line around that of the peak, if it is one of them."""
    size = picture.height, picture.width
    hot = _blend(np.asarray(picture, float), _spread(heat, size))
    if 0 <= peak < heat.size:
        (top, bottom), (left, right) = (
            (n * i // have, max(n * i // have, n * (i + 1) // have - 1))
            for n, i, have in zip(size, divmod(peak, heat.shape[1]), heat.shape, strict=True)
        )
        ImageDraw.Draw(hot).rectangle((left, top, right, bottom), outline=HEAT)
    return hot


def _blend(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    alpha = OPAQUE * heat[..., None]
    return Image.fromarray((pixels * (1 - alpha) + np.array(HEAT) * alpha).round().astype(np.uint8))


def _spread(heat: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Heat of cells as heat of pixels; of several cells at a pixel the largest."""
    for axis, n in enumerate(size):
        heat = np.maximum.reduceat(heat, np.arange(n) * heat.shape[axis] // n, axis)
    return heat


def _plain(made: Any) -> Any:
    """An array of what is none, if it can be one."""
    if isinstance(made, bytes | Image.Image):
        return np.zeros((1, 1, 1))
    made = made.detach().cpu() if hasattr(made, "detach") else made
    made = made.float() if hasattr(made, "is_floating_point") and made.is_floating_point() else made
    try:
        return np.asarray(made)
    except (ValueError, TypeError):  # lists of unequal length
        return np.asarray(None)


def _picture(made: Any) -> Image.Image:
    """In red, green and blue. ValueError for what is no picture."""
    if isinstance(made, bytes):
        try:
            return Image.open(io.BytesIO(made)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
            raise ValueError(f"render gave {len(made)} bytes that are no picture ({err}): give a PNG") from err
    if isinstance(made, Image.Image):
        return made.convert("RGB")
    x = _plain(made)
    x = x.transpose(1, 2, 0) if x.ndim == 3 and x.shape[0] in (1, 3) and x.shape[2] not in (1, 3) else x
    x = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    if x.ndim not in (2, 3) or x.dtype.kind not in "fiub" or not x.size or (x.ndim == 3 and x.shape[2] != 3):
        got = f"{type(made).__name__} {getattr(made, 'shape', '')}".strip()
        raise ValueError(f"render gives {KINDS}; got {got}")
    x, most = x.astype(float), 1 if x.dtype.kind in "fb" else 255
    if not (x.min() >= 0 and x.max() <= most):
        raise ValueError(
            f"a picture's values go from 0 to {most}, got {x.min():.3g} to {x.max():.3g}: scale them in render"
        )
    return Image.fromarray((x * (255 / most)).round().astype(np.uint8)).convert("RGB")


def _address(picture: Image.Image) -> str:
    out = io.BytesIO()
    if picture.getcolors(256) is None:  # a photograph: a third of the room with a palette
        picture = picture.quantize(256, Image.Quantize.FASTOCTREE)
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
