"""Sources of the model of an export: memory, or a checkpoint that is larger than it."""
