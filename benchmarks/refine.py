"""How well global refinement makes frames agree, and how long it takes: simulated star lists with a known truth.

    python benchmarks/refine.py [--frames 1000] [--stars 300] [--panels 3 2] [--noise 0.1] [--solved 0.15] [--sip 4]
                                [--catalogue] [--seed 1]

Stars are strewn over a field, cameras with a distortion look at panels of it, and their lists of stars get centroid
noise, gaps and false stars. Frames come with a WCS as a solver would find it: linear, off by `--solved` pixels.
Printed are, before and after: the distance of where frames see a star from the mean of all that see it (relative:
median and 95th percentile, pixels), and the distance of that mean from the truth (absolute: rms, arcsec).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.demo import tangent_header
from zemosaic.solve.catalogue import Catalogue
from zemosaic.solve.refine import Observation, refine

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A field and the frames taken of it."""

    frames: int = 60
    panels: tuple[int, int] = (1, 1)  #: across and down
    overlap: float = 0.25  #: share of a panel's side
    shape: tuple[int, int] = (1920, 1080)  #: (ny, nx)
    scale: float = 2.37  #: arcsec per pixel
    center: tuple[float, float] = (83.8, 10.0)  #: degrees
    rotation: float = 10.0  #: degrees, plus and minus
    dither: float = 25.0  #: pixels, 1 sigma
    stars: int = 300  #: in a frame's list, the brightest it sees
    density: float = 1.3  #: stars of the field to one in a frame's list
    noise: float = 0.1  #: pixels per axis
    missing: float = 0.15  #: share of stars that a frame overlooks
    false: float = 0.05  #: share of its list that are no stars
    sip: float = 0.0  #: pixels at the corners
    parity: int = 1
    solved: float = 0.15  #: pixels rms by which the linear WCSs given are off; 0 gives the true ones
    seed: int = 1


@dataclass(frozen=True)
class Simulation:
    """Observations, and the truth about them."""

    observations: list[Observation]
    truth: list[WCS]
    ra: Floats
    dec: Floats
    catalogue: Catalogue  #: the brightest stars, with the errors of a real catalogue


