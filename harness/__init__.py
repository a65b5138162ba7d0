"""Controls the devices: plans, deploys, runs and records."""
