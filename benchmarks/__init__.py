"""Every published measurement of edge_speq: how it is made, what was measured, and the tables made of it."""
