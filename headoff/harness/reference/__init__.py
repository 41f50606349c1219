"""What is expected: reference cases, the float64 oracle, golden files, and the cache of what takes minutes."""
