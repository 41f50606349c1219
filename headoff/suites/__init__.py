"""The heads_off suites and their golden files, in an installed package: `pytest --pyargs headoff.suites`.

A checkout has them in `tests/` and `golden/`, and this package is empty there.
"""
