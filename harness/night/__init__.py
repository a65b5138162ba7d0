"""The use case of a nightly run: configuration, the night itself, the webhook."""
