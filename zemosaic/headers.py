"""What the header of a sub says: cards, camera facts, Bayer phase and sky coordinates. Pure; no files.

The cards are parsed here, not by `astropy.io.fits`, for three reasons: a card that breaks the standard
must cost its own value and nothing else; nothing may be printed (``warnings.catch_warnings`` is not
thread-safe before Python 3.14, and headers are read from threads); and it takes 0.1 ms. For the same
reason wcslib gets a header text made afresh from parsed numbers: it has nothing left to warn about.
"""

from __future__ import annotations

import datetime
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from astropy.wcs import WCS, Sip, WcsError, Wcsprm

Kind = Literal["light", "dark", "bias", "flat", "stack"]
Value = str | bool | int | float
Cards = Mapping[str, Value]

CARD_LENGTH = 80

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_STRING = re.compile(r"'((?:[^']|'')*)")
_HIERARCH = re.compile(r"HIERARCH\s+([^=]*?)\s*=(.*)", re.IGNORECASE)
_ISO_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d):(\d\d):(\d\d(?:\.\d*)?))?Z?")
_OLD_DATE = re.compile(r"(\d\d)/(\d\d)/(\d\d)")
_SEXAGESIMAL = re.compile(r"([+-]?)\s*(\d+)[\s:hd°]+(\d+)[\s:m']+(\d+(?:\.\d*)?)\s*[s\"]?")

_KINDS: dict[Kind, str] = {"light": "LIGHT", "flat": "FLAT", "dark": "DARK", "bias": "BIAS|OFFSET|ZERO"}

_BAYER_KEYS = ("BAYERPAT", "BAYERPATTERN", "COLORTYP", "COLORTYPE", "CFAIMAGE", "CFA")
_BAYER = re.compile(r"(?<![A-Z])(RGGB|GRBG|GBRG|BGGR)(?![A-Z])")
_OTHER_MOSAIC = re.compile(r"X-?TRANS|(?<![A-Z])(?:[RGB]{36}|CMYG2?|LRGB)(?![A-Z])")

_LONGITUDES = {"RA": "DEC", "GLON": "GLAT", "ELON": "ELAT", "HLON": "HLAT", "SLON": "SLAT"}
_RADESYS = {"ICRS", "FK5", "FK4", "FK4-NO-E"}
_MAX_AXES = 9
_MAX_SIP_ORDER = 9
_PV_TERMS = 40
_SCALES = (0.001, 1800)  # arcsec per pixel, of the largest telescope and an all-sky lens
_MAX_BEND = 4.0  # area of one pixel over another's; a gnomonic image 100 deg wide has 3.8 at its sides
_MAX_STRETCH = 1.25  # a pixel's length over its width; binning apart, they are square
_NEEDS_TABLE = "TAB"
_KEPT_BY_WCSLIB = {"TPV", "TNX", "ZPX"}


class HeaderError(ValueError):
    """A header that cannot be used; the message is the end of a sentence about the file."""


# ---------------------------------------------------------------------------------------------- cards


def parse_cards(cards: Iterable[str]) -> dict[str, Value]:
    """Keyword -> value of the cards up to END; the first of a repeated keyword counts.

    Parameters
    ----------
    cards : iterable of str
        80-character cards, or lines of a header kept as text; longer ones are cut, as FITS would.

    Returns
    -------
    dict
        Upper-case keyword (HIERARCH keywords by their own name) to str, bool, int or float. A value
        that is none of these is kept as the text it is; cards without a value are left out. Strings
        keep their blanks, which some conventions count; `text` strips them.
    """
    found: dict[str, Value] = {}
    for card in cards:
        card = card[:CARD_LENGTH]
        key, field = card[:8].rstrip().upper(), card[9:]
        if key == "END":
            break
        if card[8:9] != "=":
            hierarch = _HIERARCH.match(card)
            if not hierarch:
                continue
            key, field = hierarch[1].upper(), hierarch[2]
        value = _parse_value(field.lstrip())
        if value is not None:
            found.setdefault(key, value)
    return found


def _parse_value(field: str) -> Value | None:
    string = _STRING.match(field)
    if string:
        return string[1].replace("''", "'")
    token = field.split("/", 1)[0].strip()
    if token in ("T", "F"):
        return token == "T"
    try:
        return int(token)
    except ValueError:
        value = _to_float(token)
        return value if value is not None else (token or None)


