"""Checks that need a GPU: capture in a CUDA graph, and compute-sanitizer. They never ran on one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from headoff.harness.checks.candidate import Candidate, NotApplicable, Outcome, about, check, copied, raised
from headoff.harness.contracts import DEFORMABLE
from headoff.harness.finding import Finding

SANITIZER_SECONDS = 300
FOUND = 99
"""Exit code by which compute-sanitizer says that it found something."""


@check("graph")
def graph(candidate: Candidate) -> Outcome:
    """Captured once and replayed with new numbers in the same tensors, the context is right."""
    if candidate.device.type != "cuda":
        raise NotApplicable("graphs are CUDA's: use --device cuda")
    device, when = candidate.device, "captured in a CUDA graph and replayed with new inputs"
    for fields in candidate.arguments:
        tensors = candidate.tensors(candidate.case(**fields))
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.no_grad():
                stream = torch.cuda.Stream(device)
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):  # what is set up once is set up here
                    for _ in range(3):
                        tensors.attend(candidate.attention, tensors.inputs)
                torch.cuda.current_stream(device).wait_stream(stream)
                with torch.cuda.graph(captured):
                    context = tensors.attend(candidate.attention, tensors.inputs)
        except Exception as error:
            return Outcome([raised("graph", when, error)])
        for number in range(1, 4):
            case = candidate.case(**{**fields, "seed": candidate.seed + number})
            for name, tensor in copied(candidate.tensors(case)).items():
                getattr(tensors, name).copy_(tensor)
            captured.replay()
            torch.cuda.synchronize(device)
            if found := candidate.wrong(case, {"context": context.clone()}):
                return Outcome(about("graph", when, found))
    return Outcome()


PROGRAM = """
import sys, torch
from headoff.harness.checks.candidate import Candidate
from headoff.harness.contracts import contract_named
sys.path[:0] = {path!r}
contract = contract_named({contract!r})
candidate = Candidate(contract.resolve({spec!r}), contract, {dtype}, torch.device({device!r}), {seed}, {forward_only})
for fields in candidate.arguments:
    for sizes in candidate.sizes:
        candidate.call(candidate.attention, candidate.tensors(candidate.case(**{{**fields, **sizes}})))
torch.cuda.synchronize()
"""


@check("sanitizer")
def sanitizer(candidate: Candidate) -> Outcome:
    """compute-sanitizer's memcheck of calls of all sizes, in a process of its own."""
    if candidate.device.type != "cuda":
        raise NotApplicable("compute-sanitizer is for CUDA: use --device cuda")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotApplicable("compute-sanitizer is not installed")
    if not candidate.spec:
        raise NotApplicable("it has no name to import it by")
    program = PROGRAM.format(
        path=sys.path,
        contract="deformable" if candidate.contract is DEFORMABLE else "dense",
        spec=candidate.spec,
        dtype=candidate.dtype,
        device=str(candidate.device),
        seed=candidate.seed,
        forward_only=candidate.forward_only,
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotApplicable(f"compute-sanitizer did not end within {SANITIZER_SECONDS} s") from None
    lines = [line.strip("= ") for line in ended.stdout.splitlines() if line.startswith("=========")]
    if ended.returncode == FOUND:
        first = next((line for line in lines if "Invalid" in line or "error" in line.lower()), "an error")
        return Outcome([Finding("sanitizer", f"compute-sanitizer found: {first}", " | ".join(lines[:12]))])
    if ended.returncode:
        text = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotApplicable(f"compute-sanitizer ended with exit code {ended.returncode}: {text}")
    return Outcome()
