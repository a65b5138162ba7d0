"""A checkpoint becomes a container: layouts, families, tensors."""
