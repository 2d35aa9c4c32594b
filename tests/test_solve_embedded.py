"""The embedded solver: on star lists with real positions, on rendered frames, on real subs, and on nonsense."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from astropy.coordinates import FK5, SkyCoord
from astropy.io import fits
from real_sky import Camera, aim, anywhere, observe, off, render
from scipy.spatial import cKDTree

from zemosaic.calibrate import Calibration
from zemosaic.frames import Frame, read_frame
from zemosaic.measure import measure_frame
from zemosaic.solve.catalogue import Catalogue, load_catalogue
from zemosaic.solve.embedded import SolveError, solve
from zemosaic.solve.hint import Hint, hint_of
from zemosaic.solve.match import find_places, sky_triangles, thin_out
from zemosaic.solve.placement import Placement, deproject, project
from zemosaic.sphere import to_vectors
from zemosaic.stars import Aperture

S50 = Camera()
S30 = replace(S50, scale=3.99)
WIDE = replace(S50, scale=4.5, shape=(3000, 4000))
SMALL = replace(S50, scale=20.0, shape=(240, 320))


@cache
def patch_of_sky() -> Catalogue:
    """Twenty degrees around the pole: an index of the whole of it is built in no time."""
    return load_catalogue().cone(0.0, 90.0, 20.0)


def near(ra: float, dec: float, rng: np.random.Generator, camera: Camera) -> Hint:
    """A hint up to a degree off, with a scale up to 2 % off."""
    away = math.radians(rng.uniform(0, 1))
    angle = rng.uniform(0, 2 * math.pi)
    there = deproject(math.tan(away) * np.array([[math.sin(angle), math.cos(angle)]]), ra, dec)
    return Hint(float(there[0][0]), float(there[1][0]), scale=camera.scale * rng.uniform(0.98, 1.02))


@pytest.mark.parametrize(
    ("camera", "count"), [(S50, 40), (S30, 20), (WIDE, 10), (SMALL, 10)], ids=["S50", "S30", "5 degrees", "small"]
)
def test_hinted_frames_are_found_all_over_the_sky(camera, count):
    rng = np.random.default_rng(11)
    for _ in range(count):
        ra, dec = anywhere(rng)
        frame = observe(load_catalogue(), ra, dec, camera, rng)
        found = solve(*frame.x_y_flux, camera.shape, [near(ra, dec, rng, camera)], load_catalogue(), blind=False)
        assert off(found.wcs, frame.wcs) < 0.7, (ra, dec)
        assert found.matched >= 6 and found.rms < 1 and found.log_odds > 27.6
        assert found.wcs.pixel_shape == frame.wcs.pixel_shape
        assert found.tried and all(name.startswith("within") for name in found.tried)


@pytest.mark.parametrize("parity", [-1, 1])
@pytest.mark.parametrize(("ra", "dec"), [(0.0, 90.0), (77.0, -89.8), (0.0, 3.0), (359.98, -60.0)])
def test_poles_and_ra_zero_are_places_like_any_other(ra, dec, parity):
    rng = np.random.default_rng(12)
    frame = observe(load_catalogue(), ra, dec, S50, rng, parity=parity)
    found = solve(*frame.x_y_flux, S50.shape, [near(ra, dec, rng, S50)], load_catalogue(), blind=False)
    assert off(found.wcs, frame.wcs) < 0.7
    assert math.copysign(1, np.linalg.det(found.wcs.wcs.cd)) == parity


@pytest.mark.parametrize(
    "camera",
    [
        replace(S50, distortion=4),
        replace(S50, noise=0.9, depth=1.2, blend=15),
        replace(S50, cloud=0.5, depth=1.2),
        replace(S50, invented=0.15, missed=0.2),
        replace(S50, shape=(960, 1080)),
    ],
    ids=["distorted", "blurred", "clouded", "phantoms", "cropped"],
)
def test_spoilt_frames_are_found_too(camera):
    rng = np.random.default_rng(13)
    for _ in range(8):
        ra, dec = float(rng.uniform(60, 110)), float(rng.uniform(-10, 70))  # where half a frame has stars enough
        frame = observe(load_catalogue(), ra, dec, camera, rng)
        found = solve(*frame.x_y_flux, camera.shape, [near(ra, dec, rng, camera)], load_catalogue(), blind=False)
        assert off(found.wcs, frame.wcs) < 2.5, (ra, dec)


@pytest.mark.parametrize(("camera", "known"), [(S50, True), (S50, False), (S30, False), (WIDE, False)])
def test_frames_are_found_without_a_position(camera, known):
    rng = np.random.default_rng(14)
    hint = Hint(scale=1.02 * camera.scale) if known else Hint()
    for _ in range(6):
        ra, dec = float(rng.uniform(0, 360)), float(rng.uniform(76, 90))
        frame = observe(patch_of_sky(), ra, dec, camera, rng)
        found = solve(*frame.x_y_flux, camera.shape, [hint], patch_of_sky())
        assert off(found.wcs, frame.wcs) < 0.7, (ra, dec)
        assert found.tried[-1] == ("the whole sky at 2.42″ per pixel" if known else "the whole sky at any scale")


def test_a_pointing_helps_where_the_scale_is_not_known():
    rng = np.random.default_rng(15)
    for camera in (S50, S30, WIDE, SMALL):
        ra, dec = anywhere(rng)
        frame = observe(load_catalogue(), ra, dec, camera, rng)
        hint = replace(near(ra, dec, rng, camera), scale=None)
        found = solve(*frame.x_y_flux, camera.shape, [hint], load_catalogue(), blind=False)
        assert off(found.wcs, frame.wcs) < 0.7


def test_a_pointing_far_off_is_made_good_by_looking_wider():
    rng = np.random.default_rng(16)
    frame = observe(load_catalogue(), 120.0, 30.0, S50, rng)
    far, lost = (Hint(120.0, dec, radius=0.5, scale=S50.scale) for dec in (33.5, -36.0))
    found = solve(*frame.x_y_flux, S50.shape, [lost, far], load_catalogue(), blind=False)
    assert off(found.wcs, frame.wcs) < 0.7 and found.tried[-1] == "within 5° of 120.00° +33.50°"
    with pytest.raises(SolveError, match=r"\(tried: within 0.5° of 120.00° \+33.50°\)$"):
        solve(*frame.x_y_flux, S50.shape, [far], load_catalogue(), wider=False, blind=False)


def test_neither_random_points_nor_other_places_are_solved():
    rng = np.random.default_rng(17)
    for i in range(10):
        if i % 2:
            frame = observe(load_catalogue(), *anywhere(rng), S50, rng)
            x, y, flux = frame.x_y_flux
        else:
            count = [6, 12, 40, 150, 400][i // 2]
            (x, y), flux = rng.uniform(0, [1080, 1920], (count, 2)).T, rng.random(count)
        hint = Hint(*anywhere(rng), radius=0.3, scale=S50.scale)
        with pytest.raises(SolveError, match=r"no place on the sky fits its \d+ stars \(tried: within 0.3° of "):
            solve(x, y, flux, S50.shape, [hint], load_catalogue(), blind=False)


def test_a_wrong_scale_is_no_way_to_be_right():
    """The true place is in reach, but at a scale that the hint excludes."""
    rng = np.random.default_rng(18)
    frame = observe(load_catalogue(), 50.0, 50.0, S50, rng)
    with pytest.raises(SolveError):
        solve(*frame.x_y_flux, S50.shape, [Hint(50.0, 50.0, scale=2 * S50.scale)], load_catalogue(), blind=False)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e9])
def test_an_impossible_scale_is_passed_over(scale):
    """A focal length in micrometres, or of 0.25 mm."""
    rng = np.random.default_rng(25)
    frame = observe(patch_of_sky(), 50.0, 80.0, S50, rng)
    hints = [Hint(50.0, 80.0, scale=scale), Hint(50.0, 80.0)]
    found = solve(*frame.x_y_flux, S50.shape, hints, patch_of_sky())
    assert found.tried == ("within 1° of 50.00° +80.00° at any scale",)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_stars_are_said_to_be_too_few(count):
    stars = np.arange(1.0, count + 1)
    with pytest.raises(SolveError, match=f"its {count} stars are too few"):
        solve(stars, stars, stars, (100, 100), [Hint()], patch_of_sky())


def test_stars_without_a_position_or_flux_do_no_harm():
    rng = np.random.default_rng(19)
    frame = observe(load_catalogue(), 10.0, 20.0, S50, rng)
    x, y, flux = frame.x_y_flux
    colours = np.stack([flux, flux, flux], axis=1)
    colours[::7] = np.nan
    x, y = np.append(x, [np.nan, 5]), np.append(y, [7, np.inf])
    colours = np.concatenate([colours, np.full((2, 3), 1e9)])
    found = solve(x, y, colours, S50.shape, [near(10, 20, rng, S50)], load_catalogue(), blind=False)
    assert off(found.wcs, frame.wcs) < 0.7


def test_the_result_is_the_same_in_any_order_and_from_any_thread():
    rng = np.random.default_rng(20)
    frame = observe(patch_of_sky(), 40.0, 80.0, S50, rng)
    fresh = patch_of_sky()[np.arange(len(patch_of_sky()))]  # its index is not built yet

    def numbers(order):
        x, y, flux = (column[order] for column in frame.x_y_flux)
        found = solve(x, y, flux, S50.shape, [Hint(scale=S50.scale)], fresh)
        return (*found.wcs.wcs.crval, *found.wcs.wcs.cd.ravel(), *found.wcs.wcs.crpix, found.matched, found.log_odds)

    orders = [rng.permutation(len(frame.x)) for _ in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(numbers, orders))) == 1


@pytest.mark.parametrize("colour", ["bayer", "mono", "rgb"])
def test_rendered_frames_are_found_by_what_their_headers_say(tmp_path, colour):
    """From the file to the WCS: detection, of-date pointing, scale from the optics."""
    rng = np.random.default_rng(21)
    camera = replace(S50, shape=(1200, 900), depth=1.6)
    ra, dec = 315.4, 68.2
    frame = observe(load_catalogue(), ra, dec, camera, rng)
    pixels = render(frame, camera.shape, rng)
    today = SkyCoord(ra, dec, unit="deg").transform_to(FK5(equinox="J2025.5"))
    header = fits.Header({"RA": today.ra.deg, "DEC": today.dec.deg, "FOCALLEN": 250.0, "XPIXSZ": 2.9})
    header["DATE-OBS"] = "2025-07-01T23:00:00"
    if colour == "bayer":
        header["BAYERPAT"] = "GRBG"
    if colour == "rgb":
        pixels = np.stack([pixels, 0.8 * pixels, 1.2 * pixels])
    fits.writeto(tmp_path / "sub.fit", np.clip(pixels, 0, 65535).astype(np.uint16), header)
    sub = read_frame(tmp_path / "sub.fit")
    stars = measure_frame(sub, Calibration(), Aperture()).stars
    found = solve(stars.x, stars.y, stars.flux, sub.shape, hint_of(sub), load_catalogue(), blind=False)
    assert sub.colour == colour and len(found.tried) == 1
    assert off(found.wcs, frame.wcs) < 0.7


@pytest.mark.parametrize(
    ("pattern", "worst"),
    [
        ("seestar-ngc7023/*20240730*.fit.gz", 0.3),
        ("seestar-ngc7023/*20250630*.fit.gz", 0.5),
        ("seestar-ngc7023-panels/panel[045]*.fit.gz", 0.6),
        ("asi224-m27/*.fits.gz", 0.9),
    ],
)
def test_real_subs_are_placed_within_a_pixel(shared_data, pattern, worst):
    """Panels 1 to 3 show three to five catalogue stars, too few for certainty: only their neighbours can place them."""
    subs = sorted(shared_data.glob(pattern))
    assert subs
    for path in subs:
        sub = read_frame(path)
        stars = measure_frame(sub, Calibration(), Aperture()).stars
        found = solve(stars.x, stars.y, stars.flux, sub.shape, hint_of(sub), load_catalogue(), blind=False)
        assert off(found.wcs, sub.wcs) < worst, path.name  # the sidecar's, which the hint does not use
        assert len(found.tried) == 1


def test_a_panel_with_hardly_a_star_is_refused_rather_than_guessed(shared_data):
    sub = read_frame(next(shared_data.glob("seestar-ngc7023-panels/panel2*.fit.gz")))
    stars = measure_frame(sub, Calibration(), Aperture()).stars
    hints = [replace(hint_of(sub)[0], radius=0.3)]
    with pytest.raises(SolveError, match=f"fits its {len(stars)} stars"):
        solve(stars.x, stars.y, stars.flux, sub.shape, hints, load_catalogue(), blind=False)


def test_panels_with_hardly_a_star_are_found_among_the_stars_of_their_neighbours(shared_data):
    """Any catalogue will do: here Tycho-2 and the stars seen on the panels that were found by it."""
    subs = [read_frame(path) for path in sorted(shared_data.glob("seestar-ngc7023-panels/*.fit.gz"))]
    stars = [measure_frame(sub, Calibration(), Aperture()).stars for sub in subs]
    known = load_catalogue().cone(315.4, 68.2, 3.0)
    for i in (0, 4, 5, 1, 2, 3):
        hint = replace(hint_of(subs[i])[0], radius=0.4)
        found = solve(stars[i].x, stars[i].y, stars[i].flux, subs[i].shape, [hint], known, blind=False)
        assert off(found.wcs, subs[i].wcs) < 0.6, i
        ra, dec = found.wcs.wcs_pix2world(stars[i].x, stars[i].y, 0)
        mag = 20 - 2.5 * np.log10(stars[i].flux.sum(axis=1))
        directions = to_vectors(ra, dec)
        apart = cKDTree(to_vectors(known.ra, known.dec)).query(directions)[0]
        new = apart > math.radians(6 / 3600)
        known = Catalogue(*(np.append(a, b[new]) for a, b in ((known.ra, ra), (known.dec, dec), (known.mag, mag))))


# ------------------------------------------------------------------------------------------- hints


def frame_with(**facts) -> Frame:
    return Frame(Path("x.fit"), facts.pop("shape", (1920, 1080)), "bayer", **facts)


@pytest.mark.parametrize("date", ["2024-07-31T02:44:22.705983", "2024-07-31", "2024-07-31T23:59:60"])
def test_hint_covers_a_pointing_of_date_and_of_j2000(date):
    (hint, open_) = hint_of(frame_with(ra=315.5, dec=68.2, date_obs=date, focal_length=250.0, pixel_size=2.9))
    assert hint.scale == pytest.approx(2.393, abs=0.001) and hint.scale_error >= 0.01
    for reading in (
        SkyCoord(315.5, 68.2, unit="deg", frame=FK5(equinox="J2024.58")).icrs,
        SkyCoord(315.5, 68.2, unit="deg"),
    ):
        apart = reading.separation(SkyCoord(hint.ra, hint.dec, unit="deg")).deg
        assert apart < 0.06 and apart + 1 == pytest.approx(hint.radius, abs=0.01)
    assert open_ == replace(hint, scale=None)


def test_hint_without_a_date_takes_the_pointing_as_it_is():
    (hint, _) = hint_of(frame_with(ra=10.0, dec=-20.0, focal_length=510.0, pixel_size=3.75))
    assert (hint.ra, hint.dec, hint.radius) == (10.0, -20.0, 1.0)


@pytest.mark.parametrize(
    ("instrument", "shape", "scale"),
    [
        ("Seestar S50", (1920, 1080), 2.37),
        ("ZWO Seestar S50", (1000, 700), 2.37),
        ("Seestar S30", (1920, 1080), 3.99),
        ("Seestar S30 Pro", (3840, 2160), 3.74),
        ("DWARFII", (2160, 3840), 2.99),
        ("DWARFII", (1080, 1920), 5.98),
        ("DWARF 3", (2160, 3840), 2.75),
        ("Vespera Pro", (3536, 3536), 1.65),
        ("ZWO CCD ASI224MC", (976, 1304), None),
        ("", (1920, 1080), None),
    ],
)
def test_known_cameras_give_the_scale_that_a_header_lacks(instrument, shape, scale):
    hint = hint_of(frame_with(shape=shape, ra=10.0, dec=20.0, instrument=instrument))[0]
    assert hint.scale == (None if scale is None else pytest.approx(scale))


def test_a_header_that_contradicts_the_camera_is_tried_first():
    hints = hint_of(frame_with(ra=1.0, dec=2.0, instrument="Seestar S50", focal_length=150.0, pixel_size=2.9))
    assert [hint.scale and round(hint.scale, 2) for hint in hints] == [3.99, 2.37, None]


def test_a_right_ascension_in_hours_is_read_as_such_too():
    hints = hint_of(frame_with(ra=5.5, dec=-5.0, instrument="DWARFII"))
    assert [(hint.ra, hint.scale is None) for hint in hints] == [(5.5, False), (82.5, False), (5.5, True), (82.5, True)]


def test_a_frame_that_says_nothing_is_looked_for_anywhere():
    assert hint_of(frame_with()) == (Hint(),)


def test_a_wcs_serves_as_a_hint_where_nothing_else_does():
    wcs = aim(200.0, -30.0, S50)
    hint = hint_of(frame_with(wcs=wcs))[0]
    assert hint.ra == pytest.approx(200) and hint.dec == pytest.approx(-30) and hint.scale == pytest.approx(2.37)


# ------------------------------------------------------------------------------------------- parts


def test_thinning_keeps_the_brightest_of_every_cell():
    rng = np.random.default_rng(22)
    stars = Catalogue(
        rng.uniform(0, 360, 20_000), np.degrees(np.arcsin(rng.uniform(-1, 1, 20_000))), rng.random(20_000)
    )
    kept = thin_out(stars, 10.0, 5)
    assert (np.diff(kept) > 0).all()
    band = stars.dec // 10
    brightest = [np.flatnonzero(band == b)[np.argmin(stars.mag[band == b])] for b in np.unique(band)]
    assert np.isin(brightest, kept).all()
    assert 5 * 400 < len(kept) < 5 * 500  # 412 square cells of ten degrees, some cut
    assert len(thin_out(stars, 10.0, 20_000)) == 20_000
    assert not len(thin_out(stars[np.zeros(0, int)], 10.0, 5))


@pytest.mark.parametrize("parity", [-1, 1])
def test_places_point_where_the_frame_is(parity):
    """Exact star positions: the likeliest place is the true one, but for the curvature of the sky."""
    rng = np.random.default_rng(23)
    camera = replace(S50, noise=0, invented=0, missed=0, blend=0, colour=0)
    frame = observe(load_catalogue(), 33.0, -55.0, camera, rng, parity=parity)
    local = load_catalogue().cone(33.0, -55.0, 1.2)
    x, y, flux = frame.x_y_flux
    stars = (np.c_[x, y] - [539.5, 959.5])[np.argsort(-flux)]
    scale, half = math.radians(2.37 / 3600), math.hypot(1080, 1920) / 2
    found = find_places(sky_triangles(local, 6), stars[:60], half, (0.99 * scale, 1.01 * scale), limit=5)
    centre, right = to_vectors(*frame.wcs.wcs_pix2world([[539.5, 959.5], [539.5 + half, 959.5]], 0).T)
    assert np.abs(found.centre[0] - centre).max() < 0.01 * scale
    assert np.abs(found.right[0] - right).max() < 0.2 * scale
    assert found.mirrored[0] == (parity < 0) and found.votes[0] > 20 and found.pairs >= found.votes[0]
    assert (np.diff(found.votes) <= 0).all()


def test_a_placement_and_its_wcs_agree():
    matrix = np.radians(2.37 / 3600) * np.array([[0.8, 0.6], [-0.6, 0.8001]])
    placement = Placement(359.9, 88.0, matrix, np.array([1e-4, -2e-4]), (1000, 801))
    pixels = np.array([[-400.0, -499.5], [0, 0], [123.4, 456.7]])
    sky = placement.to_wcs().wcs_pix2world(pixels + [400, 499.5], 0)
    assert placement.to_pixels(*sky.T) == pytest.approx(pixels, abs=1e-6)
    assert placement.centre() == pytest.approx(tuple(sky[1]), abs=1e-10)


def test_projection_is_undone_by_its_inverse():
    rng = np.random.default_rng(24)
    plane = rng.uniform(-0.5, 0.5, (50, 2))
    for ra, dec in ((0.0, 90.0), (12.0, -90.0), (359.0, 0.0), (100.0, 47.0)):
        assert project(*deproject(plane, ra, dec), ra, dec) == pytest.approx(plane, abs=1e-12)
