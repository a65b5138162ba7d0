"""Runs sparse mixture-of-experts models whose experts lie on storage: the EdgeMoE engine.

This folder is copied to a device as it is and needs python3 (>= 3.8) and numpy, nothing else.
`engine.offline` is the exception: it runs on the controller only and is never deployed.
"""

__version__ = "0.1.0"
