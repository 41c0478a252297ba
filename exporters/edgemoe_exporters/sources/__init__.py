"""Where an export takes its model from: memory, or a checkpoint that is larger than it."""
