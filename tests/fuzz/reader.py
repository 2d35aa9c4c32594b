"""Coverage-guided fuzzing of the frame reader and the header parser.

``python tests/fuzz/reader.py FOLDER [libFuzzer options]`` fuzzes until it is told to stop
(``-max_total_time=600``), from a few well-formed files that it puts into FOLDER; it needs the package atheris.
`tests/test_hostile.py` tries a few hundred such inputs in every run of the tests, and what once broke the reader.
"""

from __future__ import annotations

import gzip
import importlib
import io
import math
import pickle
import random
import sys
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the fuzzer instruments what is imported later
    from zemosaic.frames import Frame
    from zemosaic.tiles import FloatImage

CARD, BLOCK = 80, 2880
LONGEST = 20_000  # bytes of an input
_GZIP = b"\x1f\x8b"
_KEYS = """
SIMPLE XTENSION BITPIX NAXIS NAXIS1 NAXIS2 NAXIS3 PCOUNT GCOUNT GROUPS BSCALE BZERO BLANK END TFIELDS TFORM1
TTYPE1 THEAP ZIMAGE ZBITPIX ZNAXIS ZNAXIS1 ZNAXIS2 ZTILE1 ZTILE2 ZCMPTYPE ZNAME1 ZVAL1 ZNAME2 ZVAL2 ZQUANTIZ
ZDITHER0 ZBLANK BAYERPAT XBAYROFF YBAYROFF ROWORDER DATE-OBS TIME-OBS RA DEC OBJCTRA OBJCTDEC XPIXSZ PIXSIZE1
XBINNING EXPTIME EQMODE SATURATE IMAGETYP CTYPE1 CTYPE2 CRVAL1 CRVAL2 CRPIX1 CRPIX2 CUNIT1 CD1_1 CD1_2 CD2_1
CD2_2 CDELT1 CDELT2 PC1_1 PC1_2 CROTA2 A_ORDER B_ORDER A_2_0 B_0_2 AP_ORDER BP_ORDER PV1_1 PV1_5 PV2_1 LONPOLE
LATPOLE EQUINOX RADESYS WAT1_001 IMAGEW IMAGEH
"""
_VALUES = """
0 1 2 3 -1 8 16 -32 -64 T F 0.0 1e308 -1e308 1e-320 NaN inf 1e30 99999999999999999999 2147483648 90 -90 180
1.5D3 '' 'RA---TAN' 'DEC--TAN' 'RA---TAN-SIP' 'DEC--TAN-SIP' 'RA---TPV' 'RA---ZPN' 'DEC--ZPN' 'RA---TNX'
'GLON-CAR' 'RGGB' 'BOTTOM-UP' 'IMAGE' 'BINTABLE' 'RICE_1' 'GZIP_2' 'HCOMPRESS_1' 'PLIO_1' 'BYTEPIX' 'BLOCKSIZE'
'1PB(9)' '1QI(9)' 'NO_DITHER' 'SUBTRACTIVE_DITHER_2' '2024-02-30T12:00:00' '12:34:56' 'FK4' 'deg'
"""


def check(data: bytes, folder: Path) -> str:
    """Read `data` as a sub (or, if it is no FITS file, as the sidecar of one) the way a run does.

    Anything but a frame that is as it says, or a `FrameError` of one line, is an error.

    Returns
    -------
    str
        Why it was refused, or why it has no WCS; empty for a frame that a run could use.
    """
    from zemosaic.frames import FrameError, read_frame, read_pixels

    path, sidecar = folder / "sub.fit", folder / "sub.wcs"
    sidecar.unlink(missing_ok=True)
    if data.startswith((b"SIMPLE", _GZIP)):
        path.write_bytes(data)
    else:
        path.write_bytes(plain_sub())
        sidecar.write_bytes(data)
    try:
        frame = read_frame(path)
        pixels = read_pixels(frame)
    except FrameError as refusal:
        reason = str(refusal)
    else:
        return _check_frame(frame, pixels)
    assert "\n" not in reason, reason
    return reason


def _check_frame(frame: Frame, pixels: FloatImage) -> str:
    """What a run counts on, and what it does first: the place of a frame, its stars and its sky."""
    from zemosaic.calibrate import Calibration
    from zemosaic.canvas import find_strays
    from zemosaic.measure import measure_frame
    from zemosaic.misfits import of_impossible_size
    from zemosaic.stars import Aperture

    assert pixels.shape == (*frame.shape, 3)[: 3 if frame.colour == "rgb" else 2]
    assert pixels.dtype == "float32"
    if frame.wcs is None:
        assert frame.wcs_problem
        return frame.wcs_problem
    (reason,) = find_strays([frame])
    assert "\n" not in reason
    spots = [[0.0, 0.0], [3.0, 5.0]]
    there = pickle.loads(pickle.dumps(frame)).wcs.all_pix2world(spots, 0)
    assert (there == frame.wcs.all_pix2world(spots, 0)).all()
    (size,) = of_impossible_size([frame], 1 << 30)
    if not (reason or size):
        measure_frame(frame, Calibration(), Aperture())
    return reason or size


