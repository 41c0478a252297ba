"""Build TensorRT engines from a bundle: needs no torch, because it runs on the device."""
