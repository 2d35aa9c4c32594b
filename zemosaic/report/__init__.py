"""The verdict on a mosaic: what was measured of it, how good that is, and what is at fault.

`evidence` gathers what is known (a run's frames, or files on disk), the modules named after a quality measure it, and
`verdict.judge` puts the figures beside their thresholds; `page` tells the story of a run. Nothing here prints.
"""
