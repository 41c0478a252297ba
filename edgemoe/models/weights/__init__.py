"""Stored weights: files, names, types, what is left out, and hashes."""
