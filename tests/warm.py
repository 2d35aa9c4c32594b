"""Imported by the server that test processes are forked from: one tiny run, so that all code is loaded and compiled."""

import tempfile
from pathlib import Path

from zemosaic.demo import make_field
from zemosaic.settings import Settings
from zemosaic_worker import run_hierarchical_mosaic

with tempfile.TemporaryDirectory() as name:
    make_field(Path(name, "subs"), frames=9, panels=(1, 1), shape=(192, 256), star_density=9000)
    # Stars enough that frames have some in common, and lots that samples are rejected of frames and of mega-tiles.
    settings = Settings(num_processing_workers=1, report=False, sds_min_batch_size=3, sds_target_batch_size=3)
    for sds in (True, False):
        run_hierarchical_mosaic(Path(name, "subs"), Path(name, "out"), settings, sds=sds)