def _to_float(token: str) -> float | None:
    try:
        value = float(token.replace("D", "E").replace("d", "e"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def format_card(key: str, value: Value) -> str:
    """The 80 characters of a valid card."""
    if isinstance(value, bool):
        shown = f"{'T' if value else 'F':>20}"
    elif isinstance(value, str):
        printable = re.sub(r"[^ -~]", " ", value).replace("'", "''")
        shown = f"'{printable:<8}'"
    else:
        shown = f"{value!r:>20}".upper()
    return f"{key:<8}= {shown}".ljust(CARD_LENGTH)[:CARD_LENGTH]


def number(cards: Cards, *keys: str, positive: bool = False) -> float | None:
    """The first of `keys` that holds a finite number, also one written as a string; else None.

    With `positive`, zero and negative values count as not given.
    """
    for key in keys:
        value = cards.get(key)
        if value is None or isinstance(value, bool):
            continue
        result = _to_float(str(value).strip())
        if result is not None and (result > 0 or not positive):
            return result
    return None


def whole(cards: Cards, key: str, default: int | None = None) -> int:
    """The integer that a file cannot be read without.

    Raises
    ------
    HeaderError
        If it is no integer, or is missing and there is no default.
    """
    value = number(cards, key)
    if value is None and default is not None and key not in cards:
        return default
    if value is None or value != int(value):
        raise HeaderError(f"has no valid {key} in its header; leave it out")
    return int(value)


def text(cards: Cards, *keys: str) -> str:
    """The first of `keys` that holds something to read, stripped; else an empty string.

    Control characters, which FITS forbids and a terminal obeys, count as blanks.
    """
    for key in keys:
        value = _CONTROL.sub(" ", str(cards.get(key, ""))).strip().strip("'\"").strip()
        if value:
            return value
    return ""


def printable(words: str) -> str:
    """The same words with escapes for what a terminal obeys and files of text cannot hold.

    Those are control characters, and the bytes of a file's name that are no UTF-8, which Python keeps as
    surrogates.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


# ---------------------------------------------------------------------------------------------- facts


def bayer_phase(cards: Cards, height: int) -> str | None:
    """Colour filter pattern of the array as stored, four letters row-major from pixel [0, 0].

    Parameters
    ----------
    cards : mapping
        Looked at: BAYERPAT, COLORTYP and their like; XBAYROFF, YBAYROFF (or BAYOFFX, BAYOFFY); ROWORDER.
    height : int
        Number of rows of the array.

    Returns
    -------
    str or None
        RGGB, GRBG, GBRG or BGGR; None where no keyword names a pattern (a mono sensor).

    Raises
    ------
    HeaderError
        For a mosaic that is not a Bayer pattern (X-Trans, CMYG, LRGB).

    Notes
    -----
    ROWORDER was introduced by Siril and CCDCiel, and N.I.N.A., ASTAP, INDI and SharpCap follow it
    (siril.readthedocs.io, "FITS > Orientation of FITS images"). Its meaning for the colours, as Siril
    applies it: with TOP-DOWN the pattern starts at the first stored row; with BOTTOM-UP it starts at
    the *last* stored row, the top of the displayed image, so that stored row y has the colours of
    pattern row ``height - 1 - y``. Without the keyword the pattern is that of the array as stored,
    as in the subs of a Seestar. The offsets then shift the pattern, by their parity alone.
    """
    pattern = _bayer_pattern(cards)
    if pattern is None:
        return None
    x_offset = int(number(cards, "XBAYROFF", "BAYOFFX") or 0)
    y_offset = int(number(cards, "YBAYROFF", "BAYOFFY") or 0)
    bottom_up = text(cards, "ROWORDER").upper() == "BOTTOM-UP"
    first_row = (height - 1 if bottom_up else 0) + y_offset
    return "".join(pattern[2 * ((first_row + y) % 2) + (x_offset + x) % 2] for y in (0, 1) for x in (0, 1))


def _bayer_pattern(cards: Cards) -> str | None:
    for key in _BAYER_KEYS:
        value = text(cards, key).upper()
        pattern = _BAYER.search(value)
        if pattern:
            return pattern[1]
        if _OTHER_MOSAIC.search(value):
            raise HeaderError(f"has a colour mosaic that is not supported ({key}='{value[:12]}')")
    return None


def frame_kind(cards: Cards) -> Kind:
    """What the image shows, from IMAGETYP and its like; a light where they say nothing that is known.

    A stack of several exposures is told by STACKCNT (Seestar, Siril), NCOMBINE (IRAF) or a master light.
    """
    named = text(cards, "IMAGETYP", "FRAMETYP", "FRAME", "OBSTYPE").upper()
    light: Kind = "light"
    kind = next((kind for kind, names in _KINDS.items() if re.search(names, named)), light)
    combined = max(number(cards, key) or 0 for key in ("STACKCNT", "NCOMBINE"))
    return "stack" if kind == "light" and (combined > 1 or "MASTER" in named or "STACK" in named) else kind


def start_time(cards: Cards) -> str:
    """Start of the exposure as ISO 8601 (UTC), from DATE-OBS and TIME-OBS; empty if not a valid date."""
    value = text(cards, "DATE-OBS", "DATE-BEG")
    old = _OLD_DATE.fullmatch(value)
    if old:  # FITS before 1997: DD/MM/YY, always of the 20th century
        value = f"19{old[3]}-{old[2]}-{old[1]}"
    if len(value) == len("2000-01-01") and text(cards, "TIME-OBS"):
        value += "T" + text(cards, "TIME-OBS")
    match = _ISO_DATE.fullmatch(value)
    if not match:
        return ""
    day, hour, minute, second = match.groups()
    try:
        datetime.date.fromisoformat(day)
        if hour is not None:
            datetime.time(int(hour), int(minute), min(int(float(second)), 59))
    except ValueError:
        return ""
    return day if hour is None else f"{day}T{hour}:{minute}:{second}"


def pointing(cards: Cards) -> tuple[float, float] | tuple[None, None]:
    """Where the mount says it points: (RA, Dec) in degrees, a hint only (equinox of date, or J2000).

    RA and DEC in degrees, or sexagesimal hours and degrees, else OBJCTRA and OBJCTDEC. Exactly (0, 0)
    is what capture programs write when they do not know.
    """
    for ra_key, dec_key in (("RA", "DEC"), ("OBJCTRA", "OBJCTDEC")):
        ra, dec = _angle(cards, ra_key, hours=True), _angle(cards, dec_key, hours=False)
        if ra is not None and dec is not None and abs(dec) <= 90 and (ra, dec) != (0, 0):
            return ra % 360.0, dec
    return None, None


def _angle(cards: Cards, key: str, *, hours: bool) -> float | None:
    """Degrees of a number in degrees or of a sexagesimal string, which for RA is in hours."""
    match = _SEXAGESIMAL.fullmatch(text(cards, key))
    if not match:
        return number(cards, key)
    sign, whole, minutes, seconds = match.groups()
    value = int(whole) + int(minutes) / 60 + float(seconds) / 3600
    return (-value if sign == "-" else value) * (15.0 if hours else 1.0)


def pixel_size(cards: Cards) -> float | None:
    """Size of a pixel of the array in micrometres.

    XPIXSZ counts the binning already (SBFITSEXT standard); PIXSIZE1, as INDI writes it, does not.
    """
    binned = number(cards, "XPIXSZ", positive=True)
    if binned is not None:
        return binned
    physical = number(cards, "PIXSIZE1", positive=True)
    return physical and physical * (number(cards, "XBINNING", positive=True) or 1.0)


def mount_mode(cards: Cards) -> str:
    """``"eq"`` or ``"altaz"`` from EQMODE, which Seestars write since 2025; else empty (unknown)."""
    mode = number(cards, "EQMODE")
    return "" if mode is None else ("eq" if mode else "altaz")


# ------------------------------------------------------------------------------------------------ sky


def sky_wcs(cards: Cards, shape: tuple[int, int], *, interleaved: bool = False) -> WCS:
    """The celestial WCS of an image, longitude first, checked to be usable all over the image.

    Parameters
    ----------
    cards : mapping
        Header with FITS WCS keywords; numbers written as strings are fine. CD wins over PC and CDELT,
        PC over CROTA. SIP is used with or without "-SIP" in CTYPE, as astropy does. ``TAN`` with PV
        terms beyond the fourth is SCAMP's old way to say TPV (Shupe et al. 2012, section 7).
    shape : tuple of int
        ``(ny, nx)`` of the image.
    interleaved : bool
        The file's first axis is the colour, so the image may be axes 2 and 3.

    Returns
    -------
    astropy.wcs.WCS
        Two axes, world axis 0 the longitude and 1 the latitude in degrees (in a header they may be
        swapped), pixel axes as stored, `pixel_shape` set. The coordinates are in the WCS's own frame
        (``RADESYS``), as ever with astropy.

    Raises
    ------
    HeaderError
        No celestial axes, a missing or bad number, no or zero scale, a mapping that is not one-to-one
        over the image or undefined at its centre or corners.
    """
    world = _celestial_axes(cards)
    pixel = (2, 3) if interleaved and max(world) == 3 else (1, 2)
    crpix = [_real(cards, f"CRPIX{axis}") for axis in pixel]
    code = _projection(cards, world)
    sip = None if code == "TPV" else _sip(cards, crpix)
    header = _wcs_header(cards, world, pixel, code + ("-SIP" if sip else ""))
    try:
        core = Wcsprm(header=header.encode("ascii"), relax=True)
        core.fix()
        wcs = _assemble(core, sip, (shape[1], shape[0]))
    except (WcsError, ValueError, KeyError, MemoryError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise HeaderError(f"has a WCS that wcslib refuses ({reason})") from error
    _check_camera(wcs, shape)
    if code in _KEPT_BY_WCSLIB:
        # These travel between processes as astropy pickles them (see `pack_wcs`), with their numbers
        # rounded; rounded at once, they are the same in every process.
        wcs = pickle.loads(pickle.dumps(wcs))
    return wcs


def _assemble(core: Wcsprm, sip: Sip | None, pixel_shape: tuple[int, int] | None) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs = core
    wcs.sip = sip
    wcs.wcs.set()
    wcs.pixel_shape = pixel_shape
    return wcs


def _celestial_axes(cards: Cards) -> tuple[int, int]:
    """Numbers (from 1) of the longitude and the latitude axis."""
    names = {text(cards, f"CTYPE{axis}").upper()[:5].rstrip("-"): axis for axis in range(1, _MAX_AXES + 1)}
    for longitude, latitude in _LONGITUDES.items():
        if longitude in names and latitude in names:
            axes = names[longitude], names[latitude]
            codes = {text(cards, f"CTYPE{axis}").upper()[5:8] for axis in axes}
            if len(codes) == 1 and len(codes.pop()) == 3:
                return axes
    raise HeaderError("has no celestial WCS")


def _projection(cards: Cards, world: tuple[int, int]) -> str:
    """The projection code; SCAMP's TAN with distortion terms is TPV."""
    code = text(cards, f"CTYPE{world[0]}").upper()[5:8]
    if code == _NEEDS_TABLE:
        raise HeaderError("has a WCS that needs a look-up table, which is not supported")
    scamp = any(f"PV{axis}_{term}" in cards for axis in world for term in range(5, _PV_TERMS))
    if code == "TAN" and scamp and "SIP" not in text(cards, f"CTYPE{world[0]}").upper():
        return "TPV"
    return code


def _real(cards: Cards, key: str, default: float | None = None) -> float:
    """A number that must be one if it is there; without a default it must be there."""
    value = number(cards, key)
    if value is not None:
        return value
    if key in cards:
        raise HeaderError(f"has a WCS whose {key} is not a number")
    if default is None:
        raise HeaderError(f"has a WCS without {key}")
    return default


def _linear(cards: Cards, world: tuple[int, int], pixel: tuple[int, int]) -> list[list[float]]:
    """CD matrix (rows longitude and latitude, columns x and y) from whichever form the header has."""
    if any(f"CD{i}_{j}" in cards for i in world for j in pixel):
        return [[_real(cards, f"CD{i}_{j}", 0.0) for j in pixel] for i in world]
    if not any(f"CDELT{i}" in cards or f"PC{i}_{j}" in cards for i in world for j in pixel):
        raise HeaderError("has a WCS without a pixel scale")
    scale = [_real(cards, f"CDELT{i}", 1.0) for i in world]
    # PC001001 is how the 1988 draft of the standard wrote PC1_1; an absent element is the unit matrix's.
    names = [[(f"PC{i}_{j}", f"PC{i:03}{j:03}") for j in pixel] for i in world]
    if f"CROTA{world[1]}" in cards and not any(name in cards for row in names for pair in row for name in pair):
        return _rotated(scale, math.radians(_real(cards, f"CROTA{world[1]}")), swapped=world[0] > world[1])
    unit = [[float(i == j) for j in pixel] for i in world]
    return [
        [scale[k] * _real(cards, names[k][m][0], _real(cards, names[k][m][1], unit[k][m])) for m in (0, 1)]
        for k in (0, 1)
    ]


def _rotated(scale: list[float], angle: float, *, swapped: bool) -> list[list[float]]:
    """CD matrix of CDELT and the CROTA of the latitude axis (Calabretta & Greisen 2002, section 6.1)."""
    cos, sin = math.cos(angle), math.sin(angle)
    rows = [[scale[0] * cos, -scale[1] * sin], [scale[0] * sin, scale[1] * cos]]
    return [row[::-1] for row in rows] if swapped else rows


def _wcs_header(cards: Cards, world: tuple[int, int], pixel: tuple[int, int], code: str) -> str:
    """A two-axis FITS header, longitude first, with nothing but the WCS and nothing but valid cards."""
    matrix = _linear(cards, world, pixel)
    (a, b), (c, d) = matrix
    if not np.isfinite(matrix).all() or a * d == b * c:  # wcslib takes zeros for 1 deg
        raise HeaderError("has a WCS without a finite scale")
    lines: list[tuple[str, Value]] = [("WCSAXES", 2)]
    for k, (i, j) in enumerate(zip(world, pixel, strict=True)):
        name = text(cards, f"CTYPE{i}").upper()[:5]
        unit = text(cards, f"CUNIT{i}").lower()
        lines += [
            (f"CTYPE{k + 1}", name + code),
            (f"CUNIT{k + 1}", "deg" if not unit or unit.startswith("deg") else unit),
            (f"CRVAL{k + 1}", _real(cards, f"CRVAL{i}")),
            (f"CRPIX{k + 1}", _real(cards, f"CRPIX{j}")),
            (f"CD{k + 1}_1", matrix[k][0]),
            (f"CD{k + 1}_2", matrix[k][1]),
        ]
        # TAN takes no parameters; PixInsight writes PV1_2 = 0 there, which would turn the sky by 90 deg.
        terms = range(0) if code.startswith("TAN") else range(_PV_TERMS)
        lines += [(f"PV{k + 1}_{m}", _real(cards, f"PV{i}_{m}")) for m in terms if f"PV{i}_{m}" in cards]
        lines += [(f"WAT{k + 1}{key[4:]}", str(cards[key])) for key in cards if key.startswith(f"WAT{i}_")]
    lines += [(key, _real(cards, key)) for key in ("LONPOLE", "LATPOLE") if key in cards]
    equinox = number(cards, "EQUINOX", "EPOCH")
    if equinox is not None and 1800 < equinox < 2200:
        lines.append(("EQUINOX", equinox))
    frame = text(cards, "RADESYS", "RADECSYS").upper()
    if frame in _RADESYS:
        lines.append(("RADESYS", frame))
    return "".join(format_card(key, value) for key, value in lines)


def _sip(cards: Cards, crpix: list[float]) -> Sip | None:
    """SIP distortion (Shupe et al. 2005); None without one. The inverse is optional."""
    forward, inverse = _sip_pair(cards, "A", "B"), None
    if forward is None:
        return None
    if "AP_ORDER" in cards and "BP_ORDER" in cards:
        inverse = _sip_pair(cards, "AP", "BP")
    return Sip(*forward, *(inverse or (None, None)), crpix)


def _sip_pair(cards: Cards, first: str, second: str) -> tuple[Any, Any] | None:
    orders = [_real(cards, f"{letter}_ORDER", 0.0) for letter in (first, second)]
    if max(orders) < 2:
        return None
    if min(orders) < 1 or max(orders) > _MAX_SIP_ORDER:
        raise HeaderError(f"has a SIP distortion with {first}_ORDER, {second}_ORDER = {orders}")
    pair = []
    for letter, order in zip((first, second), map(int, orders), strict=True):
        matrix = np.zeros((order + 1, order + 1))
        for p in range(order + 1):
            for q in range(order + 1 - p):
                matrix[p, q] = _real(cards, f"{letter}_{p}_{q}", 0.0)
        pair.append(matrix)
    return pair[0], pair[1]


def _check_camera(wcs: WCS, shape: tuple[int, int]) -> None:
    """Refuse a WCS that is no camera's: undefined, flat, folded, stretched or bent at the centre or at a corner.

    At each of the five pixels the sky area of a pixel, signed by its handedness, is the triple product
    of the directions to the pixel and to its right and upper neighbours: it must be finite, not zero,
    of one sign and much the same everywhere.
    """
    ny, nx = shape
    spots = np.array([[(nx - 1) / 2, (ny - 1) / 2], [0, 0], [nx - 1, 0], [0, ny - 1], [nx - 1, ny - 1]])
    points = np.concatenate([spots, np.add(spots, [1, 0]), np.add(spots, [0, 1])])
    with np.errstate(all="ignore"):
        longitude, latitude = np.radians(wcs.all_pix2world(points, 0)).T
        directions = np.stack(
            [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)],
            axis=-1,
        )
        here, right, up = directions.reshape(3, len(spots), 3)
        right, up = right - here, up - here
        area = np.linalg.det(np.stack([here, right, up], axis=1))
    if not np.isfinite(area).all():
        raise HeaderError("has a WCS that is undefined at the centre or a corner of the image")
    if not ((area > 0).all() or (area < 0).all()):
        raise HeaderError("has a WCS that is not one-to-one over the image")
    scale = math.degrees(math.sqrt(abs(area[0]))) * 3600
    if not _SCALES[0] < scale < _SCALES[1]:
        raise HeaderError(f"has a WCS of {scale:.3g}\"/px, which is no camera's")
    if np.ptp(np.log(np.abs(area))) > math.log(_MAX_BEND):
        raise HeaderError("has a WCS that is bent beyond what lenses do")
    # A round spot becomes an ellipse; its axes are the singular values of (right, up), whose product is the area.
    size, difference = right[0] @ right[0] + up[0] @ up[0], right[0] @ right[0] - up[0] @ up[0]
    stretch = (size + math.hypot(difference, 2 * right[0] @ up[0])) / 2 / abs(area[0])
    if stretch > _MAX_STRETCH:
        raise HeaderError(f"has a WCS that stretches the pixels {stretch:.2f} times")


# ------------------------------------------------------------------------------------------- pickling


def pack_wcs(wcs: WCS) -> Any:
    """A small picklable stand-in for a two-axis WCS, exact to the last bit; see `unpack_wcs`.

    astropy pickles a WCS by way of a FITS file in memory: 10 ms, and it rounds CRVAL and CD to the
    digits it prints, so that a worker process would see another sky than its parent (1e-12 deg, but a
    mosaic must not depend on the number of workers). Here the numbers themselves travel, 0.1 ms. What
    this does not cover (TPV and other distortions that wcslib keeps to itself) is noticed by
    comparing the two, bit by bit, and left to astropy.
    """
    core = wcs.wcs
    linear = {"cd": core.cd} if core.has_cd() else {"pc": core.pc, "cdelt": core.cdelt}
    state = {
        **linear,
        **{name: getattr(core, name) for name in ("crpix", "crval", "lonpole", "latpole", "radesys", "equinox")},
        "ctype": list(core.ctype),
        "cunit": [str(unit) for unit in core.cunit],
    }
    sip = wcs.sip and (wcs.sip.a, wcs.sip.b, wcs.sip.ap, wcs.sip.bp, wcs.sip.crpix)
    packed = state, core.get_pv(), sip, wcs.pixel_shape
    probe = np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [777.0, 555.0]])
    same = np.array_equal(unpack_wcs(packed).all_pix2world(probe, 0), wcs.all_pix2world(probe, 0), equal_nan=True)
    return packed if same else wcs


def unpack_wcs(packed: Any) -> WCS:
    """The WCS that `pack_wcs` packed."""
    if isinstance(packed, WCS):
        return packed
    state, pv, sip, pixel_shape = packed
    core = Wcsprm(naxis=2)
    for name, value in state.items():
        setattr(core, name, value)
    core.set_pv(pv)
    return _assemble(core, sip and Sip(*sip), pixel_shape)
