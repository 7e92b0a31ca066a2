"""Whether the nodes of a run fit together, found out before it starts: software, data, clocks, room, network."""
