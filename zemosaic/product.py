"""The product of a run: one FITS file, its picture and its settings, written whole or not at all.

Layout of the FITS file: the linear science image first, ``(3, H, W)`` or ``(H, W)`` float32 with
NaN = no data; then ``ALPHA`` (uint8), ``COVERAGE`` (float32), ``FRAMES`` and, where there are
tiles, ``MEGATILES`` (tables). Every HDU carries CHECKSUM and DATASUM.

The images are streamed in strips of rows, big-endian as FITS wants them, and summed on the way:
the memory needed beside the mosaic is that of one strip and of the preview.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic import __version__
from zemosaic.execute import side_by_side
from zemosaic.files import force, part_of
from zemosaic.ledger import FrameRecord, Ledger, TileRecord, tile_table
from zemosaic.preview import PreviewSettings, encode_png, preview_rgba
from zemosaic.tiles import Mosaic
from zemosaic.workplace import PRODUCT_ENDINGS, REPORT_ENDINGS

BLOCK = 2880  # bytes; every part of a FITS file is padded to a multiple
STRIP_BYTES = 8 << 20
CARD_TEXT = 68  # characters that fit between the quotes of one card
NAME_LENGTH = 80  # characters of a file name that come from the object
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

MAX_SAMPLES = 1_000_000  # pixels that the median coverage is taken of

CardValue = str | int | float | bool
Cards = list[tuple[str, CardValue, str]]
Pixels = NDArray[np.float32] | NDArray[np.uint8]


class ProductError(Exception):
    """The product cannot be written: one sentence that says why, and one that says what to do."""


@dataclass(frozen=True)
class ProductFacts:
    """What the header tells of a run, beside what the ledger and the mosaic tell themselves.

    Parameters
    ----------
    route : str
        "sds", "mosaic_first" or "master_tiles"; also part of the file names.
    object, filter, instrument : str
        As in the subs; "" where unknown.
    fallback : str
        Why a first choice of route was given up; "" if it was not.
    cards : tuple of (keyword, value, comment)
        More of the run's numbers, the SDS parameters for instance; "" and NaN are left out.
    history : tuple of str
        One line for each thing that was done to the image, in order.
    created : astropy.time.Time
        DATE of the file.
    """

    route: str
    object: str = ""
    filter: str = ""
    instrument: str = ""
    fallback: str = ""
    cards: tuple[tuple[str, CardValue, str], ...] = ()
    history: tuple[str, ...] = ()
    created: Time = field(default_factory=Time.now)


@dataclass(frozen=True)
class ProductPaths:
    """The files of one product; they share one stem."""

    fits: Path
    preview: Path
    settings: Path
    frames: Path


def save_product(
    folder: Path | str,
    name: str,
    mosaic: Mosaic,
    *,
    facts: ProductFacts,
    ledger: Ledger,
    tiles: Sequence[TileRecord] = (),
    settings_text: str = "",
    preview: PreviewSettings | None = None,
    workers: int = 1,
) -> ProductPaths:
    """Write ``<name>_<route>`` as .fits, .png and .toml, and its frames as _frames.csv; never over another's files.

    Everything is first written to ``.part`` files in the same folder, forced to disk and then
    renamed, the FITS file last: where it exists the product is complete. Where a name is taken the
    product gets the next free one, ``<name>_<route>_2`` and so on.

    Parameters
    ----------
    folder : Path
        Made if needed.
    name : str
        The object's name; anything that a file name should not hold is replaced.
    mosaic : Mosaic
        The science image with coverage, alpha and WCS; read only.
    facts : ProductFacts
        For the header.
    ledger : Ledger
        Every frame of the run.
    tiles : sequence of TileRecord
        The mega-tiles, if any.
    settings_text : str
        The effective settings as TOML.
    preview : PreviewSettings, optional
        For the picture; the defaults if left out.
    workers : int
        Threads.

    Returns
    -------
    ProductPaths
        The four files.

    Raises
    ------
    ProductError
        A full disk or any other refusal of the file system; no file of this product is left.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = _reserve(folder, f"{file_name(name)}_{file_name(facts.route)}")
        try:
            with side_by_side(workers) as start:
                picture = start(_picture, mosaic, preview or PreviewSettings(), workers)  # takes as long as the file
                with part_of(paths.fits).open("wb") as stream:
                    _write_fits(stream, mosaic, facts, ledger, tiles)
                    force(stream)
            _write(part_of(paths.preview), picture.result())
            _write(part_of(paths.settings), settings_text.encode())
            _write(part_of(paths.frames), ledger.to_csv().encode())
            _publish(paths)
        finally:
            _tidy(paths)
    except OSError as error:
        raise ProductError(_explain(error, folder, mosaic)) from error
    return paths


