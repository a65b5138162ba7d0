"""Scripted devices: nothing runs and nothing is measured, but the controller cannot tell.

faults.py    what goes wrong, by a seeded or an explicit script
course.py    what an engine would write, and when
device.py    a device: a folder, a clock, and runs that nobody carries out
system.py    the system that the farm's own agent finds there
wire.py      the connection to it
"""

from harness.scripted.device import ScriptedDevice, declare, speed_of
from harness.scripted.faults import WHAT_HAPPENS, FaultKind, FaultScript, ScriptedFault
from harness.scripted.wire import ScriptedTransport

__all__ = [
    "WHAT_HAPPENS",
    "FaultKind",
    "FaultScript",
    "ScriptedDevice",
    "ScriptedFault",
    "ScriptedTransport",
    "declare",
    "speed_of",
]
