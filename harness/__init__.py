"""The controller: plans, deploys, runs and records."""
