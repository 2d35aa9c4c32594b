"""The books of a run: what became of every file, and what the product's header tells."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zemosaic.headers import printable
from zemosaic.intake import Intake
from zemosaic.job import Job, RouteResult
from zemosaic.ledger import FrameRecord, Ledger, fate
from zemosaic.product import ProductFacts
from zequalitymt import frame_metrics


def write_ledger(intake: Intake, job: Job, made: RouteResult) -> Ledger:
    """One record for every file that was found.

    Raises
    ------
    LedgerError
        If a file is missing or in it twice: nothing may be lost on the way.
    """
    names = short_names(intake.files)
    ledger = Ledger(
        FrameRecord(names[p], "rejected", why, **_facts(p, intake, job)) for p, why in intake.rejected.items()
    )
    for sub, outcome in zip(job.subs, made.outcomes, strict=True):
        status, why, share = fate(outcome.used, outcome.rejected, outcome.lost)
        ledger.add(
            FrameRecord(
                names[sub.frame.path],
                status,
                why,
                outcome.lot,
                gain=tuple(sub.adjustment.gain.tolist()),
                level=tuple(sub.adjustment.plane[:, 0].tolist()),
                weight=float(sub.weight.mean()),
                rejected_share=share,
                **_facts(sub.frame.path, intake, job),
            )
        )
    ledger.check(names.values(), made.tiles)
    return ledger


def _facts(path: Path, intake: Intake, job: Job) -> dict[str, Any]:
    """What the ledger says of any frame that was measured, used or not."""
    verdict, measure = job.verdicts.get(path), intake.measured.get(path)
    if measure is None:
        return {}
    metrics = verdict.metrics if verdict else frame_metrics(measure)
    names = ("fwhm", "sky", "stars", "ellipticity", "trailing", "snr", "transparency")
    facts: dict[str, Any] = {name: getattr(metrics, name) for name in names}
    if verdict:
        exposure = verdict.frame.exposure
        facts["exposure"] = np.nan if exposure is None else exposure
        facts["date_obs"] = verdict.frame.date_obs
        facts["remark"] = "" if path in intake.rejected else verdict.reason
    return facts


def short_names(files: Sequence[Path]) -> dict[Path, str]:
    """Every file by its path below the folder that holds them all."""
    folder = os.path.commonpath([p.parent for p in files])
    return {p: printable(Path(os.path.relpath(p, folder)).as_posix()) for p in files}


def product_facts(job: Job, route: str, made: RouteResult, failures: Sequence[str]) -> ProductFacts:
    """What the product's header tells of the run."""
    frames = [sub.frame for sub in job.subs]
    cards = (
        ("NORMALIZ", job.settings.stacking_normalize_method, "stacking_normalize_method"),
        ("WEIGHTS", job.settings.stacking_weighting_method, "stacking_weighting_method"),
        ("REJECT", job.settings.stacking_rejection_algorithm, "stacking_rejection_algorithm"),
        ("STARGRPS", len(set(job.photometry.star_groups.tolist())), "groups of frames tied by stars"),
        ("SKYGRPS", len(set(job.photometry.sky_groups.tolist())), "groups of frames tied by shared sky"),
    )
    return ProductFacts(
        route,
        _most_common(f.object for f in frames),
        _most_common(f.filter for f in frames),
        _most_common(f.instrument for f in frames),
        "; ".join(failures),
        cards + tuple(made.cards),
        tuple(made.history),
    )


def _most_common(words: Iterable[str]) -> str:
    """The word most frames carry; of equals the first in the alphabet."""
    counts = Counter(word for word in words if word)
    return min(counts, key=lambda word: (-counts[word], word), default="")
