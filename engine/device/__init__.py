"""Says what the device is and how it is now: facts, sensors, limits, cores, and the watch beside a run."""
