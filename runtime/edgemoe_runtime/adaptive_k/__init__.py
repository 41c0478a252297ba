"""Adaptive k: experts per token at most, chosen by costs, limits and measured times."""
