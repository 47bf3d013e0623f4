"""Measurements: `make bench`. Every figure is of one run on one machine, and next to what it is compared with in the same run."""
