"""The desk: a window for those who do not open a terminal.

The window never computes: the engine (`zemosaic run`) and a helper that reads headers run as processes of their
own, so that nothing freezes the window and a crash of one is not a crash of the other. `protocol` and `helper`
are the far ends of those two wires; they and this module import no Qt.
"""
