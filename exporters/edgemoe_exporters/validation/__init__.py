"""Whether what was written is right: parity, quality gate, and the measured k ladder."""
