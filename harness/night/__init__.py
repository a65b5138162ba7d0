"""Runs a night: configuration, the night itself, the webhook."""
