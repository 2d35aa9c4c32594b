"""What all tests share: strict messages, the folder of real data, and small fields with a known truth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["ZEMOSAIC_STRICT_MESSAGES"] = "1"  # a message that is missing fails the test that needs it

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real subs; tests that need it skip where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the folder with real subs is not here")
    return folder
