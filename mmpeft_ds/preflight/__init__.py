"""Checks before a run starts whether its nodes fit together: software, data, clocks, disk space, network."""
