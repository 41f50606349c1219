"""Decoding as a CUDA graph: captured once, and replayed for further images with the same token grid.

The decoder launches hundreds of small kernels per image, and a GPU finishes them faster than Python launches them. A
sweep over a folder decodes the same gates with the same shapes for every image, so one replay launches all kernels. A
capture may contain nothing but kernels, so the plan of the runs is made, and copied to the device, before it.

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
from headoff.detector import Detector, DetectorOutput
from headoff.detr.detector import Detr, Memory
from headoff.detr.sharing import SharingPlan
from headoff.errors import HeadoffError
from headoff.gates import Gates

WARM_UPS = 2
"""Decodes before the capture, in a separate stream. In their first calls libraries choose kernels and allocate
workspace, and Triton compiles; none of that may happen in a capture."""

MOST_GRAPHS = 4
"""Graphs in the cache; each holds the memory of one decode's activations."""

CAPTURED = (eager, sdpa, triton_attention)
"""Attentions whose kernels do not depend on values. The Python code of a patch, which may count calls or read its
inputs, would run only at the capture."""


class GraphedDecode:
    """A captured decode. `cuda` is `torch.cuda`, or a test's substitute for it."""

    def __init__(self, detector: Detr, memory: Memory, plan: SharingPlan, cuda: Any = torch.cuda) -> None:
        self._memory = Memory(memory.tokens.clone(), memory.positions.clone(), None, memory.grid)
        # The graph reads the plan's tensors, so they must live as long as it does.
        self._plan = plan
        # A capture records one stream. A stream of the current device, if that is not the detector's, would record
        # nothing, and replays would compute nothing.
        with cuda.device(memory.tokens.device):
            stream = cuda.Stream()
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                for _ in range(WARM_UPS):
                    detector.decode(self._memory, plan)
            cuda.current_stream().wait_stream(stream)
            self._graph = cuda.CUDAGraph()
            # The context of the stream, as a failed capture does not always restore the current stream.
            with cuda.stream(stream), cuda.graph(self._graph, stream=stream):
                self._output = detector.decode(self._memory, plan)

    def __call__(self, memory: Memory) -> DetectorOutput:
        """Decode a memory of the same shapes. The output is a copy, which the next replay does not change."""
        self._memory.tokens.copy_(memory.tokens)
        self._memory.positions.copy_(memory.positions)
        self._graph.replay()
        return DetectorOutput(self._output.logits.clone(), self._output.boxes.clone())


class DecodeGraphs:
    """`Detector.decode` for many images, by CUDA graphs where possible.

    A decode is captured the second time that the same token grid, gates, weights and attention are decoded. It is not
    captured on a device other than `device_type`, for padded images, under autocast, with an attention that is not in
    `CAPTURED`, or when attention calls are intercepted; if a capture fails, decoding goes on without it.

    Attributes:
        replays: decodes that were computed by a graph.
        failures: messages of captures that failed.
    """

    def __init__(self, cuda: Any = torch.cuda, device_type: str = "cuda") -> None:
        self.replays = 0
        self.failures: list[str] = []
        self._cuda = cuda
        self._device_type = device_type
        self._graphs: OrderedDict[Hashable, GraphedDecode] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._uncapturable: set[Hashable] = set()

    # Tensors created in inference mode, in the capture, may be written to in inference mode only.
    @torch.inference_mode()
    def decode(self, detector: Detector, memory: Any, gates: Gates) -> DetectorOutput:
        """As `Detector.decode`; raises the same errors."""
        if not isinstance(detector, Detr) or not self._may_be_captured(detector, memory):
            return detector.decode(memory, gates)
        key = _key(detector, memory, gates)
        if key not in self._graphs and not self._capture(key, detector, memory, gates):
            return detector.decode(memory, gates)
        self._graphs.move_to_end(key)
        self.replays += 1
        return self._graphs[key](memory)

    def _may_be_captured(self, detector: Detr, memory: Memory) -> bool:
        return (
            memory.tokens.device.type == self._device_type
            and memory.attn_mask is None
            and detector.autocast_dtype is None
            and any(detector.attention is attention for attention in CAPTURED)
            and not detector.is_intercepted
        )

    def _capture(self, key: Hashable, detector: Detr, memory: Memory, gates: Gates) -> bool:
        """Try to capture a decode; whether there is a graph for `key` now."""
        if key not in self._seen or key in self._uncapturable:
            self._seen.add(key)
            return False
        try:
            graph = GraphedDecode(detector, memory, detector.plan(gates), self._cuda)
        except (RuntimeError, HeadoffError) as error:
            # A capture may fail where the decode does not: for lack of memory for a second set of activations, or
            # because of another library's work in the stream. An error of the decode itself is raised without it.
            self._uncapturable.add(key)
            self.failures.append(f"{type(error).__name__}: {error}")
            return False
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return True


def _key(detector: Detr, memory: Memory, gates: Gates) -> Hashable:
    """Everything that a graph depends on: addresses of weights, shapes, values of gates."""
    weights = (
        *detector.decoder.parameters(),
        *detector.class_head.parameters(),
        *detector.box_head.parameters(),
    )
    sites = (gates.decoder_self, gates.decoder_cross)
    return (
        detector.attention,
        detector.replacement,
        detector.query_embedding.weight.data_ptr(),
        tuple(weight.data_ptr() for weight in weights),
        (memory.tokens.shape, memory.tokens.dtype, memory.tokens.device, memory.grid),
        tuple(None if gate is None else _values(gate) for gate in sites),
    )


def _values(gate: Tensor) -> tuple[torch.Size, bytes]:
    # A hash, as all keys are remembered, and gates per query are large.
    return gate.shape, hashlib.sha256(gate.detach().cpu().numpy().tobytes()).digest()
