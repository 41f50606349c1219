"""What the test suites need: golden files, and comparison of a candidate with them."""
