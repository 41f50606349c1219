"""A decode that is captured once as a CUDA graph, and replayed for further images of the same token grid.

The decoder of one image is hundreds of small kernels, which a GPU finishes faster than Python launches them. In a sweep
over a folder the same gates meet the same shapes again and again; a replay then launches all of them at once. What
makes a capture wrong is anything but kernels in it, so the plan of the runs is made, and on the device, before.

CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from headoff.attention import eager, sdpa
from headoff.attention.fused import triton_attention
from headoff.detr.detector import Detector, DetectorOutput, Memory
from headoff.detr.sharing import SharingPlan
from headoff.errors import HeadoffError
from headoff.gates import Gates

WARM_UPS = 2
"""Decodes before the capture, in a stream of their own: libraries choose kernels and take workspace in their first
calls, and Triton compiles. None of that may happen in a capture."""

MOST_GRAPHS = 4
"""Each keeps the memory of one decode's activations."""

CAPTURED = (eager, sdpa, triton_attention)
"""Attentions that launch the same kernels whatever the numbers are. Python code of a patch (which may count calls, or
read its inputs) would only run once, at the capture."""


class GraphedDecode:
    """One decode, captured. `cuda` is torch's module, or what stands for it in a test."""

    def __init__(self, detector: Detector, memory: Memory, plan: SharingPlan, cuda: Any = torch.cuda) -> None:
        self._memory = Memory(memory.tokens.clone(), memory.positions.clone(), None, memory.grid)
        # Kept for as long as the graph, which reads it.
        self._plan = plan
        # A capture is of one stream. On the current device, which need not be the detector's, it would be of nothing,
        # and so would its replays be.
        with cuda.device(memory.tokens.device):
            stream = cuda.Stream()
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                for _ in range(WARM_UPS):
                    detector.decode(self._memory, plan)
            cuda.current_stream().wait_stream(stream)
            self._graph = cuda.CUDAGraph()
            # Around the capture, too: one that fails does not always leave its stream.
            with cuda.stream(stream), cuda.graph(self._graph, stream=stream):
                self._output = detector.decode(self._memory, plan)

    def __call__(self, memory: Memory) -> DetectorOutput:
        """Of a memory of the same shapes. The output is the caller's: the next replay does not change it."""
        self._memory.tokens.copy_(memory.tokens)
        self._memory.positions.copy_(memory.positions)
        self._graph.replay()
        return DetectorOutput(self._output.logits.clone(), self._output.boxes.clone())


class DecodeGraphs:
    """Decodes by graph where that can be: a `Detector.decode` for many images.

    A decode is captured when it comes for the second time: same token grid, gates, weights and attention. The first
    time, on any device but `device_type`, for padded images, under autocast, for an attention that is not among
    `CAPTURED`, for a detector whose attention calls are intercepted, and where a capture fails, it is ordinary.

    - `replays`: how many decodes came from a graph
    - `failures`: the messages of captures that failed
    """

    def __init__(self, cuda: Any = torch.cuda, device_type: str = "cuda") -> None:
        self.replays = 0
        self.failures: list[str] = []
        self._cuda = cuda
        self._device_type = device_type
        self._graphs: OrderedDict[Hashable, GraphedDecode] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    # What is captured in inference mode is written to in inference mode.
    @torch.inference_mode()
    def decode(self, detector: Detector, memory: Memory, gates: Gates) -> DetectorOutput:
        """As `Detector.decode`, errors included."""
        if not self._may_be_captured(detector, memory):
            return detector.decode(memory, gates)
        key = _key(detector, memory, gates)
        if key not in self._graphs and not self._capture(key, detector, memory, gates):
            return detector.decode(memory, gates)
        self._graphs.move_to_end(key)
        self.replays += 1
        return self._graphs[key](memory)

    def _may_be_captured(self, detector: Detector, memory: Memory) -> bool:
        return (
            memory.tokens.device.type == self._device_type
            and memory.attn_mask is None
            and detector.autocast_dtype is None
            and any(detector.attention is each for each in CAPTURED)
            and not detector.is_intercepted
        )

    def _capture(self, key: Hashable, detector: Detector, memory: Memory, gates: Gates) -> bool:
        """Whether there is a graph now."""
        if key not in self._seen or key in self._refused:
            self._seen.add(key)
            return False
        try:
            graph = GraphedDecode(detector, memory, detector.plan(gates), self._cuda)
        except (RuntimeError, HeadoffError) as error:
            # A capture is refused for reasons that are no fault of the decode (too little memory for a second set of
            # activations, another library's work in the stream). If there is a fault, the ordinary decode says so.
            self._refused.add(key)
            self.failures.append(f"{type(error).__name__}: {error}")
            return False
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return True


def _key(detector: Detector, memory: Memory, gates: Gates) -> Hashable:
    """What a capture holds fast: addresses of weights, shapes, the values of the gates."""
    weights = (
        *detector.decoder.parameters(),
        *detector.class_head.parameters(),
        *detector.box_head.parameters(),
    )
    sites = (gates.decoder_self, gates.decoder_cross)
    return (
        detector.attention,
        detector.query_embedding.weight.data_ptr(),
        tuple(weight.data_ptr() for weight in weights),
        (memory.tokens.shape, memory.tokens.dtype, memory.tokens.device, memory.grid),
        tuple(None if gate is None else _values(gate) for gate in sites),
    )


def _values(gate: Tensor) -> tuple[torch.Size, bytes]:
    # A digest: keys are remembered for every image of a folder, and gates of single queries are of some size.
    return gate.shape, hashlib.sha256(gate.detach().cpu().numpy().tobytes()).digest()
