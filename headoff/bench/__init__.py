"""`headoff bench`: attention, decoder, sweep and relevance against torch's kernels and the notebooks' way.

A suite (`suites.py`) yields cases; each is computed by several providers, which are checked against the float64 oracle
(`outputs.py`) and, if right, timed in turns (`runner.py`).
"""
