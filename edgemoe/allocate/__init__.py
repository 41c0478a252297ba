"""How many experts each token uses: one file for each policy, and a registry."""
