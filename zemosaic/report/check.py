"""``zemosaic check``: the verdict on any mosaic, ours or another program's, with its subs or alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic import intake as steps
from zemosaic.calibrate import Calibration
from zemosaic.canvas import Canvas, CanvasError, pixel_scale
from zemosaic.events import Events, render
from zemosaic.execute import worker_count
from zemosaic.frames import Frame, FrameError, read_frame
from zemosaic.report.evidence import Catalogue, Evidence, SeenFrame, gather, outline
from zemosaic.report.measures import TooLittle
from zemosaic.report.verdict import Verdict, judge
from zemosaic.settings import Settings
from zemosaic.tiles import FloatImage, Mosaic, alpha_of, has_data

EXIT_GOOD, EXIT_BAD = 0, 1

_ZEROS = 1e-3  # share of exact zeros from which they mean "no data" in a file without NaN


class CheckError(Exception):
    """The mosaic or the catalogue cannot be read; the message says why."""


@dataclass(frozen=True)
class Check:
    """Outcome of a check.

    Parameters
    ----------
    verdict : Verdict
    lines : tuple of str
        What to print.
    exit_status : int
        1 if the verdict is FAIL, else 0.
    """

    verdict: Verdict
    lines: tuple[str, ...]
    exit_status: int


def check_mosaic(
    mosaic: Path,
    subs: Sequence[Path] = (),
    *,
    catalogue: Path | None = None,
    settings: Settings | None = None,
    events: Events | None = None,
) -> Check:
    """Judge a mosaic.

    Parameters
    ----------
    mosaic : Path
        FITS: a 2-D image or three planes; NaN = no data (or zero, in a file that has no NaN). Extensions ``COVERAGE``,
        ``FRAMES`` and ``MEGATILES`` are used if it has them.
    subs : sequence of Path
        Its frames, or folders of them. They are measured and matched on the grid of the mosaic.
    catalogue : Path, optional
        Reference stars, see `read_catalogue`.
    settings : Settings, optional
        How the subs are measured and matched; ``language`` and ``num_processing_workers``.
    events : Events, optional
        Is told about every sub that is left out, and of the progress.

    Raises
    ------
    CheckError
        The mosaic or the catalogue cannot be read, or subs are given and none of them can be used.
    """
    settings = settings or Settings()
    events = events or Events(language=settings.language)
    frame, evidence = read_mosaic(mosaic)
    if catalogue is not None:
        evidence = replace(evidence, catalogue=read_catalogue(catalogue))
    matched = 0
    if subs:
        try:
            evidence = _with_subs(mosaic, frame, evidence, subs, settings, events)
        except (CanvasError, FrameError) as problem:
            raise CheckError(str(problem)) from problem
        matched = len(evidence.frames) if evidence.frames is not None else 0
        if not matched:
            raise CheckError(f"none of the subs lies on {mosaic}")
    try:
        verdict = judge(evidence, worker_count(settings.num_processing_workers))
    except TooLittle as problem:
        raise CheckError(f"{mosaic}: {problem}") from problem
    note = render("verdict_alone", {}, settings.language)
    if subs:
        note = render("verdict_subs", {"matched": matched}, settings.language)
    lines = (*report_lines(verdict, settings.language), note)
    return Check(verdict, lines, EXIT_BAD if verdict.grade == "FAIL" else EXIT_GOOD)


def read_mosaic(path: Path) -> tuple[Frame, Evidence]:
    """A mosaic file as it is: its header facts, its image, WCS and coverage.

    Raises
    ------
    CheckError
        If there is no image in it that can be read.
    """
    try:
        frame = read_frame(path)
        image = _pixels(frame)
    except (FrameError, OSError, ValueError, TypeError, fits.VerifyError) as problem:
        raise CheckError(f"{path}: {problem}") from problem
    coverage = None
    with contextlib.suppress(KeyError, OSError), fits.open(path) as hdus:
        stored = np.asarray(hdus["COVERAGE"].data, np.float32)
        coverage = stored if stored.shape == image.shape[:2] else None
    image = _without_blanks(image, coverage)
    if not np.isfinite(image).any():
        raise CheckError(f"{path}: its image holds no data")
    return frame, Evidence(image, coverage, frame.wcs)


def _pixels(frame: Frame) -> FloatImage:
    """The image as float32, ``(ny, nx)`` or ``(ny, nx, 3)``.

    Not by `zemosaic.frames.read_pixels`: a sub that ends in rows of zeros was cut short, a mosaic has an empty border.
    """
    with fits.open(frame.path, memmap=False) as hdus:
        for hdu in hdus:
            data = hdu.data if hdu.is_image else None
            if data is None or data.ndim < 2:
                continue
            image = np.squeeze(np.asarray(data, np.float32))
            if image.ndim == 3 and image.shape[0] == 3:
                image = np.moveaxis(image, 0, -1)
            if image.shape[:2] == frame.shape and image.shape[2:] in ((), (3,)):
                return np.ascontiguousarray(image)
    raise ValueError("it has no image of two axes, or of three with three colours")


def _without_blanks(image: FloatImage, coverage: FloatImage | None) -> FloatImage:
    """The image with NaN where there are no data."""
    empty = (image == 0) if image.ndim == 2 else (image == 0).all(axis=2)
    if np.isnan(image).any() or empty.mean() < _ZEROS:
        empty = np.zeros(empty.shape, bool)
    empty |= ~has_data(image)
    if coverage is not None:
        empty |= ~(coverage > 0)
    image = image.copy() if empty.any() else image
    image[empty] = np.nan
    return image


def read_catalogue(path: Path) -> Catalogue:
    """Reference stars from any table that astropy reads (CSV, FITS, ...).

    Columns ``ra`` and ``dec`` in degrees, ICRS; ``mag`` may be missing. Names in any case.

    Raises
    ------
    CheckError
        If it cannot be read or lacks a column.
    """
    try:
        table = Table.read(path)
    except (OSError, ValueError) as problem:
        raise CheckError(f"{path}: {problem}") from problem
    columns = {name.lower(): table[name] for name in table.colnames}
    if "ra" not in columns or "dec" not in columns:
        raise CheckError(f"{path}: it has no columns ra and dec, but {', '.join(table.colnames)}")

    def values(name: str) -> NDArray[np.float64]:
        return np.ma.filled(np.ma.asarray(columns[name], float), np.nan)

    ra, dec = values("ra"), values("dec")
    known = np.isfinite(ra) & np.isfinite(dec)
    mag = values("mag") if "mag" in columns else np.full(len(ra), np.nan)
    return Catalogue(ra[known], dec[known], mag[known])


def _with_subs(
    path: Path, frame: Frame, evidence: Evidence, subs: Sequence[Path], settings: Settings, events: Events
) -> Evidence:
    """Measure the subs and match them on the mosaic's grid, as a run would."""
    if frame.wcs is None:
        raise CheckError(f"{path}: {frame.wcs_problem or 'it has no WCS'}; without one its subs cannot be compared")
    workers = worker_count(settings.num_processing_workers)
    taken = path.resolve()
    intake = steps.scan(subs, workers, events)
    intake.drop(["it is the mosaic itself" if f.path.resolve() == taken else "" for f in intake.frames], events)
    steps.measure_all(intake, Calibration(), settings, workers, events)
    steps.locate_all(intake, settings, workers, events)
    steps.select(intake, events)
    canvas = Canvas(frame.wcs, evidence.shape, pixel_scale(frame.wcs))
    off = "it does not lie on the mosaic"
    intake.drop(["" if _lies_on(frame.wcs, evidence.shape, f) else off for f in intake.frames], events)
    books = _books(path)
    left_out = "the mosaic's own table says that it was not used"
    intake.drop([left_out if books and f.path.name not in books else "" for f in intake.frames], events)
    if not intake.frames:
        return evidence
    matched, photometry = steps.match(intake, canvas, settings, workers, events)
    channels = evidence.channels
    if len(matched[0].noise) != channels:
        raise CheckError(f"{path} has {channels} colours and its subs have {len(matched[0].noise)}")
    seen = []
    for i, (sub, measure) in enumerate(zip(matched, intake.measures, strict=True)):
        lot, gain = books.get(sub.frame.path.name, (-1, None))
        radius = intake.aperture.radius * intake.zooms.get(sub.frame.camera, 1.0)
        seen.append(SeenFrame(sub.frame, measure, sub.pixel_map, i, lot, written_gain=gain, aperture=radius))
    whole = evidence.coverage
    if whole is None:
        there = np.isfinite(evidence.image if channels == 1 else evidence.image[..., 0])
        whole = there.astype(np.float32)
    found = gather(Mosaic(evidence.image, whole, alpha_of(whole), frame.wcs), seen, photometry, canvas)
    return replace(found, coverage=evidence.coverage, catalogue=evidence.catalogue)


