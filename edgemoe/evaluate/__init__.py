"""Judge a checkpoint or a bundle on a task: perplexity or accuracy, with an interval."""
