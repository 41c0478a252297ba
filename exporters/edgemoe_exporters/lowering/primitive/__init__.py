"""Custom ops of a trace, decomposed into primitive ONNX ops; for graphs of both flavours."""
