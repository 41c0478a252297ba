"""What `edgemoe inspect` tells of a file or directory. No torch without `--full`."""
