"""The scripts behind every figure; each runs from the repository's root.

    python -m benchmarks.graph_speed demo/moe
    python -m benchmarks.adaptive_k.policies --help

What several of them share lies beside them: `commands` runs edgemoe's commands once each,
`task_options` declares the arguments of scripts that compare on tasks, `tables` writes
Markdown, `wide_model` and `random_checkpoint` make models.
"""
