"""Training that wins back what pruning, merging and factoring cost."""
