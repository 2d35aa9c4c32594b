"""A small simulator: Bayer (or mono) subs of an invented field, with everything about them known.

`zemosaic demo` runs the whole chain on such a field and every test of the project can ask it for
one, because a mosaic can only be judged against a sky that is known. The sky is a nebula and stars;
a sub is that sky seen through its own WCS, PSF, transparency and background, with photon and read
noise, hot pixels, cosmic rays and satellite trails. One electron is one ADU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import FK5, SkyCoord
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline

from zemosaic.solve.catalogue import load_catalogue

FloatImage = NDArray[np.float32]

PEDESTAL = 500.0  # ADU, added by the camera
READ_NOISE = 4.0  # electrons
EXPOSURE = 10.0  # seconds
PIXEL_SIZE = 2.9  # micrometres
SKY_TINT = np.array([0.85, 1.0, 0.75], np.float32)
FIRST_LIGHT = datetime(2025, 2, 1, 21, 0, 0)
MOFFAT_BETA = 4.0
BRIGHTEST = 2.5e5  # flux of a star, ADU: none saturates at the usual seeing
ZERO_POINT = 21.0  # V_T of a star that gives one ADU: one of 12 is plain in a single sub, one of 7.5 the brightest
NARROWEST_CLOUD = 6.0  # pixels, 1 sigma: gas is not blurred by the PSF, so it must not need to be
PSF_REACH = 6.0  # stamp radius in FWHM; 1e-5 of a star's light lies outside

# Share of red, green and blue: hydrogen, reflection, oxygen, dust seen in starlight.
CLOUD_COLOURS = ((1.0, 0.28, 0.36), (0.35, 0.55, 1.0), (0.25, 0.8, 0.75), (0.9, 0.7, 0.45))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the field and the subs are like: the options of `make_field`."""

    panels: tuple[int, int] = (2, 2)  #: across x and down y
    frames: int = 24  #: subs altogether, shared out over the panels
    shape: tuple[int, int] = (240, 320)  #: (ny, nx) of a sub
    seed: int = 1  #: same recipe, same pixels
    overlap: float = 0.3  #: share of a panel's side that it has in common with its neighbour
    pattern: str | None = "GRBG"  #: Bayer pattern of the array as stored; None makes mono subs
    scale: float = 2.39  #: arcsec per pixel
    center: tuple[float, float] = (83.8, 10.0)  #: RA, Dec, degrees, ICRS; poles and RA 0 are fine
    rotation_deg: float = 8.0  #: field rotation, spread evenly over plus and minus this (alt-az)
    dither_px: float = 12.0  #: 1-sigma scatter of the pointing
    fwhm: float = 2.8  #: best seeing, pixels
    fwhm_scatter: float = 0.10  #: 1-sigma of how much worse subs are, as a share of `fwhm`
    sky: float = 600.0  #: usual sky level, ADU
    sky_scatter: float = 0.25  #: 1-sigma from sub to sub, as a share of `sky`
    transparency_scatter: float = 0.10  #: 1-sigma around 1
    gradient: float = 0.15  #: rise of the sky from edge to edge, as a share; any direction
    trails: float = 0.15  #: share of the subs with a satellite trail
    blurred: float = 0.0  #: share of the subs out of focus: FWHM times three
    hot_fraction: float = 2e-4  #: share of the detector's pixels that are hot, in every sub
    cosmics: int = 5  #: cosmic rays per sub
    parity: int = 1  #: sign of the CD determinant; +1 as on a real Seestar, -1 as on sky charts
    sip_px: float = 0.0  #: cubic (SIP) distortion at the corners, pixels
    with_wcs: bool = True  #: whether the headers carry the true WCS
    star_density: float = 2400.0  #: invented stars per square degree
    real_stars: bool = False  #: bright stars as in the sky (Tycho-2), so that subs can be solved; invented ones fainter
    nebula: float = 400.0  #: peak brightness of the nebula, ADU per pixel
    shuffle: bool = False  #: panels taken in turns instead of one after the other
    name: str = "Demo Nebula"  #: OBJECT of the headers, and part of the file names

    def __post_init__(self) -> None:
        if self.parity not in (-1, 1):
            raise ValueError(f"parity is +1 or -1, not {self.parity}")
        if self.pattern is not None and sorted(self.pattern) != ["B", "G", "G", "R"]:
            raise ValueError(f"{self.pattern!r} is no Bayer pattern")


