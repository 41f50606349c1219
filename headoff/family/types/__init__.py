"""One file for each type of detector, or for types that differ in names only."""
