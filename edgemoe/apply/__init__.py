"""Carry out plans: in memory, or on a checkpoint that is larger than memory."""
