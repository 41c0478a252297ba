"""From a traced graph to one that an engine runs: tables of ops per flavour; quantisation."""
