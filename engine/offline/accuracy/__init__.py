"""Measures what a precision costs: perplexity, losses, and the adaptation of each expert's bitwidth."""
