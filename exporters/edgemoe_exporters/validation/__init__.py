"""Validate what was written: parity, quality gate, and the measured k ladder."""
