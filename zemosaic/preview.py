"""A picture of a mosaic that a person likes to look at; the science data stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from zemosaic.execute import thread_map
from zemosaic.tiles import FloatImage, Mosaic, has_data

MAX_SAMPLES = 1_000_000  # pixels that the tone is measured on
STRIP = 256  # rows toned at a time: the temporary arrays stay small
DARK_SHARE = 35  # percent of the pixels that count as sky at most: nebulae may fill the rest
DARKEST_GREY, LIGHTEST_GREY = 0.08, 0.13  # what the sky becomes, as shares of full white
LEAST_COLOUR = 0.3  # of the faintest pixels: a faint nebula keeps a tint
BRIGHT_ABOVE_NOISE = 5.0  # noise depths from which on a pixel counts for the white balance
WHITE_ABOVE_NOISE = 30.0  # white is at least so many noise depths above the sky: bare noise must not glow


@dataclass(frozen=True)
class PreviewSettings:
    """How the preview is made; names and defaults of the `preview_png_*` settings.

    Parameters
    ----------
    p_low : float
        Percentile of brightness that is to become black (within limits: the sky stays dark grey).
    p_high : float
        Percentile of brightness that becomes white.
    asinh_a : float
        Strength of the stretch; small is nearly linear.
    max_dim : int
        Longest side of the picture, pixels.
    apply_wb : bool
        Whether bright pixels are made white on average.
    """

    p_low: float = 1.0
    p_high: float = 99.9
    asinh_a: float = 12.0
    max_dim: int = 3200
    apply_wb: bool = False


@dataclass(frozen=True)
class _Tone:
    """What turns ADU into a colour: sky and gain per channel, white and grey for all together."""

    sky: FloatImage
    gain: FloatImage
    white: float
    depth: float
    grey: float
    strength: float


def preview_rgba(
    mosaic: Mosaic,
    p_low: float = 1.0,
    p_high: float = 99.9,
    asinh_a: float = 12.0,
    max_dim: int = 3200,
    apply_wb: bool = False,
    workers: int = 1,
) -> NDArray[np.uint8]:
    """A picture of the mosaic: neutral dark sky, one asinh stretch for all channels.

    The stretch acts on brightness and scales the three channels by one factor (Lupton et al. 2004,
    PASP 116, 133), so that stars and nebulae keep their colours however bright they are.

    Parameters
    ----------
    mosaic : Mosaic
        Colour or mono; read only.
    p_low, p_high, asinh_a, max_dim, apply_wb
        As in `PreviewSettings`.
    workers : int
        Threads.

    Returns
    -------
    ndarray
        ``(h, w, 4)`` uint8, red, green, blue, alpha, sRGB. The first row is the *last* one of the
        mosaic: FITS counts rows upwards, pictures downwards. Transparent where there is no data.
    """
    image, alpha = _shrink(mosaic, max_dim, workers)
    shown = has_data(image) & (alpha > 0)
    picture = np.zeros((*shown.shape, 4), np.uint8)
    if shown.any():
        tone = _measure(_sample(image, shown), p_low, p_high, asinh_a, apply_wb)
        upright = picture[::-1]

        def develop(rows: slice) -> None:
            upright[rows, :, :3] = _develop(image[rows], tone) * shown[rows, :, None]
            upright[rows, :, 3] = alpha[rows] * shown[rows]

        for _ in thread_map(develop, _strips(len(upright)), workers):
            pass
    return picture


def encode_png(rgba: NDArray[np.uint8]) -> bytes:
    """A picture ``(h, w, 4)`` uint8, red first, as the bytes of a PNG file."""
    done, data = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))
    if not done:
        raise ValueError(f"a picture of {rgba.shape} cannot be written as PNG")
    return data.tobytes()


def _strips(rows: int) -> Iterator[slice]:
    return (slice(y, y + STRIP) for y in range(0, rows, STRIP))


def _shrink(mosaic: Mosaic, max_dim: int, workers: int) -> tuple[FloatImage, NDArray[Any]]:
    """Image ``(h, w, C)``, NaN = no data, and alpha ``(h, w)``, area-averaged to `max_dim`."""
    ny, nx = mosaic.shape
    factor = min(1.0, max_dim / max(ny, nx))
    size = max(1, round(nx * factor)), max(1, round(ny * factor))
    image = np.atleast_3d(mosaic.image)
    return _area_mean(image, size, workers), cv2.resize(mosaic.alpha, size, interpolation=cv2.INTER_AREA)


def _area_mean(image: FloatImage, size: tuple[int, int], workers: int) -> FloatImage:
    """Mean over the area of each pixel of a smaller image ``(w, h)``; pixels with NaN in any channel have no weight."""
    # The rows of a strip get narrower, then all get fewer: no copy of the whole image is needed.
    total, share = _narrowed(image, size[0], workers)
    mean = np.atleast_3d(cv2.resize(total, size, interpolation=cv2.INTER_AREA)).astype(np.float32, copy=False)
    del total
    share = np.asarray(cv2.resize(share, size, interpolation=cv2.INTER_AREA), np.float32)
    hole = share < 0.5  # what is mostly hole stays a hole
    mean /= np.where(hole, np.float32(np.nan), share)[..., None]
    return mean


def _narrowed(image: FloatImage, width: int, workers: int) -> tuple[FloatImage, FloatImage]:
    """Mean along narrower rows, with nothing for no data, and the share of data ``(h, w)``."""
    total = np.empty((len(image), width, image.shape[-1]), np.float32)
    share = np.empty((len(image), width), np.float32)

    def narrow(rows: slice) -> None:
        valid = has_data(image[rows])
        filled = np.asarray(np.where(valid[..., None], image[rows], np.float32(0)))
        size = width, len(valid)
        total[rows] = np.atleast_3d(cv2.resize(filled, size, interpolation=cv2.INTER_AREA))
        share[rows] = cv2.resize(valid.astype(np.float32), size, interpolation=cv2.INTER_AREA)

    for _ in thread_map(narrow, _strips(len(image)), workers):
        pass
    return total, share


def _sample(image: FloatImage, shown: NDArray[np.bool_]) -> FloatImage:
    """Some of the pixels shown, ``(n, C)``, n > 0."""
    flat, mask = image.reshape(-1, image.shape[-1]), shown.ravel()
    step = 1 + mask.size // MAX_SAMPLES
    some = flat[::step][mask[::step]]
    return some if len(some) else flat[mask]


def _measure(pixels: FloatImage, p_low: float, p_high: float, strength: float, balance: bool) -> _Tone:
    """The tone from a sample of pixels ``(n, C)``, all finite."""
    brightness = pixels.mean(axis=1)
    # The darkest pixels that are not yet defects show the sky even where a nebula fills the field.
    low = np.percentile(brightness, min(p_low, DARK_SHARE), method="lower")
    high = np.percentile(brightness, DARK_SHARE, method="higher")
    sky = np.median(pixels[(brightness >= low) & (brightness <= high)], axis=0)
    signal = pixels - sky
    gain = _white_balance(signal, p_low) if balance else np.ones_like(sky)
    bottom, top = np.percentile((signal * gain).mean(axis=1), [p_low, p_high])
    depth = max(0.0, -float(bottom))  # of the noise below the sky
    white = max(float(top), WHITE_ABOVE_NOISE * depth) or 1.0
    grey = float(np.clip(_stretch(depth / white, strength), DARKEST_GREY, LIGHTEST_GREY))
    return _Tone(sky, gain, white, depth / white, grey, strength)


def _white_balance(signal: FloatImage, p_low: float) -> FloatImage:
    """Gains ``(C,)`` that make what stands out of the noise white on the whole."""
    brightness = signal.mean(axis=1)
    bright = signal[brightness > BRIGHT_ABOVE_NOISE * abs(np.percentile(brightness, p_low))]
    if not len(bright):
        return np.ones(signal.shape[1], np.float32)
    colour = (bright / bright.mean(axis=1, keepdims=True)).mean(axis=0)  # every pixel counts the same
    return 1 / np.clip(colour, 0.5, 2.0)


def _stretch(x: Any, strength: float) -> Any:
    return np.arcsinh(strength * x) / np.float32(np.arcsinh(strength))  # of pixels, so that they stay float32


def _develop(image: FloatImage, tone: _Tone) -> NDArray[np.uint8]:
    """Colours ``(h, w, 3)`` uint8 of an image ``(h, w, C)``; sky where it is NaN."""
    signal = np.where(np.isfinite(image), image - tone.sky, 0) * (tone.gain / np.float32(tone.white))
    brightness = signal.mean(axis=-1, keepdims=True)
    x = np.abs(brightness) + np.float32(1e-6)
    # Colour that is only noise fades to grey; from three noise depths on it is nearly full.
    share = np.maximum(x * x / (x * x + np.float32(tone.depth**2)), np.float32(LEAST_COLOUR))
    colour = (brightness + (signal - brightness) * share) * (_stretch(x, tone.strength) / x)
    # Too bright a star keeps its hue and shape: all channels give way, smoothly, to fit below 1.
    top = np.square(np.maximum(0, colour.max(axis=-1, keepdims=True)))
    colour /= np.sqrt(np.sqrt(1 + top * top))
    grey = np.float32(tone.grey)
    shown = np.clip(grey + (1 - grey) * colour, 0, 1)
    return np.broadcast_to(np.rint(255 * shown).astype(np.uint8), (*image.shape[:2], 3))
