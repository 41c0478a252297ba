"""Quantised safetensors as checkpoints: weights are dequantised one tensor at a time.

Names, layouts and arithmetic are the producers' own; what an announcement says is honoured, or
it is refused by name, and no weight is used without its scales.
"""
