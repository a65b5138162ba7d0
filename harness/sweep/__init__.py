"""The use cases of measuring: from a matrix to a plan, and from a plan to records."""
