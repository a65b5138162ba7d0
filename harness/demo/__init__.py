"""Demonstrates the farm: emulated devices on this machine, the shipped model, texts and matrix."""
