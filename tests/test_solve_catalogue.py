"""The star catalogue: its file, how it is packed, and cones of the sky."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import time
from importlib.resources import files

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from zemosaic.solve.catalogue import DATA_FILE, Catalogue, decode, encode, load_catalogue
from zemosaic.solve.pack import LICENSE_FILE, index_stars, main, unpack
from zemosaic.sphere import to_vectors


def scattered(count: int, seed: int = 0) -> Catalogue:
    rng = np.random.default_rng(seed)
    dec = np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    return Catalogue(rng.uniform(0, 360, count), dec, rng.uniform(2, 12, count))


def separation(catalogue: Catalogue, ra: float, dec: float) -> np.ndarray:
    centre = to_vectors(np.array([ra]), np.array([dec]))[0]
    chord = np.linalg.norm(to_vectors(catalogue.ra, catalogue.dec) - centre, axis=1)
    return np.degrees(2 * np.arcsin(np.clip(chord / 2, 0, 1)))


def test_catalogue_is_sorted_at_birth_with_its_columns_kept_together():
    catalogue = Catalogue(np.array([10.0, 20.0, 30.0]), np.array([5.0, -5.0, 0.0]), np.array([1.0, 2.0, 3.0]))
    assert catalogue.dec.tolist() == [-5, 0, 5]
    assert catalogue.ra.tolist() == [20, 30, 10] and catalogue.mag.tolist() == [2, 3, 1]


@pytest.mark.parametrize("columns", [([1.0], [2.0], [3.0, 4.0]), ([np.nan], [2.0], [3.0]), ([[1.0]], [[2.0]], [[3.0]])])
def test_catalogue_refuses_columns_that_are_none(columns):
    with pytest.raises(ValueError, match="a catalogue needs"):
        Catalogue(*(np.array(c) for c in columns))


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 360), st.floats(-90, 90), st.one_of(st.floats(0.5, 20), st.floats(20, 180)), st.integers(0, 3))
def test_cone_holds_exactly_the_stars_within_its_radius(ra, dec, radius, seed):
    catalogue = scattered(2000, seed)
    apart = separation(catalogue, ra, dec)
    expected = apart <= radius
    unsure = np.abs(apart - radius) < 1e-6
    found = np.isin(catalogue.ra, catalogue.cone(ra, dec, radius).ra)
    assert (found == expected)[~unsure].all()


def test_packing_keeps_positions_to_a_few_hundredths_of_an_arcsecond():
    poles = Catalogue(np.array([0.0, 180.0, 359.999999]), np.array([90.0, -90.0, 0.0]), np.array([0.0, 20.0, 7.03]))
    stars = scattered(20_000)
    catalogue = Catalogue(*(np.concatenate([getattr(c, k) for c in (stars, poles)]) for k in ("ra", "dec", "mag")))
    back = decode(encode(catalogue))
    apart = np.linalg.norm(to_vectors(back.ra, back.dec) - to_vectors(catalogue.ra, catalogue.dec), axis=1)
    # Stars within one step of declination may have changed places; nothing else may.
    swapped = apart > 1e-4
    assert swapped.mean() < 0.01
    assert np.degrees(apart[~swapped]).max() * 3600 < 0.045
    assert np.sort(back.mag) == pytest.approx(np.clip(np.sort(catalogue.mag), 0, 255 / 16), abs=1 / 32)


def test_packing_spans_a_sky_that_is_all_but_empty():
    for dec in ([-90.0, 90.0], [89.0], []):
        catalogue = Catalogue(np.full(len(dec), 1.0), np.array(dec), np.zeros(len(dec)))
        assert decode(encode(catalogue)).dec == pytest.approx(dec, abs=1e-5)


def test_shipped_catalogue_holds_tycho_2():
    catalogue = load_catalogue()
    assert len(catalogue) == 1_871_011
    # Rigel, HD 200775 in NGC 7023, HD 209458 with its planet.
    for ra, dec, mag in ((78.6345, -8.2016, 0.3), (315.4036, 68.1633, 7.42), (330.7950, 18.8842, 7.7)):
        near = catalogue.cone(ra, dec, 3 / 3600)
        assert len(near) == 1 and near.mag[0] == pytest.approx(mag, abs=0.15)
    # The poles of the galaxy are the emptiest places.
    for ra, dec in ((192.86, 27.13), (12.86, -27.13), (290.0, 11.0), (0.0, 90.0), (0.0, -90.0)):
        assert len(catalogue.cone(ra, dec, 2)) / (4 * np.pi) > 18


def test_shipped_catalogue_holds_the_same_numbers_however_it_is_packed():
    catalogue = load_catalogue()
    content = hashlib.blake2b(digest_size=16)
    for column in (catalogue.ra, catalogue.dec, catalogue.mag):
        content.update(column.astype("<f8").tobytes())
    assert content.hexdigest() == "8caf6cada6d2663dd9a16c9c06171478"


def test_shipped_catalogue_is_read_in_no_time():
    packed = files("zemosaic.solve").joinpath(DATA_FILE).read_bytes()
    start = time.process_time()
    assert len(decode(packed)) == 1_871_011
    assert time.process_time() - start < 0.25  # 0.04 s; with xz it was 0.4 s


def test_shipped_catalogue_comes_with_its_terms_of_use():
    terms = files("zemosaic.solve").joinpath(LICENSE_FILE).read_text(encoding="utf-8")
    assert "BSD-2-Clause" in terms and "Hog E." in terms


def debian_package(index: bytes | None, terms: bytes | None) -> bytes:
    """The layout of a .deb: an ar archive of a version, a control archive and a data archive."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for name, content in (("./usr/share/astrometry/index.fits", index), ("./usr/share/doc/x/copyright", terms)):
            if content is not None:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", lzma.compress(inner.getvalue()))):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return package


