"""Works on models before a device sees them, on the controller: import, inspection, evaluation, profiles.

Never deployed. May use any library that the project depends on; the rest of the engine has numpy alone.
"""
