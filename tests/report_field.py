"""An invented mosaic with everything known about its frames, for the tests of the verdict; no engine is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from astropy.wcs import WCS

from zemosaic.report.evidence import SIDE_POINTS, Evidence, FrameFacts, SkyFacts, StarFacts
from zemosaic.report.surface import measure_stars, measure_surface

SHAPE = (560, 760)  # of the mosaic
FRAME = (330, 430)  # of a frame
SKY, NOISE = 600.0, 20.0  # ADU, of one frame
FWHM = 3.0
BINNED = 1.17  # how much wider stars of 3 px are in the 2x2 bins that frames are measured in
STAR_NOISE = 0.01  # mag, of one frame's flux
PLACE_NOISE = 0.05  # px, of one frame's centroid


@dataclass(frozen=True)
class Fault:
    """What is wrong with one lot."""

    lot: int = 2
    gain: float = 1.0
    sky: float = 0.0
    shift: float = 0.0
    fwhm: float = FWHM


def invent(
    fault: Fault | None = None,
    *,
    channels: int = 3,
    lots: int = 4,
    per_lot: int = 8,
    stars: int = 130,
    seed: int = 3,
    hidden: bool = False,
) -> Evidence:
    """A mosaic of four panels, one lot each (further lots on the same panels), and what its frames saw.

    `hidden` keeps the fault from the frames: only the mosaic shows it.
    """
    rng = np.random.default_rng(seed)
    fault = fault or Fault()
    corners = _corners(lots, per_lot, rng)
    lot = np.repeat(np.arange(lots), per_lot)
    x, y = _scattered(stars, rng)
    flux = 10 ** rng.uniform(4.0, 5.2, stars)
    image = np.zeros((*SHAPE, channels))
    depth = np.zeros(SHAPE)
    nebula = _nebula()
    for k in range(lots):
        bad = k == fault.lot
        light = _render(x + fault.shift * bad, y, flux, fault.fwhm if bad else FWHM) + nebula
        level = light * (fault.gain if bad else 1.0) + SKY + fault.sky * bad
        for y0, x0 in corners[lot == k]:
            box = np.s_[y0 : y0 + FRAME[0], x0 : x0 + FRAME[1]]
            image[box] += level[box][..., None]
            depth[box] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        image = image / depth[..., None] + NOISE / np.sqrt(depth)[..., None] * rng.normal(size=image.shape)
    shown = replace(fault, gain=1.0, sky=0.0, shift=0.0, fwhm=FWHM) if hidden else fault
    evidence = Evidence(
        image.astype(np.float32) if channels == 3 else image[..., 0].astype(np.float32),
        depth.astype(np.float32),
        _wcs(),
        _frames(corners, lot, channels, shown),
        _stars(corners, lot, x, y, flux, channels, shown, rng),
        _sky(corners, lot, nebula, channels, shown, rng),
    )
    return evidence


def measured(evidence: Evidence):
    """Surface and stars of a mosaic."""
    return measure_surface(evidence), measure_stars(evidence.image)


def blank(shape: tuple[int, int] = (400, 500), noise: float = 5.0, seed: int = 1) -> np.ndarray:
    """Nothing but sky and noise, ``(ny, nx)`` float32."""
    return np.random.default_rng(seed).normal(100, noise, shape).astype(np.float32)


def line(image: np.ndarray, a: tuple[float, float], b: tuple[float, float], height: float) -> np.ndarray:
    """The image with a straight trail of 1.2 px (1 sigma) from a to b (x, y)."""
    yy, xx = np.mgrid[: image.shape[0], : image.shape[1]]
    along = np.subtract(b, a) / np.hypot(*np.subtract(b, a))
    t = (xx - a[0]) * along[0] + (yy - a[1]) * along[1]
    d = (yy - a[1]) * along[0] - (xx - a[0]) * along[1]
    on = (t > 0) & (t < np.hypot(*np.subtract(b, a)))
    return (image + height * np.exp(-0.5 * (d / 1.2) ** 2) * on).astype(np.float32)


def _corners(lots: int, per_lot: int, rng: np.random.Generator) -> np.ndarray:
    """y, x of the lower left corner of every frame, ``(F, 2)``."""
    room = np.subtract(SHAPE, FRAME)
    panel = np.array([(i // 2 % 2, i % 2) for i in range(lots)]) * room
    jitter = rng.integers(-12, 13, (lots, per_lot, 2))
    return np.clip(panel[:, None] + jitter, 0, room).reshape(-1, 2)


def _scattered(stars: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places at least 30 px apart, so that no star is another one's company."""
    places: list[np.ndarray] = []
    while len(places) < stars:
        place = rng.uniform(15, np.array(SHAPE[::-1]) - 16)
        if all(np.hypot(*(place - other)) > 30 for other in places):
            places.append(place)
    x, y = np.array(places).T
    return x, y


