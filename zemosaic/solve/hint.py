"""Where to look first: what the header says of a frame's position and scale, and what is known of its camera."""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass

import erfa
import numpy as np
from astropy.wcs.utils import proj_plane_pixel_area

from zemosaic.frames import Frame

_ARCSEC_PER_RADIAN = 206264.806
_HEADER_ERROR = 0.05  # of a scale from FOCALLEN, which is mostly nominal
_KNOWN_ERROR = 0.03
_POINTING_ERROR = 1.0  # degrees
_SAME_SCALE = 0.02

# (words in INSTRUME or CREATOR, arcseconds per pixel unbinned, pixels along the longer side). Scales from focal length
# and pixel size; that of the S50 as measured.
_CAMERAS = (
    (r"SEESTAR\W*S50", 2.37, 1920),
    (r"SEESTAR\W*S30\W*PRO", 3.74, 3840),
    (r"SEESTAR\W*S30", 3.99, 1920),
    (r"DWARF\W*(II|2)\b", 2.99, 3840),
    (r"DWARF\W*(III|3)\b", 2.75, 3840),
    (r"DWARF\W*MINI", 3.99, 1920),
    (r"VESPERA\W*PRO", 1.65, 3536),
    (r"VESPERA\W*(II|2)\b", 2.39, 3840),
    (r"VESPERA", 2.99, 1920),
    (r"CELESTRON\W*ORIGIN", 1.48, 3072),
)
_HOURS = re.compile(r"DWARF", re.IGNORECASE)  # may write RA as a number of hours


@dataclass(frozen=True)
class Hint:
    """Where a frame may be.

    Parameters
    ----------
    ra, dec : float or None
        Centre, degrees, ICRS; None for anywhere.
    radius : float
        Degrees around it in which the centre of the frame is looked for first.
    scale : float or None
        Arcseconds per pixel; None if not known.
    scale_error : float
        By how much of it the scale may be off.
    """

    ra: float | None = None
    dec: float | None = None
    radius: float = _POINTING_ERROR
    scale: float | None = None
    scale_error: float = _HEADER_ERROR


def hint_of(frame: Frame) -> tuple[Hint, ...]:
    """What the header says and what is known of the camera, likeliest first; never empty.

    A header does not say whether its pointing is of date (as a Seestar's) or J2000: the radius covers both readings.
    For a frame without a pointing or a focal length the WCS of its header is asked, if it has one. The last hints leave
    the scale open.
    """
    hints = [
        Hint(*position, scale=scale, scale_error=error)
        for scale, error in _scales(frame)
        for position in _positions(frame)
    ]
    return (*hints, *(Hint(*position) for position in _positions(frame)))


def _positions(frame: Frame) -> list[tuple[float | None, float | None, float]]:
    if frame.ra is not None and frame.dec is not None:
        read = [frame.ra]
        if frame.ra < 24 and _HOURS.search(frame.instrument):
            read.append(15 * frame.ra)
        return [_both_equinoxes(ra, frame.dec, frame.date_obs) for ra in read]
    if frame.wcs is not None:
        ny, nx = frame.shape
        ra, dec = frame.wcs.all_pix2world([[(nx - 1) / 2, (ny - 1) / 2]], 0)[0]
        return [(float(ra), float(dec), _POINTING_ERROR)]
    return [(None, None, _POINTING_ERROR)]


def _both_equinoxes(ra: float, dec: float, date: str) -> tuple[float, float, float]:
    """Centre and radius of a circle around a pointing read as J2000 and the same read as of date."""
    if not date:
        return ra, dec, _POINTING_ERROR
    days = (datetime.date.fromisoformat(date[:10]) - datetime.date(2000, 1, 1)).days  # J2000 is the noon of that day
    given = np.array(erfa.s2c(math.radians(ra), math.radians(dec)))
    # Bias and precession (IAU 2006) lead from J2000 to the date; nutation (0.005°) does not matter here.
    then = erfa.pmat06(erfa.DJ00, days).T @ given
    middle_ra, middle_dec = erfa.c2s(given + then)
    apart = float(np.linalg.norm(then - given)) / 2
    return math.degrees(middle_ra) % 360, math.degrees(middle_dec), _POINTING_ERROR + math.degrees(apart)


def _scales(frame: Frame) -> list[tuple[float, float]]:
    """Scales in arcseconds per pixel, each with its relative error, likeliest first, none twice."""
    found = []
    if frame.focal_length and frame.pixel_size:
        found.append((_ARCSEC_PER_RADIAN * 1e-3 * frame.pixel_size / frame.focal_length, _HEADER_ERROR))
    name = f"{frame.instrument} {frame.creator}".upper()
    known = next(((scale, side) for words, scale, side in _CAMERAS if re.search(words, name)), None)
    if known:
        scale, side = known
        ratio = side / max(frame.shape)
        binning = round(ratio) if abs(ratio - round(ratio)) < 0.02 and ratio > 0.98 else 1  # else a crop
        found.append((scale * binning, _KNOWN_ERROR))
    if not found and frame.wcs is not None:
        found.append((3600 * math.sqrt(float(proj_plane_pixel_area(frame.wcs))), _HEADER_ERROR))
    kept: list[tuple[float, float]] = []
    for scale, error in found:
        if all(abs(scale / other - 1) > _SAME_SCALE for other, _ in kept):
            kept.append((scale, error))
    return kept
