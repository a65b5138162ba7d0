"""Turns a checkpoint into a container: layouts, families, tensors."""
