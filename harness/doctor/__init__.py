"""Checks of the controller and of devices.

A check is a function that takes what is known and yields findings. controller.py and device.py hold tables of them; a
transport adds its own in its row. `edgemoe-farm doctor` runs all checks. Opening a session runs the cheap checks of
its device and refuses a device with an error.
"""