def file_name(text: str) -> str:
    """What of `text` is safe in a file name everywhere: ASCII letters, digits, ``. + - _``.

    Accents are folded, everything else becomes ``_``; it neither starts nor ends with punctuation
    (no hidden file, no command-line option) and is never empty.
    """
    safe = re.sub(r"[^A-Za-z0-9.+_-]+", "_", _fold(text))
    return safe.strip("._+-")[:NAME_LENGTH] or "mosaic"


def wcs_cards(wcs: WCS, planes: int = 1) -> fits.Header:
    """The cards of a celestial WCS, in full precision.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        2-D, without distortion.
    planes : int
        With more than one there is a third, linear axis of type "RGB": what fitsverify, astropy and
        Siril all read. A WCS with fewer axes than the image has is completed by guesswork.

    Returns
    -------
    astropy.io.fits.Header
        With a CD matrix in degrees, which every reader knows.
    """
    if wcs.has_distortion:
        raise ValueError("the WCS of a mosaic has no distortion")
    header = wcs.to_header(relax=True)
    for keyword in list(header):
        if keyword.startswith(("PC", "CDELT", "MJD", "DATE")):
            del header[keyword]
    header["WCSAXES"] = 2 if planes == 1 else 3
    if header["RADESYS"] == "ICRS":
        header["EQUINOX"] = (2000.0, "[yr] for readers that know no RADESYS")
    set_exactly(header, wcs)
    if planes > 1:
        header["CTYPE3"] = ("RGB", "red, green, blue")
        header["CRPIX3"] = header["CRVAL3"] = header["CD3_3"] = 1.0
    return header


def set_exactly(header: fits.Header, wcs: WCS) -> None:
    """CRPIX, CRVAL and CD of a WCS with all the digits that a float has; astropy's own `to_header` rounds to 12."""
    for i in (0, 1):
        header[f"CRPIX{i + 1}"] = float(wcs.wcs.crpix[i])
        header[f"CRVAL{i + 1}"] = float(wcs.wcs.crval[i])
        for j in (0, 1):
            header[f"CD{i + 1}_{j + 1}"] = float(wcs.pixel_scale_matrix[i, j])


def _reserve(folder: Path, stem: str) -> ProductPaths:
    """Claim the first free name: create its ``.fits.part``, which only one process can."""
    for number in itertools.count(1):
        base = stem if number == 1 else f"{stem}_{number}"
        paths = ProductPaths(*(folder / f"{base}{end}" for end in PRODUCT_ENDINGS))
        reports = [folder / f"{base}{end}" for end in REPORT_ENDINGS]
        try:
            part_of(paths.fits).touch(exist_ok=False)
        except FileExistsError:
            continue
        # Looked at with the claim in hand: before, another run could still have finished in between.
        if not any(os.path.lexists(path) for path in (paths.fits, *_beside(paths), *reports)):
            return paths
        part_of(paths.fits).unlink()
    raise AssertionError("unreachable")


def _beside(paths: ProductPaths) -> tuple[Path, ...]:
    """Everything but the FITS file."""
    return paths.preview, paths.settings, paths.frames


def _publish(paths: ProductPaths) -> None:
    for path in (*_beside(paths), paths.fits):
        os.replace(part_of(path), path)


def _tidy(paths: ProductPaths) -> None:
    """Remove what is only half done; without its FITS file there is no product at all.

    Once that is in place the claim is gone with it: a ``.part`` found then is another run's.
    """
    if paths.fits.exists():
        return
    for path in _beside(paths):
        part_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    part_of(paths.fits).unlink(missing_ok=True)


def _picture(mosaic: Mosaic, preview: PreviewSettings, workers: int) -> bytes:
    return encode_png(preview_rgba(mosaic, **asdict(preview), workers=workers))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        force(stream)


def _explain(error: OSError, folder: Path, mosaic: Mosaic) -> str:
    if error.errno in FULL:
        needed = (mosaic.image.nbytes + mosaic.coverage.nbytes + mosaic.alpha.nbytes) / 1e6
        return (
            f"There is no room left in {folder}: this mosaic takes {needed:.0f} MB. "
            "Free some space or choose another output folder."
        )
    return f"{error.filename or folder} cannot be written: {error.strerror}. Choose another output folder."


