"""Read, build and edit ONNX graphs: what tracing, lowering and writing share."""
