"""`headoff bench`: attention, decoder, sweep and relevance beside what else there is, on one device, in one run.

Names lead to one table: a case (`cases.py`) is computed by contestants (`contestants.py`, `notebook.py`), each of which
is checked against the float64 oracle and, if right, timed in turns with the fastest reference (`contests.py`); what
it achieves is set beside what a copy and a matrix product reach on the same device (`ceilings.py`, `roofline.py`).
"""
