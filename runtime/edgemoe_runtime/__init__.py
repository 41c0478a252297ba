"""Run edgemoe bundles: no torch, no transformers, engines imported only when opened."""
