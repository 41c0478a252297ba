"""What pruning, factoring and recovery cost and gain."""