@dataclass(frozen=True)
class Clouds:
    """A nebula: tilted Gaussians on the tangent plane of the field.

    Parameters
    ----------
    x, y, length, width : ndarray
        ``(n,)`` centres and 1-sigma sizes, in units of the field's half diagonal.
    angle : ndarray
        ``(n,)`` tilt of the long axis, radians.
    colour : ndarray
        ``(n, C)`` peak brightness per channel, ADU per pixel; a negative cloud is dust.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    length: NDArray[np.float64]
    width: NDArray[np.float64]
    angle: NDArray[np.float64]
    colour: NDArray[np.float64]

    def at(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Surface brightness at positions of any shape; an axis for the channels is added."""
        total = np.zeros((*x.shape, self.colour.shape[1]))
        for i, tint in enumerate(self.colour):
            dx, dy = x - self.x[i], y - self.y[i]
            along = (dx * math.cos(self.angle[i]) + dy * math.sin(self.angle[i])) / self.length[i]
            across = (dy * math.cos(self.angle[i]) - dx * math.sin(self.angle[i])) / self.width[i]
            total += np.exp(-0.5 * (along**2 + across**2))[..., None] * tint
        # Light is never negative; a soft floor leaves no crease where dust meets the dark sky.
        return 0.5 * (total + np.hypot(total, 0.1 * np.abs(self.colour).max()))


@dataclass(frozen=True)
class FrameTruth:
    """What was done to one sub."""

    path: Path
    wcs: WCS = field(repr=False)  #: the true one of the array as stored
    cards: fits.Header = field(repr=False)  #: of `wcs`: what `with_wcs` writes, or a sidecar would hold
    panel: int  #: which one it was aimed at, counted along the rows of panels
    transparency: float  #: factor on stars and nebula
    sky: FloatImage  #: (C,) level in the middle of the frame, ADU, pedestal excluded
    slope: tuple[float, float]  #: rise of the sky along x and y, edge to edge, as a share
    fwhm: float  #: pixels
    trail: bool
    blurred: bool
    date: datetime  #: start of the exposure, UTC

    def background(self, shape: tuple[int, int]) -> FloatImage:
        """The sky of this sub, ``(ny, nx, C)``, ADU, pedestal excluded."""
        ny, nx = shape
        y = (np.arange(ny, dtype=np.float32)[:, None] + 0.5) / ny - 0.5
        x = (np.arange(nx, dtype=np.float32)[None, :] + 0.5) / nx - 0.5
        share = 1 + np.float32(self.slope[0]) * x + np.float32(self.slope[1]) * y
        return (share[..., None] * self.sky).astype(np.float32)


