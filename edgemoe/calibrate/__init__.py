"""Measure once what every compression method reads: routing and activation sums per task."""