def _lies_on(wcs: WCS, shape: tuple[int, int], frame: Frame) -> bool:
    """Whether a sub shows a part of the mosaic; on the far side of the sky there is no projection at all."""
    edge = outline(frame, wcs)
    return bool(np.isfinite(edge).all() and (edge.max(axis=0) > 0).all() and (edge.min(axis=0) < shape[::-1]).all())


def _books(path: Path) -> Mapping[str, tuple[int, NDArray[np.float64]]]:
    """Lot and gain (its tile's included) of every frame that the mosaic's own tables call used; by file name."""
    books: dict[str, tuple[int, NDArray[np.float64]]] = {}
    with contextlib.suppress(KeyError, OSError, ValueError), fits.open(path) as hdus:
        frames = hdus["FRAMES"].data
        columns = ("FILE", "LOT", "STATUS", "GAIN")
        if not set(columns) <= set(frames.names):
            return books
        tile_gain: dict[int, float] = {}
        with contextlib.suppress(KeyError):
            tiles = hdus["MEGATILES"].data
            tile_gain = {int(i): float(g) for i, g in zip(tiles["TILE"], tiles["GAIN"], strict=True)}
        for file, lot, status, gain in zip(*(frames[name] for name in columns), strict=True):
            if status != "rejected":
                written = np.atleast_1d(np.asarray(gain, float)) * tile_gain.get(int(lot), 1.0)
                books[Path(file).name] = (int(lot), written)
    return books


def report_lines(verdict: Verdict, language: str = "en") -> list[str]:
    """The figures as text, one a line, by group; then what is at fault; then the grade of it all."""
    lines, group = [], ""
    for figure in verdict.figures:
        if not np.isfinite(figure.value):
            continue
        if figure.group != group:
            group = figure.group
            lines.append(render(f"verdict_group_{group}", {}, language))
        grade = figure.grade if figure.grade != "NONE" else ""
        label = render(f"verdict_{figure.key}", {}, language)
        limit = f"< {figure.warn:.3g}" if np.isfinite(figure.warn) else ""
        lines.append(f"  {grade:4s} {label:64s} {figure.value:10.3f} {figure.unit:6s} {limit}".rstrip())
    lines += [f"{found.grade}: {found.text(language)}" for found in verdict.findings]
    lines.append(render("verdict_total", {"grade": verdict.grade}, language))
    return lines