@dataclass(frozen=True)
class FieldTruth:
    """The sky that was observed and what was done to every sub.

    Parameters
    ----------
    recipe : Recipe
        What was asked for.
    frames : tuple of FrameTruth
        The subs, in order of time.
    plane : astropy.wcs.WCS
        North-up tangent plane of the field with the pixels of a sub; its reference pixel is the
        middle of the field.
    radius : float
        Half diagonal of the field, pixels.
    ra, dec : ndarray
        ``(n,)`` star positions, degrees, ICRS.
    flux : ndarray
        ``(n, C)`` float32, total flux of every star at transparency 1, ADU; C is 3, or 1 for mono.
    clouds : Clouds
        The nebula, in units of `radius` on `plane`.
    heat : ndarray
        ``(ny, nx)`` float32, what the detector's hot pixels add, ADU; 0 where a pixel is sound.
    """

    recipe: Recipe
    frames: tuple[FrameTruth, ...] = field(repr=False)
    plane: WCS = field(repr=False)
    radius: float
    ra: NDArray[np.float64] = field(repr=False)
    dec: NDArray[np.float64] = field(repr=False)
    flux: FloatImage = field(repr=False)
    clouds: Clouds = field(repr=False)
    heat: FloatImage = field(repr=False)

    @property
    def paths(self) -> list[Path]:
        """The files, in order of time."""
        return [frame.path for frame in self.frames]

    def nebula(self, wcs: WCS, shape: tuple[int, int]) -> FloatImage:
        """The nebula alone on any grid.

        Parameters
        ----------
        wcs : astropy.wcs.WCS
            Celestial WCS of the grid.
        shape : tuple of int
            ``(ny, nx)`` of the grid.

        Returns
        -------
        ndarray
            ``(ny, nx, 3)``, or ``(ny, nx)`` for a mono field; float32, ADU per pixel *of a sub* at
            transparency 1: a surface brightness, the same on grids of any scale.
        """
        # The clouds are smooth: a cubic spline with four knots to the narrowest sigma is exact to 1e-4.
        ny, nx = shape
        step = float(self.clouds.width.min()) * self.radius * self._zoom(wcs) / 4
        rows = np.linspace(0, ny - 1, max(4, math.ceil(ny / step) + 1))
        columns = np.linspace(0, nx - 1, max(4, math.ceil(nx / step) + 1))
        x, y = self.plane.wcs_world2pix(*wcs.all_pix2world(*np.meshgrid(columns, rows), 0), 0)
        knots = self.clouds.at(x / self.radius, y / self.radius)
        image = np.empty((ny, nx, knots.shape[-1]), np.float32)
        for c in range(knots.shape[-1]):
            spline = RectBivariateSpline(rows, columns, knots[..., c])
            image[..., c] = spline(np.arange(ny), np.arange(nx))
        return image[..., 0] if self.recipe.pattern is None else image

    def render(self, wcs: WCS, shape: tuple[int, int], fwhm: float) -> FloatImage:
        """Nebula and stars on any grid, without background and noise.

        Parameters
        ----------
        wcs, shape
            As for `nebula`.
        fwhm : float
            Of the stars, in pixels *of a sub*.

        Returns
        -------
        ndarray
            As for `nebula`: on a grid of another scale the pixels of a star add up to its flux
            times (sub scale / grid scale) squared.
        """
        image = self.nebula(wcs, shape)
        zoom = self._zoom(wcs)
        reach = math.ceil(PSF_REACH * fwhm * zoom)
        x, y, lit = self.star_pixels(wcs, shape, reach)
        flux = self.flux[lit] * np.float32(zoom**2)
        batch = max(1, 2_000_000 // (2 * reach + 1) ** 2)
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            _add_stars(np.atleast_3d(image), x[part], y[part], flux[part], fwhm * zoom, reach)
        return image

    def star_pixels(
        self, wcs: WCS, shape: tuple[int, int], margin: float = 0.0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
        """x, y (pixels, from 0) and index of the stars on a grid, or within `margin` pixels of it."""
        # Without distortion first: the inverse of a SIP polynomial diverges far outside the frame.
        x, y = wcs.wcs_world2pix(self.ra, self.dec, 0)
        near = np.flatnonzero(_within(x, y, shape, margin + 10 * abs(self.recipe.sip_px)))
        x, y = wcs.all_world2pix(self.ra[near], self.dec[near], 0, tolerance=1e-6)
        on = _within(x, y, shape, margin)
        return x[on], y[on], near[on]

    def canvas(self) -> tuple[WCS, tuple[int, int]]:
        """A north-up WCS with the subs' scale, and the ``(ny, nx)`` that holds every sub."""
        ny, nx = self.recipe.shape
        corners = [(-0.5, -0.5), (nx - 0.5, -0.5), (-0.5, ny - 0.5), (nx - 0.5, ny - 0.5)]
        sky = np.concatenate([frame.wcs.all_pix2world(corners, 0) for frame in self.frames])
        xy = self.plane.wcs_world2pix(sky, 0)
        low = np.floor(xy.min(axis=0)).astype(int)
        width, height = (np.ceil(xy.max(axis=0)).astype(int) - low + 1).tolist()
        wcs = self.plane.deepcopy()
        wcs.wcs.crpix = self.plane.wcs.crpix - low
        wcs.pixel_shape = (width, height)
        return wcs, (height, width)

    def _zoom(self, wcs: WCS) -> float:
        """Pixels of a grid to one pixel of a sub."""
        return self.recipe.scale / 3600 / math.sqrt(abs(np.linalg.det(wcs.pixel_scale_matrix)))


def make_field(folder: Path | str, **options: Any) -> FieldTruth:
    """Write the subs of an invented field and tell everything about them.

    Parameters
    ----------
    folder : Path
        Made if needed. Gets the subs: uint16, with names and headers like a Seestar's. Files of
        the same name are replaced.
    **options
        The fields of `Recipe`.

    Returns
    -------
    FieldTruth
        The truth.
    """
    recipe = Recipe(**options)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    truth = _invent(recipe, folder)
    headers = _headers(recipe, truth.frames)
    for i, (frame, header) in enumerate(zip(truth.frames, headers, strict=True)):
        pixels = _expose(truth, frame, np.random.default_rng([recipe.seed, 2, i]))
        fits.PrimaryHDU(pixels, header).writeto(frame.path, overwrite=True)
    return truth


def make_demo(folder: Path | str) -> FieldTruth:
    """Write the subs of `zemosaic demo`: no WCS, but stars of the real sky to find it by.

    The field lies in the Milky Way (Cassiopeia) and its pixels are large, so that every small sub holds a score of
    catalogue stars, of which none is too bright.
    """
    return make_field(
        folder,
        real_stars=True,
        with_wcs=False,
        center=(38.0, 61.0),
        shape=(480, 640),
        scale=6.0,
        star_density=380.0,
    )


def tangent_header(
    ra: float,
    dec: float,
    shape: tuple[int, int],
    *,
    scale: float,
    angle_deg: float = 0.0,
    parity: int = -1,
    sip_px: float = 0.0,
) -> fits.Header:
    """The WCS cards (TAN or TAN-SIP) of a camera that looks at one point.

    `ra` and `dec` (degrees) are in the middle of the ``(ny, nx)`` array; `scale` is in arcsec per
    pixel, `angle_deg` the position angle of the +y axis, `parity` the sign of the CD determinant,
    `sip_px` the radial cubic distortion at the corners.
    """
    ny, nx = shape
    suffix = "-SIP" if sip_px else ""
    step, angle = scale / 3600, math.radians(angle_deg)
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = f"RA---TAN{suffix}", f"DEC--TAN{suffix}"
    header["CRVAL1"], header["CRVAL2"] = ra % 360, dec
    header["CRPIX1"], header["CRPIX2"] = (nx + 1) / 2, (ny + 1) / 2
    header["CUNIT1"], header["CUNIT2"] = "deg", "deg"
    # Rows are east and north; the +x axis is a quarter turn from +y, which way is the parity.
    header["CD1_1"], header["CD1_2"] = parity * step * math.cos(angle), step * math.sin(angle)
    header["CD2_1"], header["CD2_2"] = -parity * step * math.sin(angle), step * math.cos(angle)
    header["RADESYS"] = "ICRS"
    if sip_px:
        bend = sip_px / (math.hypot(nx, ny) / 2) ** 3
        header["A_ORDER"], header["A_3_0"], header["A_1_2"] = 3, bend, bend
        header["B_ORDER"], header["B_2_1"], header["B_0_3"] = 3, bend, bend
    return header


def _invent(recipe: Recipe, folder: Path) -> FieldTruth:
    """Everything about the field and its subs except the noise."""
    rng = np.random.default_rng([recipe.seed, 0])
    plane = WCS(tangent_header(*recipe.center, (1, 1), scale=recipe.scale))
    aims = _aims(recipe)
    ny, nx = recipe.shape
    radius = float(np.linalg.norm(np.abs(aims).max(axis=0) + np.array([nx / 2, ny / 2])))
    ra, dec, flux = _invent_stars(rng, recipe, plane, radius + 4 * recipe.dither_px + 20)
    clouds = _invent_clouds(rng, recipe, radius)
    hot = rng.random(recipe.shape) < recipe.hot_fraction
    heat = np.where(hot, rng.uniform(2000, 40000, recipe.shape), 0).astype(np.float32)
    frames = _invent_frames(recipe, folder, plane, aims)
    return FieldTruth(recipe, frames, plane, radius, ra, dec, flux, clouds, heat)


def _aims(recipe: Recipe) -> NDArray[np.float64]:
    """Centres of the panels on the plane, ``(n, 2)`` x and y in pixels from the middle."""
    (across, down), (ny, nx) = recipe.panels, recipe.shape
    x = (np.arange(across) - (across - 1) / 2) * nx * (1 - recipe.overlap)
    y = (np.arange(down) - (down - 1) / 2) * ny * (1 - recipe.overlap)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _invent_stars(
    rng: np.random.Generator, recipe: Recipe, plane: WCS, radius: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], FloatImage]:
    """Stars of a disc of `radius` pixels, the invented ones spread evenly: RA, Dec, flux per channel."""
    n = round(recipe.star_density * math.pi * (radius * recipe.scale / 3600) ** 2)
    r, angle = radius * np.sqrt(rng.random(n)), rng.uniform(0, 2 * np.pi, n)
    ra, dec = plane.wcs_pix2world(r * np.cos(angle), r * np.sin(angle), 0)
    # N(>F) ~ F**-0.65, a little flatter than the real sky: many stars good for photometry, and
    # none that saturates at the usual seeing.
    flux = np.clip(500 * rng.random(n) ** (-1 / 0.65), None, BRIGHTEST)
    if recipe.real_stars:
        known = load_catalogue().cone(*recipe.center, radius * recipe.scale / 3600)
        bright = np.minimum(10 ** (0.4 * (ZERO_POINT - known.mag)), BRIGHTEST)
        faint = flux < bright.min(initial=np.inf)
        ra, dec, flux = (
            np.append(real, invented[faint]) for real, invented in ((known.ra, ra), (known.dec, dec), (bright, flux))
        )
    redness = rng.normal(0, 0.2, len(flux))  # magnitudes between neighbouring channels
    colours = flux[:, None] * 10 ** (0.4 * redness[:, None] * np.array([1.0, 0.0, -1.0]))
    if recipe.pattern is None:
        colours = colours.mean(axis=1, keepdims=True)
    return ra, dec, colours.astype(np.float32)


def _invent_clouds(rng: np.random.Generator, recipe: Recipe, radius: float) -> Clouds:
    """A bright, ragged middle of several colours, crossed by lanes of dust."""
    bright, dust = 40, 6
    kind = np.arange(bright) * len(CLOUD_COLOURS) // bright
    # Small clouds strewn around a few centres, one for each colour, look like gas.
    length = np.append(0.06 + 0.25 * rng.random(bright) ** 3, rng.uniform(0.08, 0.25, dust))
    width = np.append(length[:bright] * rng.uniform(0.4, 0.8, bright), rng.uniform(0.025, 0.04, dust))
    length, width = np.maximum([length, width], NARROWEST_CLOUD / radius)
    colour = np.array(CLOUD_COLOURS)[kind] * rng.uniform(0.2, 1, (bright, 1))
    colour = np.concatenate([colour, np.full((dust, 3), -1.0)])
    if recipe.pattern is None:
        colour = colour.mean(axis=1, keepdims=True)
    centres = rng.normal(0, 0.25, (2, len(CLOUD_COLOURS) + 1))
    x, y = centres[:, np.append(kind, np.full(dust, -1))] + rng.normal(0, 0.2, (2, bright + dust))
    clouds = Clouds(x, y, length, width, rng.uniform(0, np.pi, bright + dust), colour)
    axis = np.linspace(-1, 1, 65)
    peak = clouds.at(*np.meshgrid(axis, axis)).max()
    return replace(clouds, colour=colour * recipe.nebula / peak)


def _invent_frames(recipe: Recipe, folder: Path, plane: WCS, aims: NDArray[np.float64]) -> tuple[FrameTruth, ...]:
    """Aim, turn, sky and seeing of every sub."""
    rng = np.random.default_rng([recipe.seed, 1])
    crossed = rng.permutation(recipe.frames)[: round(recipe.trails * recipe.frames)]
    blurred = rng.permutation(recipe.frames)[: round(recipe.blurred * recipe.frames)]
    tint = SKY_TINT if recipe.pattern else SKY_TINT.mean(keepdims=True)
    frames = []
    for i in range(recipe.frames):
        panel = i % len(aims) if recipe.shuffle else i * len(aims) // recipe.frames
        aim = aims[panel] + rng.normal(0, recipe.dither_px, 2)
        cards = _pointing(recipe, plane, aim, recipe.rotation_deg * rng.uniform(-1, 1))
        uphill = rng.uniform(0, 2 * np.pi)
        level = recipe.sky * np.clip(rng.normal(1, recipe.sky_scatter), 0.4, 2.5)
        seeing = recipe.fwhm * (1 + recipe.fwhm_scatter * abs(rng.normal()))
        date = FIRST_LIGHT + timedelta(seconds=i * (EXPOSURE + 2))
        frames.append(
            FrameTruth(
                path=folder / f"Light_{recipe.name}_{EXPOSURE:.1f}s_IRCUT_{date:%Y%m%d-%H%M%S}.fit",
                wcs=_read_wcs(cards, recipe.shape),
                cards=cards,
                panel=panel,
                transparency=float(np.clip(rng.normal(1, recipe.transparency_scatter), 0.5, 1.5)),
                sky=np.float32(level) * tint,
                slope=(recipe.gradient * math.cos(uphill), recipe.gradient * math.sin(uphill)),
                fwhm=seeing * (3 if i in blurred else 1),
                trail=i in crossed,
                blurred=i in blurred,
                date=date,
            )
        )
    return tuple(frames)


def _pointing(recipe: Recipe, plane: WCS, aim: NDArray[np.float64], turn_deg: float) -> fits.Header:
    """WCS cards of a sub aimed at the offset `aim` on the plane and turned against it."""
    (ra, ra_up), (dec, dec_up) = plane.wcs_pix2world([aim[0], aim[0]], [aim[1], aim[1] + 1], 0)
    # Away from the middle the plane's y axis is not quite north, and near a pole not at all.
    up = SkyCoord(ra, dec, unit="deg").position_angle(SkyCoord(ra_up, dec_up, unit="deg"))
    return tangent_header(
        ra,
        dec,
        recipe.shape,
        scale=recipe.scale,
        angle_deg=up.deg + turn_deg,
        parity=recipe.parity,
        sip_px=recipe.sip_px,
    )


def _read_wcs(cards: fits.Header, shape: tuple[int, int]) -> WCS:
    wcs = WCS(cards)
    wcs.pixel_shape = shape[::-1]
    return wcs


def _headers(recipe: Recipe, frames: tuple[FrameTruth, ...]) -> list[fits.Header]:
    """What a Seestar writes, RA and DEC of date included."""
    true = SkyCoord([frame.wcs.wcs.crval for frame in frames], unit="deg")
    apparent = true.transform_to(FK5(equinox=Time(FIRST_LIGHT)))
    headers = []
    for frame, ra, dec in zip(frames, apparent.ra.deg, apparent.dec.deg, strict=True):
        header = fits.Header()
        header["CREATOR"] = ("ZeMosaic demo", "simulated: no sky was observed")
        header["FOCALLEN"] = (round(206.265 * PIXEL_SIZE / recipe.scale, 2), "[mm] focal length")
        header["XPIXSZ"] = header["YPIXSZ"] = (PIXEL_SIZE, "[um] pixel size, with binning")
        header["XBINNING"] = header["YBINNING"] = 1
        header["EQMODE"] = (0, "alt-az")
        header["IMAGETYP"] = "Light"
        header["EXPTIME"] = (EXPOSURE, "[s] exposure time")
        header["RA"] = (round(float(ra), 6), "[deg] of date")
        header["DEC"] = (round(float(dec), 6), "[deg] of date")
        header["DATE-OBS"] = frame.date.isoformat(timespec="microseconds")
        header["FILTER"] = "IRCUT"
        header["INSTRUME"] = "Seestar S50"
        if recipe.pattern:
            header["BAYERPAT"] = recipe.pattern
        header["GAIN"] = 80
        header["OBJECT"] = recipe.name
        if recipe.with_wcs:
            header.update(frame.cards)
        headers.append(header)
    return headers


def _expose(truth: FieldTruth, frame: FrameTruth, rng: np.random.Generator) -> NDArray[np.uint16]:
    """The sub as stored, ``(ny, nx)``: sky, stars and nebula through the filters, noise, defects."""
    recipe, (ny, nx) = truth.recipe, truth.recipe.shape
    light = np.atleast_3d(truth.render(frame.wcs, (ny, nx), frame.fwhm)) * np.float32(frame.transparency)
    light += frame.background((ny, nx))
    if frame.trail:
        light += _trail((ny, nx), rng)[..., None]
    behind = _behind_filters(light, recipe.pattern)
    electrons = rng.poisson(np.maximum(behind, 0)) + rng.normal(0, READ_NOISE, (ny, nx))
    electrons += truth.heat
    rows, columns = rng.integers(0, ny, recipe.cosmics), rng.integers(0, nx, recipe.cosmics)
    electrons[rows, columns] += rng.uniform(2000, 30000, recipe.cosmics)
    return np.clip(np.rint(electrons + PEDESTAL), 0, 65535).astype(np.uint16)


def _trail(shape: tuple[int, int], rng: np.random.Generator) -> FloatImage:
    """A satellite: a straight line right across the frame, 2.8 px wide, ``(ny, nx)`` ADU."""
    (ny, nx), angle = shape, rng.uniform(0, np.pi)
    y = np.arange(ny, dtype=np.float32)[:, None] - np.float32(rng.uniform(0.2, 0.8) * ny)
    x = np.arange(nx, dtype=np.float32)[None, :] - np.float32(rng.uniform(0.2, 0.8) * nx)
    distance = x * np.float32(math.sin(angle)) - y * np.float32(math.cos(angle))
    return np.float32(rng.uniform(600, 3000)) * np.exp(-0.5 * (distance / np.float32(1.2)) ** 2)


def _behind_filters(light: FloatImage, pattern: str | None) -> FloatImage:
    """The one channel that every pixel of the detector sees."""
    if pattern is None:
        return light[..., 0]
    seen = np.empty(light.shape[:2], np.float32)
    for i, letter in enumerate(pattern):
        y, x = divmod(i, 2)
        seen[y::2, x::2] = light[y::2, x::2, "RGB".index(letter)]
    return seen


def _within(x: NDArray[np.float64], y: NDArray[np.float64], shape: tuple[int, int], margin: float) -> NDArray[np.bool_]:
    ny, nx = shape
    inside_x = (x > -0.5 - margin) & (x < nx - 0.5 + margin)
    return inside_x & (y > -0.5 - margin) & (y < ny - 0.5 + margin)


def _add_stars(
    image: FloatImage,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: FloatImage,
    fwhm: float,
    reach: int,
) -> None:
    """Add round Moffat stars to ``(ny, nx, C)`` in place; the PSF includes the pixel's own size."""
    ny, nx, channels = image.shape
    alpha2 = (fwhm / 2) ** 2 / (2 ** (1 / MOFFAT_BETA) - 1)
    offsets = np.arange(-reach, reach + 1)
    rows = np.rint(y).astype(int)[:, None, None] + offsets[:, None]
    columns = np.rint(x).astype(int)[:, None, None] + offsets[None, :]
    r2 = (rows - y[:, None, None]) ** 2 + (columns - x[:, None, None]) ** 2
    psf = (MOFFAT_BETA - 1) / (np.pi * alpha2) * (1 + r2 / alpha2) ** -MOFFAT_BETA
    inside = (rows >= 0) & (rows < ny) & (columns >= 0) & (columns < nx)
    star = np.broadcast_to(np.arange(len(x))[:, None, None], inside.shape)[inside]
    pixel = ((rows * nx + columns) * channels)[inside]
    for c in range(channels):
        np.add.at(image.reshape(-1), pixel + c, (psf[inside] * flux[star, c]).astype(np.float32))
