"""A network link that can be cut: a namespace with a cable to this machine."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from tests.devices.userland import need


class Link:
    """A network namespace, and a pair of interfaces of which one is in it. Needs root."""

    def __init__(self) -> None:
        need("ip")
        number = os.getpid()
        self.name = f"edgemoe{number}"
        # A /30 of the block that is set aside for tests of networks (RFC 2544).
        base = f"198.{18 + (number >> 14 & 1)}.{number >> 6 & 255}."
        self.here, self.there = (f"{base}{(number & 63) * 4 + end}" for end in (1, 2))
        made = self._ip("netns", "add", self.name, check=False)
        if made.returncode != 0:
            pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
        try:
            self._ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            self._ip("address", "add", f"{self.here}/30", "dev", self.name)
            self._ip("link", "set", self.name, "up")
            self._ip("-n", self.name, "address", "add", f"{self.there}/30", "dev", "eth0")
            self._ip("-n", self.name, "link", "set", "lo", "up")
            self.mend()
        except BaseException:
            self.close()
            raise

    @property
    def within(self) -> tuple[str, ...]:
        """The command that starts another at the far end."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """Cuts the link as if somebody pulled the device's cable: nothing tells either end's connections."""
        self._ip("-n", self.name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        self._ip("-n", self.name, "link", "set", "eth0", "up")

    def close(self) -> None:
        self._ip("link", "delete", self.name, check=False)
        self._ip("netns", "delete", self.name, check=False)

    def _ip(self, *arguments: str, check: bool = True) -> Any:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
        return done
