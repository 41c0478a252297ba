"""How the reference MoE of the demo was distilled, and from which texts."""
