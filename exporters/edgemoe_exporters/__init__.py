"""Turn a Mixture-of-Experts model into graphs that run without torch.

The model is traced once with custom ops (`tracing.trace`), then lowered
for each engine by a table, so that a graph fused for one engine is never given to another.
"""
