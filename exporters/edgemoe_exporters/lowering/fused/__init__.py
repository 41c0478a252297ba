"""Custom ops of a trace as fused ops of onnxruntime (`com.microsoft`), op by op."""
