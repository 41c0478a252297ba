"""What a reader can run: the demo, its texts, and what the reference MoE was distilled to."""
