"""The arithmetic on experts: natively where a library for the processor was built and agrees with numpy, else there."""

from __future__ import annotations

from typing import List, Tuple

from engine.errors import RequestError
from engine.kernels.native import NativeKernels, NativeUnavailableError
from engine.kernels.reference import Kernels
from engine.protocol import BACKENDS

__all__ = ["Kernels", "NativeKernels", "make_kernels"]


def make_kernels(backend: str, threads: int = 1) -> Tuple[Kernels, List[str]]:
    """The kernels of `backend`, one of BACKENDS, on so many threads, and what is to be known of it.

    `auto` falls back to numpy.

    Raises RequestError where `native` was asked for and does not work here.
    """
    if backend not in BACKENDS:
        raise RequestError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "numpy":
        return Kernels(), []
    try:
        return NativeKernels(threads), []
    except NativeUnavailableError as error:
        if backend == "native":
            raise RequestError(f"backend native: {error}; ask for numpy or auto") from None
        return Kernels(), [f"numpy computes, several times slower than native kernels: {error}"]