def star_index(catalogue: Catalogue) -> bytes:
    """As much of an astrometry.net index as holds the stars."""

    def table(name: str, array: np.ndarray) -> fits.BinTableHDU:
        raw = np.frombuffer(array.tobytes(), np.uint8).reshape(len(array), -1)
        return fits.BinTableHDU.from_columns([fits.Column(name=name, format=f"{raw.shape[1]}B", array=raw)])

    stored = np.rint((to_vectors(catalogue.ra, catalogue.dec) + 1) * 2147483647.5).astype("<u4")
    limits = np.array([-1, -1, -1, 1, 1, 1, 2147483647.5], "<f8")
    mag = fits.BinTableHDU.from_columns([fits.Column(name="MAG_VT", format="E", array=catalogue.mag)])
    hdus = [fits.PrimaryHDU(), table("kdtree_range_stars", limits), table("kdtree_data_stars", stored), mag]
    out = io.BytesIO()
    fits.HDUList(hdus).writeto(out)
    return out.getvalue()


def test_pack_turns_the_debian_package_into_the_data_file(tmp_path):
    stars = scattered(5000)
    package = tmp_path / "index.deb"
    package.write_bytes(debian_package(star_index(stars), b"terms"))
    main([str(package), str(tmp_path)])
    back = decode((tmp_path / "tycho2.z").read_bytes())
    assert len(back) == len(stars)
    assert back.dec == pytest.approx(stars.dec, abs=1e-5)
    assert (tmp_path / LICENSE_FILE).read_bytes() == b"terms"


def test_pack_reads_an_index_to_the_last_digit():
    stars = scattered(1000)
    read = index_stars(star_index(stars))
    assert read.ra == pytest.approx(stars.ra, abs=1e-6) and read.dec == pytest.approx(stars.dec, abs=1e-6)
    assert read.mag == pytest.approx(stars.mag, abs=1e-5)


@pytest.mark.parametrize(
    ("package", "complaint"),
    [
        (b"PK\x03\x04", "no Debian package"),
        (debian_package(None, b"terms"), "fits"),
        (debian_package(b"index", None), "copyright"),
    ],
)
def test_pack_says_what_a_package_lacks(package, complaint):
    with pytest.raises(ValueError, match=complaint):
        unpack(package)
