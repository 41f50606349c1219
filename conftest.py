"""Settings of every test run."""

import os

import torch

# One thread a worker under pytest-xdist, all cores without it: two workers of two threads each on two cores wait
# for each other most of the time.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1)
