"""Score against kept fraction, by method and seed, and the deepest cut that holds."""
