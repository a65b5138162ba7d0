"""The geometry of the charts: numbers in, positions out. The templates draw them as SVG; colours are in page.css.

A chart is told by its title and a description with its numbers: whoever cannot see it misses nothing.
"""
