"""Directions on the sky as unit vectors, which know neither a pole nor RA 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_vectors(ra: NDArray, dec: NDArray) -> NDArray[np.float64]:
    """Unit vectors ``(..., 3)`` of positions in degrees."""
    ra, dec = np.deg2rad(ra), np.deg2rad(dec)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def to_radec(vector: NDArray) -> tuple[float, float]:
    """Right ascension and declination, degrees, of one vector of any length."""
    x, y, z = vector
    return float(np.rad2deg(np.arctan2(y, x)) % 360), float(np.rad2deg(np.arctan2(z, np.hypot(x, y))))


def separation(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Angle between unit vectors, degrees; exact for small ones."""
    return np.rad2deg(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))
