"""What a run over a grown folder carries over from the last one, so that whatever no new frame touches stays as it is.

A solution of all frames together moves a little with every frame that is added: another canvas, other gains, other
lots, and nothing of the last run could be used again. So the last run's pixel grid, lots and photometric adjustments
are held fixed, and only the new frames are solved, against the old ones. Where a frame of the last run is gone or has
changed, or a setting that matters is another one, there is nothing to carry over and the solution is a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.cache import code_version, fingerprint
from zemosaic.canvas import Canvas, footprint
from zemosaic.coadd import Sub, hull
from zemosaic.frames import Frame
from zemosaic.photometry import Held, Photometry
from zemosaic.resume import Results
from zemosaic.settings import Settings
from zemosaic.solve.placement import linear_tan
from zemosaic.sphere import separation, to_vectors
from zemosaic.stars import Aperture
from zemosaic.tiles import Window
from zemosaic.warp import PixelMap

Floats = NDArray[np.float64]

#: Beginnings of the names of settings that decide which frames are used, where they lie, and what they are changed by.
_MATTER = (
    *("hot_", "blur_", "cloud_", "global_wcs_", "stacking_", "match_background", "use_existing", "cluster_", "max_raw"),
    *("sds_min_batch", "sds_target_batch", "sds_coverage_threshold"),
    *("solver_", "force_resolve", "astap_", "astrometry_"),
)
_BLOCK = 256  # px: the canvas grows by whole blocks, so that every old pixel is computed in the very block it was
_FAR_DEG = 60.0  # from the tangent point
_WIDE = 1 << 20  # px: farther than any canvas reaches


@dataclass(frozen=True)
class Carried:
    """The state of the last run; frames are known by the fingerprints of their files.

    Parameters
    ----------
    names : tuple of str
        Of the frames that were stacked.
    aperture : Aperture
        Of the photometry.
    zooms : ndarray
        ``(F,)`` by how much a frame's own aperture is larger.
    grid : WCS
        The pixel grid, with its first origin.
    extent : Window
        Of the canvas, in pixels of that grid.
    scale : float
        Of the canvas, arcsec per pixel.
    maps : tuple of PixelMap
        Of every frame, in pixels of that grid.
    gain, plane, noise, weight : ndarray
        As in `zemosaic.photometry.Held`.
    sky : ndarray
        ``(C,)`` common sky level, ADU.
    lots : ndarray
        ``(F,)`` the lot of every frame, -1 for none.
    """

    names: tuple[str, ...]
    aperture: Aperture
    zooms: Floats
    grid: WCS
    extent: Window
    scale: float
    maps: tuple[PixelMap, ...]
    gain: Floats
    plane: Floats
    noise: Floats
    weight: Floats
    sky: Floats
    lots: NDArray[np.int64]

    def rows(self, frames: Sequence[Frame], results: Results) -> list[int]:
        """Where each of its frames is among others; empty if one is missing."""
        where = {results.names.get(frame.path, ""): i for i, frame in enumerate(frames)}
        rows = [where.get(name, -1) for name in self.names]
        return [] if -1 in rows else rows

    def reaches(self, frames: Iterable[Frame]) -> bool:
        """Whether all frames lie where the tangent plane of the old grid still shows them well."""
        centre = to_vectors(*self.grid.wcs.crval)
        return all(separation(footprint(f.wcs, f.shape), centre).max() <= _FAR_DEG for f in frames)

    def canvas(self, frames: Iterable[Frame]) -> tuple[Canvas, Window]:
        """The old canvas, with whole blocks added where frames reach beyond it; and its extent in the grid."""
        far = Canvas(moved(self.grid, _WIDE, _WIDE), (2 * _WIDE, 2 * _WIDE), self.scale)
        reach = hull([far.window_of(frame) for frame in frames])
        reach = reach.shift(-_WIDE, -_WIDE).grow(1)
        y0, x0 = (
            old if old <= new else new // _BLOCK * _BLOCK
            for old, new in ((self.extent.y0, reach.y0), (self.extent.x0, reach.x0))
        )
        extent = Window(y0, max(self.extent.y1, reach.y1), x0, max(self.extent.x1, reach.x1))
        return Canvas(moved(self.grid, -y0, -x0, extent.shape), extent.shape, self.scale), extent

    def held(self, rows: Sequence[int]) -> Held:
        """What stays as it is in the photometric solution."""
        return Held(np.array(rows), self.gain, self.plane, self.noise, self.weight, self.sky)

    def groups(self, frames: Sequence[Frame], rows: Sequence[int]) -> list[list[Path]]:
        """The old lots, as paths of the frames that they are made of now."""
        lots = range(int(self.lots.max(initial=-1)) + 1)
        groups = [[frames[i].path for i, of in zip(rows, self.lots, strict=True) if of == lot] for lot in lots]
        return [group for group in groups if group]


def shifted_map(pixel_map: PixelMap, dy: int, dx: int) -> PixelMap:
    """A pixel map where the pixels of the canvas are counted from ``(-dy, -dx)``."""
    return replace(pixel_map, window=pixel_map.window.shift(dy, dx))


def moved(grid: WCS, dy: int, dx: int, shape: tuple[int, int] | None = None) -> WCS:
    """The same grid with its first pixel elsewhere."""
    wcs = grid.deepcopy()
    wcs.wcs.crpix = grid.wcs.crpix + np.array([dx, dy])
    wcs.wcs.set()
    if shape is not None:
        wcs.pixel_shape = shape[::-1]
    return wcs


def recall(
    results: Results, frames: Sequence[Frame], settings: Settings, lots: Sequence[Sequence[Path]] | None
) -> Carried | None:
    """The state of the last run, if all its frames are there as they were and the settings that matter are the same."""
    arrays = results.cache.get("state", _key(results, settings, lots))
    carried = None if arrays is None else _unpack(arrays)
    return carried if carried is not None and carried.rows(frames, results) else None


def keep(
    results: Results,
    settings: Settings,
    lots: Sequence[Sequence[Path]] | None,
    subs: Sequence[Sub],
    photometry: Photometry,
    canvas: Canvas,
    aperture: Aperture,
    zooms: Sequence[float],
    lot_of: Sequence[int],
) -> None:
    """Store the state of a run that has come to its end.

    Parameters
    ----------
    zooms, lot_of : sequence
        Of every sub.
    """
    dy, dx = results.origin
    adjustments = [sub.adjustment for sub in subs]
    carried = Carried(
        names=tuple(results.names[sub.frame.path] for sub in subs),
        aperture=aperture,
        zooms=np.array(zooms, np.float64),
        grid=moved(canvas.wcs, -dy, -dx),
        extent=Window.of_shape(canvas.shape).shift(-dy, -dx),
        scale=canvas.scale,
        maps=tuple(shifted_map(sub.pixel_map, -dy, -dx) for sub in subs),
        gain=np.array([a.gain for a in adjustments]),
        plane=np.array([a.plane for a in adjustments]),
        noise=photometry.noise,
        weight=photometry.weight,
        sky=photometry.sky,
        lots=np.array(lot_of, np.int64),
    )
    results.cache.put("state", _key(results, settings, lots), _pack(carried))


def _key(results: Results, settings: Settings, lots: Sequence[Sequence[Path]] | None) -> str:
    matter = {name: value for name, value in settings.model_dump().items() if name.startswith(_MATTER)}
    given = [[str(path) for path in lot] for lot in lots or ()]
    return fingerprint(code_version("zemosaic.intake"), results.calibration, matter, given)


def _pack(carried: Carried) -> dict[str, NDArray[Any]]:
    maps, core = carried.maps, carried.grid.wcs
    plain = ("zooms", "gain", "plane", "noise", "weight", "sky", "lots")
    return {
        **{name: getattr(carried, name) for name in plain},
        "names": np.array(carried.names),
        "aperture": np.array([carried.aperture.radius, carried.aperture.inner, carried.aperture.outer]),
        **{name: np.array(getattr(core, name), np.float64) for name in ("crval", "crpix", "cd")},
        "extent": _numbers(carried.extent),
        "scale": np.array(carried.scale),
        "windows": np.array([_numbers(m.window) for m in maps]),
        "steps": np.array([m.step for m in maps]),
        "errors": np.array([m.error for m in maps]),
        "nodes": np.array([m.x.shape for m in maps]),
        **{name: np.concatenate([getattr(m, name).ravel() for m in maps]) for name in ("x", "y")},
    }


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> Carried:
    maps, at = [], 0
    rows = zip(*(arrays[name].tolist() for name in ("windows", "steps", "errors", "nodes")), strict=True)
    for window, step, error, (ny, nx) in rows:
        x, y = (arrays[name][at : at + ny * nx].reshape(ny, nx) for name in ("x", "y"))
        maps.append(PixelMap(Window(*window), step, x, y, error))
        at += ny * nx
    extent = Window(*arrays["extent"].tolist())
    return Carried(
        names=tuple(arrays["names"].tolist()),
        aperture=Aperture(*arrays["aperture"].tolist()),
        grid=linear_tan(arrays["crval"], arrays["crpix"], arrays["cd"], extent.shape),
        extent=extent,
        scale=arrays["scale"].item(),
        maps=tuple(maps),
        **{name: arrays[name] for name in ("zooms", "gain", "plane", "noise", "weight", "sky", "lots")},
    )


def _numbers(window: Window) -> NDArray[np.int64]:
    return np.array([window.y0, window.y1, window.x0, window.x1])
