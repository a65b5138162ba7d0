"""Computes experts: natively if a library for the processor was built and agrees with numpy, else with numpy."""

from __future__ import annotations

import os
from typing import List, Tuple

from engine.device.cores import arithmetic_threads
from engine.errors import RequestError
from engine.kernels.native import NativeKernels
from engine.kernels.processor import NativeUnavailableError
from engine.kernels.reference import Kernels
from engine.protocol import BACKENDS

BACKEND_VARIABLE = "EDGEMOE_BACKEND"  # of the environment: what `auto` stands for

__all__ = ["Kernels", "NativeKernels", "make_kernels"]


def make_kernels(backend: str, threads: int = 0) -> Tuple[Kernels, List[str]]:
    """Returns the kernels of `backend`, one of BACKENDS, and notes on the choice: `auto` falls back to numpy.

    Where EDGEMOE_BACKEND is set, `auto` is what it says.

    `threads` 0: as many as suit the device. numpy's BLAS takes its own from the environment, one unless told otherwise.
    Raises RequestError where `native` was asked for and does not work here.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(BACKEND_VARIABLE):
        source, backend = BACKEND_VARIABLE, os.environ[BACKEND_VARIABLE]
    if backend not in BACKENDS:
        raise RequestError(f"{source} {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "numpy":
        return Kernels(threads or 1), []
    try:
        return NativeKernels(threads or arithmetic_threads()), []
    except NativeUnavailableError as error:
        if backend == "native":
            raise RequestError(f"{source} native: {error}; ask for numpy or auto") from None
        return Kernels(threads or 1), [f"numpy computes, several times slower than native kernels: {error}"]
