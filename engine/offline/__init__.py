"""What the controller does with models before a device sees them: import, inspection, evaluation, profiles.

Never deployed. May use any library that the project depends on; the rest of the engine has numpy alone.
"""
