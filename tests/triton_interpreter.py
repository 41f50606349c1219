"""Whether Triton's interpreter, which runs kernels on a CPU, works with the installed NumPy."""

from __future__ import annotations

import importlib.util
import inspect

import numpy as np


def problem() -> str | None:
    """Why kernels cannot be interpreted, for a test's reason to be skipped; None where they can.

    Loops of an unknown length make an `int` of an array of one number, which NumPy refuses from 2.4 on. (Compiled
    kernels have nothing to do with NumPy.)
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton
    from triton.runtime import interpreter

    try:
        int(np.ones(1))
    except TypeError:
        if "int(self.handle.data)" in inspect.getsource(interpreter):
            return f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}"
    return None
