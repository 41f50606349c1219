"""The procedural data set, and what is trained and evaluated on it."""
