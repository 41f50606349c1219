"""How often a detector calls its attention, and where: the proof that the attention under test has run at all."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from torch import Tensor

from headoff.detr.detector import Detector
from headoff.detr.transformer import Attend, AttentionAddress, AttentionCall
from headoff.gates import SITES
from headoff.harness.finding import Finding


class CallCount:
    """Counts the calls of a detector's attention, address by address, as long as the context lasts.

    What is counted is a call that the attention has answered, not one that raised.
    """

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.of: Counter[AttentionAddress] = Counter()

    def __enter__(self) -> CallCount:
        self._intercepting = self._detector.intercepting(self._count)
        self._intercepting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._intercepting.__exit__(kind, error, trace)

    def _count(self, call: AttentionCall, proceed: Attend) -> Tensor:
        context = proceed(call)
        self.of[call.address] += 1
        return context

    @property
    def by_site(self) -> dict[str, int]:
        """Calls at each site, of all layers together."""
        return {site: sum(n for at, n in self.of.items() if at.site == site) for site in SITES}

    def findings(self, case: str, encodes: int, decodes: int, *, at_least: bool = False) -> list[Finding]:
        """One for each site where the model has called its attention less often than it must, or more.

        In each of its layers once for every encoding or decoding, `encodes` and `decodes` of them; or `at_least` so
        often, where backward passes call it again.
        """
        layout = self._detector.head_layout
        found = []
        for site in SITES:
            times = encodes if site == "encoder_self" else decodes
            counts = {layer: self.of[AttentionAddress(site, layer)] for layer in range(layout.layers(site))}
            wrong = {
                layer: count
                for layer, count in counts.items()
                if count < times or (count > times and not at_least)
            }
            if wrong:
                layer, count = next(iter(wrong.items()))
                found.append(
                    Finding(
                        "calls",
                        f"{site}: called {_times(count)} in layer {layer}, expected {_times(times)}"
                        + (f" (and in {len(wrong) - 1} other layers)" if len(wrong) > 1 else ""),
                        case=case,
                        error=float(count),
                        budget=float(times),
                        site=site,
                        layer=layer,
                    )
                )
        return found


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")
