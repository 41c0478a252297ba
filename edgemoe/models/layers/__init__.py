"""One MoE layer: its experts, widths and factors, whichever class holds them."""