def simulate(setup: Setup) -> Simulation:
    """Strew stars, point cameras, list stars."""
    rng = np.random.default_rng(setup.seed)
    ny, nx = setup.shape
    plane = WCS(tangent_header(*setup.center, (1, 1), scale=setup.scale))
    aims = panel_centres(setup)
    radius = float(np.hypot(*np.abs(aims).max(axis=0))) + math.hypot(nx, ny) / 2 + 5 * setup.dither
    count = int(setup.density * setup.stars / (nx * ny) * math.pi * radius**2)
    r, angle = radius * np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
    ra, dec = plane.all_pix2world(r * np.cos(angle), r * np.sin(angle), 0)
    flux = rng.random(count) ** -1.5
    observations, truth = [], []
    for i in range(setup.frames):
        aim = aims[i * len(aims) // setup.frames] + rng.normal(0, setup.dither, 2)
        true = pointing(setup, plane, aim, rng)
        truth.append(true)
        x, y, brightness = list_stars(setup, true, (ra, dec, flux), rng)
        given = solved(setup, true, rng)
        observations.append(Observation(x, y, brightness, given, setup.shape, "camera"))
    bright = np.argsort(-flux)[: count // 8]
    error = rng.normal(0, 0.3 / 3600, (2, len(bright)))
    catalogue = Catalogue(
        ra[bright] + error[0] / np.cos(np.radians(dec[bright])), dec[bright] + error[1], -np.log(flux[bright])
    )
    return Simulation(observations, truth, ra, dec, catalogue)


def panel_centres(setup: Setup) -> Floats:
    """``(n, 2)`` pixels from the middle of the field."""
    (across, down), (ny, nx) = setup.panels, setup.shape
    x = (np.arange(across) - (across - 1) / 2) * nx * (1 - setup.overlap)
    y = (np.arange(down) - (down - 1) / 2) * ny * (1 - setup.overlap)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def pointing(setup: Setup, plane: WCS, aim: Floats, rng: np.random.Generator) -> WCS:
    """The true WCS of a frame that looks at a point of the plane, turned by chance."""
    (ra, ra_up), (dec, dec_up) = plane.all_pix2world([aim[0], aim[0]], [aim[1], aim[1] + 1], 0)
    # Position angle of the plane's y axis there: near a pole it is not north.
    turn = math.degrees(
        math.atan2(math.sin(math.radians(ra_up - ra)) * math.cos(math.radians(dec_up)), math.radians(dec_up - dec))
    )
    angle = turn + setup.rotation * rng.uniform(-1, 1)
    header = tangent_header(
        ra, dec, setup.shape, scale=setup.scale, angle_deg=angle, parity=setup.parity, sip_px=setup.sip
    )
    return as_wcs(header, setup.shape)


def as_wcs(header: fits.Header, shape: tuple[int, int]) -> WCS:
    wcs = WCS(header)
    wcs.pixel_shape = shape[::-1]
    return wcs


def list_stars(
    setup: Setup, wcs: WCS, sky: tuple[Floats, Floats, Floats], rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """x, y and flux of what a frame sees."""
    ny, nx = setup.shape
    ra, dec, flux = sky
    x, y = wcs.wcs_world2pix(ra, dec, 0)
    near = np.flatnonzero((np.abs(x - nx / 2) < nx / 2 + 20) & (np.abs(y - ny / 2) < ny / 2 + 20))
    x, y = wcs.all_world2pix(ra[near], dec[near], 0, tolerance=1e-5)
    seen = (x > 0) & (x < nx - 1) & (y > 0) & (y < ny - 1) & (rng.random(len(x)) > setup.missing)
    x, y, flux = x[seen], y[seen], flux[near[seen]] * rng.normal(1, 0.05, seen.sum())
    top = np.argsort(-flux)[: setup.stars]
    x, y, flux = (a[top] for a in (x, y, flux))
    x, y = x + rng.normal(0, setup.noise, len(x)), y + rng.normal(0, setup.noise, len(x))
    fake = rng.random(len(x)) < setup.false
    x[fake], y[fake] = rng.uniform(0, nx - 1, fake.sum()), rng.uniform(0, ny - 1, fake.sum())
    return x, y, flux


def solved(setup: Setup, true: WCS, rng: np.random.Generator) -> WCS:
    """The linear WCS that a solver would find: the best fit over the frame, off by noise."""
    if not setup.solved:
        return true
    ny, nx = setup.shape
    x, y = (g.ravel() for g in np.meshgrid(np.linspace(0, nx - 1, 9), np.linspace(0, ny - 1, 9)))
    linear = true.deepcopy()
    linear.sip = None
    linear.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    px, py = linear.wcs_world2pix(*true.all_pix2world(x, y, 0), 0)
    centre = np.array([(nx - 1) / 2, (ny - 1) / 2])
    design = np.c_[np.ones_like(x), x - centre[0], y - centre[1]]
    fit = np.linalg.lstsq(design, np.c_[px, py] - centre, rcond=None)[0]
    half = math.hypot(nx, ny) / 2 / math.sqrt(6)
    fit += rng.normal(0, setup.solved / math.sqrt(6), (3, 2)) / np.array([[1], [half], [half]])
    linear.wcs.cd = linear.wcs.cd @ fit[1:].T
    linear.wcs.crpix = linear.wcs.crpix - np.linalg.solve(fit[1:].T, fit[0])
    return as_wcs(linear.to_header(), setup.shape)


def score(simulation: Simulation, wcs: Sequence[WCS], shape: tuple[int, int]) -> tuple[float, float, float]:
    """Relative median and 95th percentile (pixels) and absolute rms (arcsec)."""
    ny, nx = shape
    apart, star, scales = [], [], []
    for found, true in zip(wcs, simulation.truth, strict=True):
        x, y = true.wcs_world2pix(simulation.ra, simulation.dec, 0)
        at = np.flatnonzero((x > 0) & (x < nx - 1) & (y > 0) & (y < ny - 1))[::3]
        x, y = true.all_world2pix(simulation.ra[at], simulation.dec[at], 0, tolerance=1e-5)
        ra, dec = found.all_pix2world(x, y, 0)
        east = (ra - simulation.ra[at] + 180) % 360 - 180
        apart.append(np.c_[east * np.cos(np.radians(simulation.dec[at])), dec - simulation.dec[at]] * 3600)
        star.append(at)
        scales.append(np.full(len(at), math.sqrt(abs(np.linalg.det(true.pixel_scale_matrix))) * 3600))
    error, number, scale = np.concatenate(apart), np.concatenate(star), np.concatenate(scales)
    number = np.unique(number, return_inverse=True)[1]
    count = np.bincount(number)
    mean = np.stack([np.bincount(number, e) / count for e in error.T], axis=1)
    relative = np.linalg.norm(error - mean[number], axis=1) / scale
    relative = relative[count[number] > 1]
    absolute = math.sqrt(float((mean**2).sum(axis=1).mean()))
    return float(np.median(relative)), float(np.percentile(relative, 95)), absolute


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, refine, print."""
    parser = argparse.ArgumentParser(description="Accuracy and speed of global refinement on simulated star lists.")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--stars", type=int, default=300, help="in a frame's list (300)")
    parser.add_argument("--panels", type=int, nargs=2, default=(3, 2), help="across and down (3 2)")
    parser.add_argument("--noise", type=float, default=0.1, help="of a centroid, pixels per axis (0.1)")
    parser.add_argument("--solved", type=float, default=0.15, help="error of the WCSs given, pixels rms (0.15)")
    parser.add_argument("--sip", type=float, default=4.0, help="distortion at the corners, pixels (4)")
    parser.add_argument("--catalogue", action="store_true", help="anchor on a catalogue with errors of 0.3 arcsec")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args(argv)
    setup = Setup(
        frames=o.frames, panels=tuple(o.panels), stars=o.stars, noise=o.noise, solved=o.solved, sip=o.sip, seed=o.seed
    )
    simulation = simulate(setup)
    start = time.process_time()
    result = refine(simulation.observations, simulation.catalogue if o.catalogue else None)
    seconds = time.process_time() - start
    states = [frame.state for frame in result.frames]
    print(f"{o.frames} frames of {np.mean([len(s.x) for s in simulation.observations]):.0f} stars: {seconds:.1f} s CPU")
    print("states  ", {state: states.count(state) for state in sorted(set(states))})
    print("         relative median     p95 px   absolute arcsec")
    for name, wcs in (
        ("before", [s.wcs for s in simulation.observations]),
        ("after", [frame.wcs for frame in result.frames]),
    ):
        median, p95, absolute = score(simulation, wcs, setup.shape)
        print(f"  {name:8s} {median:14.3f} {p95:9.3f} {absolute:15.3f}")
    print(f"  itself   {result.median:14.3f} {result.p95:9.3f} {result.absolute:15.3f}  ({result.anchors} anchors)")
    for distortion in result.distortions:
        print(f"  distortion of {distortion.instrument}: {distortion.corner:.2f} px at the corners")


if __name__ == "__main__":
    main()
