"""Trust nothing: a WCS is held against the stars."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS, Sip
from real_sky import Camera, StarList, observe

from zemosaic.calibrate import Calibration
from zemosaic.demo import make_field
from zemosaic.frames import read_frame
from zemosaic.measure import measure_frame
from zemosaic.solve.catalogue import load_catalogue
from zemosaic.solve.verify import Check, verify
from zemosaic.stars import Aperture

S50 = Camera()
PLACES = [(83.8, 10.0), (192.9, 27.1), (359.98, -60.0), (10.0, 90.0), (200.0, -89.9)]


def check(wcs: WCS, frame: StarList, camera: Camera = S50) -> Check:
    return verify(wcs, *frame.x_y_flux, camera.shape, load_catalogue())


def changed(wcs: WCS, **changes) -> WCS:
    """A copy with other numbers."""
    wcs = wcs.deepcopy()
    for name, value in changes.items():
        setattr(wcs.wcs, name, value)
    wcs.wcs.set()
    return wcs


def turned(wcs: WCS, degrees: float) -> WCS:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return changed(wcs, cd=wcs.wcs.cd @ np.array([[cos, -sin], [sin, cos]]))


@pytest.mark.parametrize(("ra", "dec"), PLACES)
def test_the_true_wcs_is_good_anywhere_on_the_sky(ra, dec):
    rng = np.random.default_rng(1)
    for _ in range(3):
        frame = observe(load_catalogue(), ra, dec, S50, rng)
        found = check(frame.wcs, frame)
        assert found.state == "good"
        assert 0.15 < found.rms < 0.6 and 0.6 * frame.catalogued < found.matched <= found.expected


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("shifted by 2 px", lambda w: changed(w, crpix=w.wcs.crpix + [2, 0])),
        ("shifted by 10 px", lambda w: changed(w, crpix=w.wcs.crpix + [6, -8])),
        ("shifted by 2 arcmin", lambda w: changed(w, crval=w.wcs.crval + [0, 1 / 30])),
        ("scale doubled", lambda w: changed(w, cd=2 * w.wcs.cd)),
        ("scale off by 0.5 %", lambda w: changed(w, cd=1.005 * w.wcs.cd)),
        ("mirrored", lambda w: changed(w, cd=w.wcs.cd @ np.diag([-1, 1]))),
        ("upside down", lambda w: turned(w, 180)),
        ("turned by 0.3 degrees", lambda w: turned(w, 0.3)),
        ("on the other side", lambda w: changed(w, crval=[(w.wcs.crval[0] + 180) % 360, -w.wcs.crval[1]])),
    ],
)
def test_a_wcs_that_is_off_is_wrong(name, spoil):
    rng = np.random.default_rng(2)
    for ra, dec in PLACES[:3]:
        frame = observe(load_catalogue(), ra, dec, S50, rng)
        found = check(spoil(frame.wcs), frame)
        assert found.state == "wrong", name
        assert np.isnan(found.rms) or found.rms > 1.5


def test_the_error_of_a_slightly_wrong_wcs_is_measured():
    rng = np.random.default_rng(3)
    frame = observe(load_catalogue(), 83.8, 10.0, S50, rng)
    for shift, state in ((1.0, "good"), (2.0, "wrong"), (4.0, "wrong")):
        found = check(changed(frame.wcs, crpix=frame.wcs.wcs.crpix + [shift, 0]), frame)
        assert found.state == state and found.rms == pytest.approx(np.hypot(shift, 0.35), abs=0.25)


def test_distortion_is_part_of_the_claim():
    """What a strongly distorted frame's linear WCS is wrong about, its SIP terms put right."""
    rng = np.random.default_rng(4)
    camera = replace(S50, distortion=12)
    frame = observe(load_catalogue(), 83.8, 10.0, camera, rng)
    assert check(frame.wcs, frame).state == "wrong"
    # x_true = x + A(x); the frame has x_seen = x_true (1 + k r²) about the centre: to first order A is -k r² x.
    strength = 12 / (np.hypot(*S50.shape) / 2) ** 3
    a, b = np.zeros((4, 4)), np.zeros((4, 4))
    a[3, 0] = a[1, 2] = b[0, 3] = b[2, 1] = -strength
    sip = changed(frame.wcs, ctype=["RA---TAN-SIP", "DEC--TAN-SIP"])
    sip.sip = Sip(a, b, None, None, frame.wcs.wcs.crpix)
    found = check(sip, frame)
    assert found.state == "good" and found.rms < 0.6


