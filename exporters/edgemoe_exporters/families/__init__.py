"""Check model families end to end, and write the table of those that work."""
