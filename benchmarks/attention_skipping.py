"""What leaving out heads that are off gains: `sdpa` with skipping against one plain call, the gate on its
context.

Prints, for each case, the share of (head, row) pairs that is on, the time of the plain call, the ratio of the
skipping one to it, the ratio that `headoff.attention.skipping` expects, and what `sdpa` therefore does. Times
are the least of several interleaved repetitions. A ratio below 1 is a gain.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from headoff.attention import skipping
from headoff.attention.contract import gate_context
from headoff.attention.sdpa import _attend


def gates(heads: int) -> dict[str, Tensor]:
    """Each case's gate (configurations, heads)."""
    first_off = [[float(head >= off) for head in range(heads)] for off in range(heads + 1)]
    cases = {
        "cumulative sweep": torch.tensor(first_off),
        "one head off at a time": torch.cat([torch.ones(1, heads), 1 - torch.eye(heads)]),
        "all subsets": torch.tensor(list(itertools.product([0.0, 1.0], repeat=heads))),
    }
    for off in range(1, heads):
        cases[f"one run, {off} off"] = torch.tensor(first_off[off : off + 1])
    return cases


def least_times(runs: list[Callable[[], object]], seconds: float) -> list[float]:
    """The shortest time of each of ``runs``, taken in turns, so that a busy moment meets all of them."""
    best = [float("inf")] * len(runs)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use (default: 1)")
    parser.add_argument("--heads", type=int, default=8, help="heads (default: 8)")
    parser.add_argument("--queries", type=int, default=100, help="queries of a configuration (default: 100)")
    parser.add_argument("--keys", type=int, default=850, help="keys (default: 850, an image of 800 x 1066)")
    parser.add_argument("--channels", type=int, default=32, help="channels of a head (default: 32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{'case':24}{'on':>6}{'':4}{'plain':>10}{'ratio':>8}{'expected':>10}  choice")
    for case, configurations in gates(options.heads).items():
        folded = configurations.t().repeat_interleave(options.queries, dim=1)[None, :, :, None]
        for backward in (False, True):
            measure(case, folded, backward, options)


def measure(case: str, head_gate: Tensor, backward: bool, options: argparse.Namespace) -> None:
    """Measure and print one case; ``head_gate`` is (1, heads, rows, 1)."""
    _, heads, rows, _ = head_gate.shape
    # in the order in which a transformer's projections leave them: (batch, length, heads, channels),
    # transposed
    query, key, value = (
        torch.randn(1, length, heads, options.channels).transpose(1, 2).requires_grad_(backward)
        for length in (rows, options.keys, options.keys)
    )

    def run(context: Callable[[], Tensor]) -> Callable[[], object]:
        if not backward:
            return lambda: gate_context(context(), head_gate)
        return lambda: torch.autograd.grad(gate_context(context(), head_gate).sum(), (query, key, value))

    def skip() -> Tensor:
        groups = skipping.groups_of(head_gate, query)
        return skipping.attend_groups(groups, _attend, query, key, value, None)

    plain, skipped = least_times([run(lambda: _attend(query, key, value, None)), run(skip)], options.seconds)
    expected = skipping.expected_ratio(skipping.groups_of(head_gate, query), query, options.keys)
    print(
        f"{case:24}{head_gate.count_nonzero() / head_gate.numel():6.2f} {'f+b' if backward else 'fwd'}"
        f"{plain * 1e3:8.2f}ms{skipped / plain:8.2f}{expected:10.2f}  {'skip' if expected < 1 else 'plain'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
