"""Decompose the custom ops of a trace into primitive ONNX ops; for both flavours."""
