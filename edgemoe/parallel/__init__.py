"""Run a function over many jobs: in this process, on local processes, or on a Ray cluster."""
