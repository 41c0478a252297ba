"""From a transformers model to an ONNX graph with custom ops that every flavour lowers."""
