"""Says why a device cannot be reached, whatever was raised meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.errors import FarmError, UnreachableError
from reports.text import harmless

# What paramiko says where its own wait has ended.
_WORDS = {"No existing session": "no answer in time", "Error reading SSH protocol banner": "it does not say what it is"}


@contextmanager
def of_device(name: str, what: str, remedy: str) -> Iterator[None]:
    """Turns whatever paramiko and the sockets raise into an UnreachableError of the device."""
    try:
        yield
    except FarmError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this device's
        raise UnreachableError(f"{name}: {what} ({reason_of(error)}): {remedy}") from None


def reason_of(error: BaseException) -> str:
    """Returns an error in one line, with words where it has none."""
    text = (
        _WORDS.get(str(error))
        or str(error)
        or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
    )
    return harmless(text, limit=300)
