"""What :mod:`edgemoe_exporters.lower_ort` puts in the place of traced nodes, op by op."""