# ------------------------------------------------------------------------------------------ well-formed files


def cards(**values: object) -> bytes:
    """Cards of a header, as a FITS file has them; ``_DASH_`` stands for the dash that Python names cannot have."""
    lines = (f"{key.replace('_DASH_', '-'):<8}= {value:>20}" for key, value in values.items())
    return b"".join(line.ljust(CARD)[:CARD].encode("latin-1") for line in lines)


def hdu(header: bytes, data: bytes = b"") -> bytes:
    """Header and data, padded to blocks."""
    header += b"END"
    return header.ljust(-(-len(header) // BLOCK) * BLOCK) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


WCS = {
    "CTYPE1": "'RA---TAN-SIP'",
    "CTYPE2": "'DEC--TAN-SIP'",
    "CRVAL1": 83.8,
    "CRVAL2": 10.0,
    "CRPIX1": 20.5,
    "CRPIX2": 18.5,
    "CD1_1": -6.6e-4,
    "CD1_2": 1e-5,
    "CD2_1": 1e-5,
    "CD2_2": 6.6e-4,
    "A_ORDER": 2,
    "A_2_0": 1e-6,
    "B_ORDER": 2,
    "B_0_2": 1e-6,
}


def plain_sub() -> bytes:
    """A sub of 40 x 36 photosites, which fill one block; noise and a star."""
    shape = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 40, "NAXIS2": 36, "BZERO": 32768}
    facts = {"BAYERPAT": "'GRBG'", "EXPTIME": 10.0, "DATE_DASH_OBS": "'2025-02-01T21:00:00'", "RA": 83.8, "DEC": 10.0}
    rng = random.Random(1)
    light = (20000 * math.exp(-((i % 40 - 15) ** 2 + (i // 40 - 20) ** 2) / 5) for i in range(1440))
    return hdu(cards(**shape, **facts, **WCS), b"".join(int(rng.gauss(900, 30) + x).to_bytes(2, "big") for x in light))


def seeds() -> list[bytes]:
    """One input of every kind that the reader knows."""
    import numpy as np
    from astropy.io import fits

    found = [plain_sub(), gzip.compress(plain_sub()), cards(**WCS) + b"END", cards(**WCS, IMAGEW=40, IMAGEH=36)]
    found.append(b"\n".join(found[2][i : i + CARD].rstrip() for i in range(0, len(found[2]), CARD)))
    tpv = {**WCS, "CTYPE1": "'RA---TPV'", "CTYPE2": "'DEC--TPV'", "PV1_1": 1.0, "PV1_5": 0.1, "PV2_1": 1.0}
    pc = {**WCS, "CDELT1": -6e-4, "CDELT2": 6e-4, "PC1_1": 1.0, "PC1_2": 0.1, "CROTA2": 3, "CD1_1": "'x'"}
    found += [cards(**tpv) + b"END", cards(**pc) + b"END"]
    image = np.random.default_rng(1).normal(500, 20, (36, 40)).astype(np.int16)
    header = fits.Header.fromstring(plain_sub()[: 2 * BLOCK].decode("latin-1"))
    header = fits.Header({key: header[key] for key in ("BAYERPAT", *WCS)})
    for scheme in ("RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "PLIO_1"):
        file = io.BytesIO()
        fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(image, header, compression_type=scheme)]).writeto(file)
        found.append(file.getvalue())
    for array in (image.astype(np.float32), np.stack([image] * 3), image.astype(np.float64)):
        file = io.BytesIO()
        fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(array, header)]).writeto(file)
        found.append(file.getvalue())
    return found


# ------------------------------------------------------------------------------------------ fuzzing


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change a card as a whole: bytes flipped at random seldom make a header that is read to its end."""
    if data.startswith(_GZIP) and rng.random() < 0.5:
        try:
            return gzip.compress(mutate(gzip.decompress(data), rng))
        except (OSError, EOFError, zlib.error):
            return data
    place = rng.randrange(max(1, min(len(data), 3 * BLOCK) // CARD)) * CARD
    key, value = (rng.choice(words.split()) for words in (_KEYS, _VALUES))
    card = f"{key:<8}= {value:>20}".ljust(CARD).encode()
    if rng.random() < 0.5 and data[place + 8 : place + 9] == b"=":
        card = data[place : place + 10] + card[10:]  # another value under the same key
    return (data[:place] + card + data[place + CARD :])[:LONGEST]


def main() -> None:
    """Fuzz with atheris."""
    import atheris

    with atheris.instrument_imports(include=["zemosaic.frames", "zemosaic.headers", "zemosaic.unpack"]):
        importlib.import_module("zemosaic.frames")

    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds()):
        (corpus / f"seed{i}").write_bytes(seed)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutate(data, rng) if rng.random() < 0.6 else atheris.Mutate(data, most)
        return bytes(changed[:most])

    with tempfile.TemporaryDirectory() as folder:
        limits = ["-timeout=10", "-rss_limit_mb=1500", f"-max_len={LONGEST}"]
        atheris.Setup(
            [sys.argv[0], *limits, *sys.argv[1:]],
            lambda data: check(data, Path(folder)) and None,
            custom_mutator=custom,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
