"""How loops over pixels, stars and equations become machine code: numba, the same way everywhere.

They release the interpreter lock and use no fast-math: a value depends on nothing but its own inputs. Compiled code is
cached on disk, so only the first run ever waits for the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], version: object = None) -> Any:
    """The function, to be compiled for the types of its arguments when it is called.

    Parameters
    ----------
    function : callable
        Of numbers and arrays.
    version : object, optional
        What tells it from others that the same lines define, such as the number of channels. Each has a cache file of
        its own: numba mixes up what two processes compile of one function at a time.
    """
    if version is not None:
        function.__qualname__ += f"_{version}"
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