def test_a_few_stars_suffice_to_confirm_but_not_to_condemn():
    rng = np.random.default_rng(5)
    camera = replace(S50, shape=(500, 500))
    frame = observe(load_catalogue(), 192.9, 27.1, camera, rng)
    assert 3 <= frame.catalogued < 8
    assert check(frame.wcs, frame, camera).state == "good"
    found = check(turned(frame.wcs, 180), frame, camera)
    assert found.state == "unchecked" and found.expected < 8 and np.isnan(found.rms)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_frame_without_stars_cannot_be_checked(count):
    frame = observe(load_catalogue(), 83.8, 10.0, S50, np.random.default_rng(6))
    empty = np.linspace(5, 500, count)
    found = verify(frame.wcs, empty, empty, empty, S50.shape, load_catalogue())
    assert found.state == "unchecked" and found.expected == count and np.isnan(found.rms)


def test_other_frames_of_reference_are_turned_to_that_of_the_catalogue():
    rng = np.random.default_rng(7)
    frame = observe(load_catalogue(), 83.8, 10.0, S50, rng)
    galactic = WCS(naxis=2)
    centre, right, up = frame.wcs.pixel_to_world([539.5, 540.5, 539.5], [959.5, 959.5, 960.5]).galactic
    galactic.wcs.ctype = ["GLON-TAN", "GLAT-TAN"]
    galactic.wcs.crval = [centre.l.deg, centre.b.deg]
    galactic.wcs.crpix = frame.wcs.wcs.crpix
    offsets = [centre.spherical_offsets_to(there) for there in (right, up)]
    galactic.wcs.cd = np.array([[east.deg, north.deg] for east, north in offsets]).T
    galactic.wcs.set()
    assert check(galactic, frame).state == "good"
    # The same numbers said to be of 2025 mean a place a third of a degree away.
    assert check(changed(frame.wcs, radesys="FK5", equinox=2025.0), frame).state == "wrong"


def test_invented_stars_do_not_confirm_a_true_wcs(tmp_path):
    """A simulated sub: its WCS is right, its stars are not of this sky. Whoever asks must look at all frames."""
    make_field(tmp_path, frames=1, panels=(1, 1), shape=(1080, 1920))
    sub = read_frame(next(tmp_path.glob("*.fit*")))
    stars = measure_frame(sub, Calibration(), Aperture()).stars
    assert verify(sub.wcs, stars.x, stars.y, stars.flux, sub.shape, load_catalogue()).state == "wrong"


def test_real_sidecars_are_good_and_real_headers_may_be_wrong(shared_data, tmp_path):
    states = {}
    for path in sorted(shared_data.glob("asi224-m27/*.gz")) + sorted(shared_data.glob("seestar-ngc7023*/*.gz")):
        alone = tmp_path / path.name
        shutil.copy(path, alone)
        sub, without_sidecar = read_frame(path), read_frame(alone)
        stars = measure_frame(sub, Calibration(), Aperture()).stars
        found = verify(sub.wcs, stars.x, stars.y, stars.flux, sub.shape, load_catalogue())
        assert found.state == "good" and found.rms < 0.7, path.name
        if without_sidecar.wcs is not None:
            header = verify(without_sidecar.wcs, stars.x, stars.y, stars.flux, sub.shape, load_catalogue())
            states[path.name[:10]] = header.state
    assert states == {"Light_1069": "wrong", "Light_1264": "wrong", "Light_NGC_": "good"}
