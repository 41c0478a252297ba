"""Inference engines behind one protocol; each imports its package inside open()."""
