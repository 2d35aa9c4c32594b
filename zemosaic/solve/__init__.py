"""Where a frame points: a WCS for every frame that lacks a good one, found offline from its own stars."""
