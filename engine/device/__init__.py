"""What the device is, and how it is at this moment: facts, sensors, limits, cores, and what watches a run."""
