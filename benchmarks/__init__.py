"""Measure ipguard against the least that Python can do and against other packages."""
