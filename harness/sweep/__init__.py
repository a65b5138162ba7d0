"""Measures: turns a matrix into a plan, and a plan into records."""
