"""How the star catalogue beside this file was made.

    apt-get download astrometry-data-tycho2-07-littleendian
    python -m zemosaic.solve.pack astrometry-data-tycho2-07-littleendian_*.deb

The Debian package holds an index of astrometry.net built from Tycho-2 (Høg et al. 2000, A&A 355, L27): the ten
brightest stars of every cell of 22.5′, 1,871,011 altogether, with V_T and their mean positions at J2000 (for those of
the supplement, among them the brightest of the sky, at 1991.25). Nothing but these three columns is taken over. The
terms of use, from the package's copyright file, are written beside the data.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic.solve.catalogue import DATA_FILE, Catalogue, encode

LICENSE_FILE = "tycho2.LICENSE.txt"
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data file and its licence into a folder, by default that of this module."""
    parser = argparse.ArgumentParser(description="Pack the star catalogue that frames are solved against.")
    parser.add_argument("package", type=Path, help="astrometry-data-tycho2-07-littleendian_*.deb")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="where to write")
    options = parser.parse_args(argv)
    index, licence = unpack(options.package.read_bytes())
    (options.folder / DATA_FILE).write_bytes(encode(index_stars(index)))
    (options.folder / LICENSE_FILE).write_bytes(licence)


def unpack(package: bytes) -> tuple[bytes, bytes]:
    """Index file and copyright file of the Debian package (an ar archive with a tar archive in it).

    Raises
    ------
    ValueError
        If it is another kind of file or lacks one of the two.
    """
    if not package.startswith(_AR_MAGIC):
        raise ValueError("this is no Debian package")
    found: dict[str, bytes] = {}
    at = len(_AR_MAGIC)
    while at + _AR_HEADER <= len(package):
        name, size = package[at : at + 16].decode("ascii").strip(), int(package[at + 48 : at + 58])
        at += _AR_HEADER
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[at : at + size])) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        found[Path(member.name).suffix or Path(member.name).name] = content.read()
        at += size + size % 2  # members start at even offsets
    try:
        return found[".fits"], found["copyright"]
    except KeyError as missing:
        raise ValueError(f"the package holds no {missing} file") from missing


def index_stars(index: bytes) -> Catalogue:
    """The stars of an astrometry.net index: unsigned 32-bit x, y, z over the range of a table beside, and V_T."""
    with fits.open(io.BytesIO(index)) as hdus:
        tables = {hdu.columns.names[0]: hdu.data for hdu in hdus[1:] if hdu.columns.names}
        low = np.frombuffer(tables["kdtree_range_stars"].tobytes(), "<f8")
        stored = np.frombuffer(tables["kdtree_data_stars"].tobytes(), "<u4").reshape(-1, 3)
        mag = tables["MAG_VT"]["MAG_VT"].astype(np.float64)
    x, y, z = (low[:3] + stored / low[6]).T
    return Catalogue(np.degrees(np.arctan2(y, x)) % 360, np.degrees(np.arctan2(z, np.hypot(x, y))), mag)


if __name__ == "__main__":
    main()