def _write_fits(
    stream: BinaryIO, mosaic: Mosaic, facts: ProductFacts, ledger: Ledger, tiles: Sequence[TileRecord]
) -> None:
    planes = mosaic.image.shape[2] if mosaic.image.ndim == 3 else 1
    science = _science_cards(mosaic, facts, ledger)
    science.update(wcs_cards(mosaic.wcs, planes))
    for line in [*facts.history, *([f"fallback: {facts.fallback}"] if facts.fallback else [])]:
        for part in textwrap.wrap(_ascii(line), 72):
            science.add_history(part)
    _write_image(stream, mosaic.image, science)
    # ALPHA first: Siril takes a mono image followed by another of the same type for a sequence of
    # two, and then refuses the file.
    _write_image(stream, mosaic.alpha, wcs_cards(mosaic.wcs), "ALPHA")
    _write_image(stream, mosaic.coverage, wcs_cards(mosaic.wcs), "COVERAGE")
    _write_table(stream, ledger.to_table(), "FRAMES")
    if tiles:
        _write_table(stream, tile_table(tiles), "MEGATILES")


def _science_cards(mosaic: Mosaic, facts: ProductFacts, ledger: Ledger) -> fits.Header:
    """The primary header's cards but for structure, WCS and history."""
    cards: Cards = [
        ("OBJECT", facts.object, "name of the field"),
        ("FILTER", facts.filter, "filter of the subs"),
        ("INSTRUME", facts.instrument, "camera"),
        ("BUNIT", "adu", "linear, on the scale of one sub"),
        ("ROWORDER", "BOTTOM-UP", "the first row is the lowest one"),
        *_exposure_cards(ledger.used, mosaic.coverage),
        *_date_cards(ledger.used),
        ("ROUTE", facts.route, "how the mosaic was made"),
        ("FALLBACK", facts.fallback or "none", "why another route was given up"),
        *facts.cards,
        ("CREATOR", "ZeMosaic", "software that made this file"),
        ("SWVERS", __version__, "its version"),
        ("DATE", facts.created.utc.isot, "[UTC] when this file was made"),
    ]
    header = fits.Header()
    for keyword, value, comment in cards:
        if keyword in header or not re.fullmatch("[A-Z0-9_-]{1,8}", keyword):
            raise ValueError(f"{keyword!r} is taken or no FITS keyword")
        if value != "" and not (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
            header.append(_card(keyword, value, comment))
    return header


def _exposure_cards(used: Sequence[FrameRecord], coverage: NDArray[np.float32]) -> Cards:
    """NCOMBINE, and what the exposures are worth if they are known.

    EFFEXP is the mean exposure of a used sub times the median coverage of the covered pixels: the
    light-gathering time behind a typical pixel, with rejected samples left out.
    """
    cards: Cards = [("NCOMBINE", len(used), "subs in the mosaic")]
    known = [frame.exposure for frame in used if np.isfinite(frame.exposure)]
    if known:
        step = math.ceil(math.sqrt(coverage.size / MAX_SAMPLES)) or 1
        sample = coverage[::step, ::step]
        depth = float(np.median(sample[sample > 0])) if (sample > 0).any() else 0.0
        cards += [
            ("EXPTIME", float(np.median(known)), "[s] exposure of one sub (median)"),
            ("TOTALEXP", float(np.sum(known)), "[s] sum over the subs in the mosaic"),
            ("EFFEXP", float(np.mean(known)) * depth, "[s] behind a typical pixel (median coverage)"),
        ]
    return cards


def _date_cards(used: Iterable[FrameRecord]) -> Cards:
    """Start of the first and end of the last sub, UTC; nothing where no date is readable."""
    spans = []
    for frame in used:
        start = _instant(frame.date_obs)
        if start is not None:
            seconds = frame.exposure if np.isfinite(frame.exposure) else 0.0
            spans.append((start, start + timedelta(seconds=seconds)))
    if not spans:
        return []
    begin, end = Time(min(span[0] for span in spans)), Time(max(span[1] for span in spans))
    cards: Cards = [("TIMESYS", "UTC", "time scale of the dates")]
    # The MJD beside each date: readers that miss one add it themselves, and say so every time.
    for name, instant, what in (
        ("OBS", begin, "start of the first sub"),
        ("BEG", begin, "start of the first sub"),
        ("END", end, "end of the last sub"),
    ):
        cards += [(f"DATE-{name}", instant.isot, what), (f"MJD-{name}", float(instant.mjd), f"[d] {what}")]
    return cards


def _instant(text: str) -> datetime | None:
    """A FITS date as a time in UTC, None if it cannot be read."""
    whole, _, fraction = text.strip().rstrip("Z").partition(".")
    try:
        # Python 3.10 reads fractions of 3 or 6 digits only.
        return datetime.fromisoformat(f"{whole}.{fraction:0<6.6}" if fraction else whole)
    except ValueError:
        return None


def _card(keyword: str, value: CardValue, comment: str) -> fits.Card:
    """One card of 80 characters: text is made ASCII and cut, the comment gets what room is left."""
    if isinstance(value, str):
        value = _ascii(value)
        while len(value.replace("'", "''")) > CARD_TEXT:
            value = value[:-1]
    room = 80 - max(30, len(str(fits.Card(keyword, value)).rstrip())) - len(" / ")
    return fits.Card(keyword, value, _ascii(comment)[: max(0, room)].rstrip())


def _fold(text: str) -> str:
    """Accents and the like taken off."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _ascii(text: str) -> str:
    """Printable ASCII, as FITS cards demand; "?" for what has no likeness in it."""
    plain = _fold(text).encode("ascii", "replace").decode()
    return re.sub(r"[^ -~]+", " ", plain).strip()


def _write_image(stream: BinaryIO, pixels: Pixels, cards: fits.Header, name: str = "") -> None:
    """One image HDU; a colour axis at the end of the array becomes the slowest one in the file."""
    header = fits.Header()
    if name:
        header["XTENSION"] = ("IMAGE", "image extension")
    else:
        header["SIMPLE"] = (True, "conforms to the FITS standard")
    header["BITPIX"] = -32 if pixels.dtype == np.float32 else 8
    sizes = (*pixels.shape[1::-1], *pixels.shape[2:])
    header["NAXIS"] = len(sizes)
    for i, size in enumerate(sizes, start=1):
        header[f"NAXIS{i}"] = size
    if name:
        header["PCOUNT"], header["GCOUNT"], header["EXTNAME"] = 0, 1, name
    else:
        header["EXTEND"] = True
    header.extend(cards, bottom=True)
    _write_hdu(stream, header, _strips(pixels))


def _write_table(stream: BinaryIO, table: Table, name: str) -> None:
    hdu = fits.BinTableHDU(table, name=name)
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(buffer)
    # astropy writes a table only behind a primary HDU, which is one block when it is empty.
    data = buffer.getbuffer()[BLOCK + len(hdu.header.tostring()) :]
    _write_hdu(stream, hdu.header, [data])


def _strips(pixels: Pixels) -> Iterator[memoryview]:
    """The bytes of an image as FITS orders them, some rows at a time."""
    # A multiple of four rows is a multiple of four bytes, the checksum's unit, whatever the width.
    rows = max(4, STRIP_BYTES // (pixels.shape[1] * pixels.itemsize) // 4 * 4)
    for plane in np.moveaxis(np.atleast_3d(pixels), -1, 0):
        for y in range(0, len(plane), rows):
            yield np.ascontiguousarray(plane[y : y + rows], pixels.dtype.newbyteorder(">")).data.cast("B")


def _write_hdu(stream: BinaryIO, header: fits.Header, strips: Iterable[memoryview]) -> None:
    """Header and data, padded and with both checksums; the header is rewritten when these are known.

    Every strip but the last must be a multiple of four bytes long.
    """
    header["CHECKSUM"] = ("0" * 16, "of the whole HDU")
    header["DATASUM"] = ("0", "of the data")
    start, size, total = stream.tell(), 0, 0
    stream.write(header.tostring().encode())
    for strip in strips:
        stream.write(strip)
        size += strip.nbytes
        total += _sum(strip)
    stream.write(bytes(-size % BLOCK))
    header["DATASUM"] = str(_fold_carries(total))
    header["CHECKSUM"] = _checksum(total + _sum(header.tostring().encode()))
    stream.seek(start)
    stream.write(header.tostring().encode())
    stream.seek(0, os.SEEK_END)


def _sum(data: bytes | memoryview) -> int:
    """Sum of the big-endian 32-bit words of `data`, with zeros to fill the last one."""
    whole = len(data) // 4 * 4
    words = int(np.frombuffer(data[:whole], ">u4").sum(dtype=np.uint64))
    return words + int.from_bytes(bytes(data[whole:]).ljust(4, b"\0"), "big")


def _fold_carries(total: int) -> int:
    """The 32-bit ones'-complement sum that `total` stands for."""
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def _checksum(total: int) -> str:
    """ASCII code that brings the sum of an HDU, 16 zeros in its place, to -0 (FITS 4.0, appendix J)."""
    code = [""] * 16
    for i, byte in enumerate((0xFFFFFFFF ^ _fold_carries(total)).to_bytes(4, "big")):
        # Four characters, "0" and up, that add up to the byte (and four times "0").
        parts = [0x30 + byte // 4 + (byte % 4 if j == 0 else 0) for j in range(4)]
        for j in (0, 2):
            while not all(chr(part).isalnum() for part in parts[j : j + 2]):
                parts[j], parts[j + 1] = parts[j] + 1, parts[j + 1] - 1
        code[i::4] = map(chr, parts)
    # The value starts in column 12 of its card: a quarter of a word after a word's boundary.
    return code[-1] + "".join(code[:-1])
