"""From text to tokens and back: prompts, steps, sampling, stopping, scoring."""
