"""ZeMosaic: many short telescope exposures in, one large, photometrically sound mosaic out."""

__version__ = "0.1.0"