def _nebula() -> np.ndarray:
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return 60 * np.exp(-0.5 * (((xx - 300) / 190) ** 2 + ((yy - 250) / 150) ** 2))


def _render(x: np.ndarray, y: np.ndarray, flux: np.ndarray, fwhm: float) -> np.ndarray:
    image = np.zeros(SHAPE)
    sigma, r = fwhm / 2.3548, 12
    for xi, yi, f in zip(x, y, flux, strict=True):
        x0, y0 = max(0, round(xi) - r), max(0, round(yi) - r)
        gx = np.exp(-0.5 * ((np.arange(x0, min(SHAPE[1], round(xi) + r + 1)) - xi) / sigma) ** 2)
        gy = np.exp(-0.5 * ((np.arange(y0, min(SHAPE[0], round(yi) + r + 1)) - yi) / sigma) ** 2)
        image[y0 : y0 + len(gy), x0 : x0 + len(gx)] += f / (2 * np.pi * sigma**2) * np.outer(gy, gx)
    return image


def _wcs() -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [83.8, 10.0], [SHAPE[1] / 2, SHAPE[0] / 2]
    wcs.wcs.cd = np.diag([-2.4, 2.4]) / 3600
    wcs.wcs.set()
    return wcs


def _frames(corners: np.ndarray, lot: np.ndarray, channels: int, fault: Fault) -> FrameFacts:
    frames = len(corners)
    t = np.arange(SIDE_POINTS) / SIDE_POINTS
    one, zero = np.ones_like(t), np.zeros_like(t)
    ring = np.stack([np.concatenate([t, one, 1 - t, zero]), np.concatenate([zero, t, one, 1 - t])], axis=1)
    outline = corners[:, None, ::-1] + ring * FRAME[::-1] - 0.5
    same = np.ones((frames, channels))
    return FrameFacts(
        name=tuple(f"sub_{i:03d}.fit" for i in range(frames)),
        date=("2026-01-10T20:00:00",) * frames,
        lot=lot,
        outline=outline,
        fwhm=BINNED * np.where(lot == fault.lot, fault.fwhm, FWHM),
        ellipticity=np.full(frames, 0.05),
        sky=np.full(frames, SKY),
        gain=same,
        noise=NOISE * same,
        weight=same,
        photosites=same,
    )


def _stars(
    corners: np.ndarray,
    lot: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    flux: np.ndarray,
    channels: int,
    fault: Fault,
    rng: np.random.Generator,
) -> StarFacts:
    lower, upper = corners[:, None] + 15, corners[:, None] + np.array(FRAME) - 16
    place = np.stack([y, x], axis=1)[None]
    frame, star = np.nonzero(((place >= lower) & (place <= upper)).all(axis=2))
    bad = lot[frame] == fault.lot
    n = len(frame)
    scatter = 10 ** (0.4 * STAR_NOISE * rng.normal(size=(n, channels)))
    seen = flux[star, None] * np.where(bad, fault.gain, 1.0)[:, None] * scatter
    return StarFacts(
        frame=frame,
        x=x[star] + fault.shift * bad + PLACE_NOISE * rng.normal(size=n),
        y=y[star] + PLACE_NOISE * rng.normal(size=n),
        flux=seen,
        error=np.full((n, channels), NOISE * 12.0),
        clean=np.ones(n, bool),
    )


def _sky(
    corners: np.ndarray, lot: np.ndarray, nebula: np.ndarray, channels: int, fault: Fault, rng: np.random.Generator
) -> SkyFacts:
    gy, gx = (g.ravel() for g in np.mgrid[16 : SHAPE[0] : 32, 16 : SHAPE[1] : 32])
    place = np.stack([gy, gx], axis=1)[None]
    inside = ((place >= corners[:, None] + 10) & (place <= corners[:, None] + np.array(FRAME) - 10)).all(axis=2)
    frame, node = np.nonzero(inside)
    bad = lot[frame] == fault.lot
    level = nebula[gy, gx][node] * np.where(bad, fault.gain, 1.0) + SKY + fault.sky * bad
    return SkyFacts(
        frame=frame,
        node=node,
        x=gx[node].astype(float),
        y=gy[node].astype(float),
        value=level[:, None] + 1.5 * rng.normal(size=(len(node), channels)),
        error=np.full((len(corners), channels), 1.5),
        block_px=16,
    )
