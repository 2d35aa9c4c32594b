"""Lots that the user brings: which raw frames belong together in one mega-tile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from zemosaic.settings import SettingsError, read_document

_KEYS = ("lots", "preplan_path_groups")


def read_lots(path: Path) -> list[list[Path]]:
    """Read a file of lots.

    Parameters
    ----------
    path : Path
        ``.json`` or ``.toml``: a list of lists of raw paths, or a mapping that holds such a list as
        ``lots`` or ``preplan_path_groups``. Relative paths start at the folder of the file.

    Returns
    -------
    list of list of Path
        Absolute paths in the order of the file. Whether they exist is not looked at: the run counts
        the ones that match no frame.

    Raises
    ------
    SettingsError
        If the file cannot be read, has another shape, or names a frame twice.
    """
    groups = _groups(path, read_document(path))
    seen: dict[Path, int] = {}
    lots = []
    for number, group in enumerate(groups, start=1):
        if not isinstance(group, list) or not group or not all(isinstance(raw, str) and raw for raw in group):
            raise SettingsError(f"{path}: lot {number} is not a list of paths: {str(group)[:80]}")
        # Not Path.resolve(): a link to a raw frame is a name of its own.
        lot = [Path(os.path.abspath(path.parent / Path(raw).expanduser())) for raw in group]
        for raw_path in lot:
            if raw_path in seen:
                raise SettingsError(f"{path}: {raw_path} is in lot {seen[raw_path]} and again in lot {number}")
            seen[raw_path] = number
        lots.append(lot)
    return lots


def _groups(path: Path, document: Any) -> list[Any]:
    if isinstance(document, dict):
        names = [key for key in _KEYS if key in document]
        if len(names) != 1:
            raise SettingsError(f"{path} must have exactly one of the keys {' and '.join(_KEYS)}")
        document = document[names[0]]
    if not isinstance(document, list) or not document:
        raise SettingsError(f"{path} does not hold a list of lots")
    return document
