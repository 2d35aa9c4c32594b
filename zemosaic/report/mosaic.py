"""The end of a run: judge what was saved, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from zemosaic.events import Events
from zemosaic.execute import side_by_side, worker_count
from zemosaic.ledger import Ledger, TileRecord
from zemosaic.product import ProductFacts, ProductPaths
from zemosaic.report.chronicle import Chronicle
from zemosaic.report.evidence import Evidence
from zemosaic.report.measures import TooLittle
from zemosaic.report.story import Story, headline, sky_place
from zemosaic.report.verdict import judge
from zemosaic.settings import Settings


def report_mosaic(
    evidence: Evidence,
    facts: ProductFacts,
    ledger: Ledger,
    tiles: Sequence[TileRecord],
    settings: Settings,
    chronicle: Chronicle,
    product: ProductPaths,
    events: Events,
) -> None:
    """Judge a mosaic that has just been saved, write its report, and say how it turned out.

    Parameters
    ----------
    evidence : Evidence
        The mosaic, with its WCS, and its frames.
    facts, ledger, tiles
        As the product was saved with.
    settings : Settings
        Of the run.
    chronicle : Chronicle
        What the run has said so far.
    product : ProductPaths
        Its files.
    events : Events
        Hears of the verdict, if there is enough of a picture to judge, and of the page.

    Raises
    ------
    OSError
        The report cannot be written.
    """
    workers = worker_count(settings.num_processing_workers)
    verdict, problem = None, ""
    with side_by_side(workers) as start:
        start(import_module, "zemosaic.report.page")  # the plotting library takes long to load
        try:
            verdict = judge(evidence, workers)
        except TooLittle as reason:
            problem = str(reason)
    from zemosaic.report.page import write_report

    story = Story(
        name=product.fits.stem,
        shape=evidence.shape,
        facts=facts,
        ledger=ledger,
        tiles=tiles,
        settings=settings,
        phases=chronicle.phases(),
        warnings=chronicle.warnings,
        sky=sky_place(evidence.wcs, evidence.shape) if evidence.wcs is not None else None,
        problem=problem,
    )
    written = write_report(story, verdict, product.fits, product.preview)
    events.info("report_verdict", grade=verdict.grade if verdict else "–", headline=headline(verdict, events.language))
    events.info("report_written", path=written.html)
