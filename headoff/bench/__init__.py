"""`headoff bench`: attention, decoder, sweep and relevance against torch's kernels and the notebooks' way.

The runs of one command end in one table. A suite (`suites.py`) yields cases; each is computed by several providers,
which are checked against the float64 oracle (`outputs.py`) and, if right, timed in turns with a reference
(`runner.py`). Attention calls are also compared with what the device can reach at best (`roofline.py`).
"""
