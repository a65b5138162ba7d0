"""Measurements are set against one another: matching, statistics, noise, verdicts, tables."""
