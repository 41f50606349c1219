"""The checks that can be asked for, by name. Importing this module does not import torch."""

CHECKS = {
    "compile": "torch.compile without a graph break, for static and dynamic shapes: right numbers, few recompilations",
    "opcheck": "torch.library.opcheck of the custom operators that it calls",
    "export": "torch.export with static and dynamic shapes: right numbers",
    "autocast": "right numbers, in the precision of autocast, under torch.autocast",
    "threads": "calls from two threads at once give the bits of single calls",
    "streams": "calls on two CUDA streams at once give the bits of single calls",
    "graph": "captured in a CUDA graph and replayed with new inputs: right numbers",
    "sanitizer": "compute-sanitizer finds no access out of bounds",
    "batch-invariance": "whether an item has the same bits alone and in a batch: a note, never a failure",
    "vmap": "torch.func.vmap over a leading dimension: right numbers",
}
"""What each is about."""

CLAIMED = ("vmap",)
"""Those that no attention has to pass that does not claim it: `all` leaves them out."""
