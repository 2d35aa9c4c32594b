"""What is good enough: the figures of the verdict, their units, and from where on they are a warning or a fault.

Of every figure more is worse. Steps, levels and trails are counted in units of the pixel noise, for that is what
decides whether an eye sees them: along a border of a hundred pixels and more it tells a step of a quarter of the
noise, in a picture that is stretched until its noise shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Grade = Literal["PASS", "WARN", "FAIL", "NONE"]
GRADES: tuple[Grade, ...] = ("NONE", "PASS", "WARN", "FAIL")

INF = float("inf")


@dataclass(frozen=True)
class Threshold:
    """From where on a figure is a warning, and from where on a fault; never, if infinite.

    Parameters
    ----------
    group : str
        Heading under which the figure belongs.
    unit : str
        "sigma" = pixel noise.
    warn, fail : float
        In that unit.
    """

    group: str
    unit: str
    warn: float = INF
    fail: float = INF

    def grade(self, value: float) -> Grade:
        """PASS, WARN or FAIL; NONE for what could not be measured or has no threshold."""
        if value != value or self.warn == INF == self.fail:
            return "NONE"
        return "FAIL" if value >= self.fail else "WARN" if value >= self.warn else "PASS"


THRESHOLDS: dict[str, Threshold] = {
    # A quarter of the noise shows along a border; half of it is seen at once.
    "seam_p50": Threshold("seams", "sigma", 0.15, 0.3),
    "seam_p95": Threshold("seams", "sigma", 0.25, 0.5),
    "seam_p95_adu": Threshold("seams", "ADU"),
    # One piece of border of thousands: a bright star's wing on it is enough for a warning, so never a fault.
    "seam_max": Threshold("seams", "sigma", 1.5),
    # Holds the noise of the 24-px blocks, 0.3 to 0.45 of a pixel's; beyond that it is steps, or a very lively nebula,
    # which nothing tells apart where no border is known: never a fault.
    "block_step_p99": Threshold("seams", "sigma", 1.0),
    "block_step_p99_adu": Threshold("seams", "ADU"),
    # Overlaps fix a lot's sky to hundredths of the noise; a quarter is a visible patch (see above).
    "lot_sky": Threshold("levels", "sigma", 0.15, 0.3),
    "level_rms": Threshold("levels", "sigma", 0.25, 0.5),
    "level_rms_adu": Threshold("levels", "ADU"),
    # Sub-percent photometry is what matching from stars reaches; 1 % (10 mmag) is a fault that it should have found.
    "lot_gain": Threshold("photometry", "mmag", 5.0, 10.0),
    # What the SDS chain is held to on simulated fields is 8.5 and 5 mmag; twice that is worse than a single sub.
    "phot_scatter": Threshold("photometry", "mmag", 10.0, 20.0),
    "phot_uniformity": Threshold("photometry", "mmag", 8.0, 16.0),
    # Single lots of few frames: 14 mmag a frame is usual. More than 5 % is another night's clouds, not noise.
    "repeat_median": Threshold("photometry", "mmag", 25.0, 50.0),
    "repeat_p95": Threshold("photometry", "mmag"),
    # Colour terms between a camera's green and a catalogue's magnitude are 20 to 50 mmag by themselves.
    "catalogue_scatter": Threshold("photometry", "mmag", 60.0, 150.0),
    # A frame's centroids are good to 0.05-0.1 px; 0.3 px in the middle of the distribution is a wrong solution.
    "astrom_median": Threshold("astrometry", "px", 0.15, 0.3),
    "astrom_p95": Threshold("astrometry", "px", 0.5, 1.0),
    # A lot averages that to 0.01 px; 0.1 px is a lot of its own, a quarter of a pixel deforms the stars it overlaps.
    "lot_shift": Threshold("astrometry", "px", 0.1, 0.25),
    "position_median": Threshold("astrometry", "px", 0.06, 0.2),
    # Proper motions and the plate solutions themselves: half a pixel of a smart telescope is 1.2 arcsec.
    "catalogue_median": Threshold("astrometry", "px", 0.5, 1.5),
    # Twice the noise is three quarters of the exposure lost; faint stars below detection may add a quarter.
    "noise_ratio": Threshold("noise", "", 1.25, 2.0),
    # Noise that coverage does not explain: one region in twenty as noisy as with a quarter of its frames.
    "noise_evenness": Threshold("noise", "", 2.0),
    # One interpolation costs 2 to 5 %; 13 % is what bilinear warping or a bad registration costs.
    "fwhm_ratio": Threshold("sharpness", "", 1.08, 1.13),
    "fwhm_evenness": Threshold("sharpness", "", 1.15, 1.35),
    # Seeing differs by 10 to 20 % from hour to hour; the run's own gate takes 1.6 for blurred.
    "lot_fwhm": Threshold("sharpness", "", 1.25, 1.5),
    # 0.2 is the roundness that one can see, 0.35 an axis ratio of 2 to 3.
    "ellipticity": Threshold("sharpness", "", 0.2, 0.35),
    # Any trail left over is a warning; brighter than the noise of one pixel it is in everybody's eye.
    "trail": Threshold("defects", "sigma", 0.01, 1.0),
    # A pixel here and there that every frame rejected, against a gap in the picture.
    "holes": Threshold("defects", "ppm", 50.0, 1000.0),
    # Sky that three frames and more show must be in the picture, but for the crumbs of a crop.
    "missing": Threshold("defects", "", 0.015, 0.05),
}
