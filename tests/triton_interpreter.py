"""Triton's interpreter, which runs kernels on a CPU: whether it works with the installed NumPy, and its time."""

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


def patch_language_once_a_launch() -> None:
    """Halve the interpreter's time: it replaces the functions of `triton.language` again in every call in a kernel.

    Once a launch is enough, for each module that the called functions are from. Triton has no setting for this; an
    interpreter made of other parts is left as it is, and takes longer.
    """
    from triton.runtime import interpreter

    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return
    restore = scope.restore
    patched: set[int] = set()

    def patch_lang(function):
        if id(function.__globals__) in patched:
            return scope()
        patched.add(id(function.__globals__))
        return patch(function)

    def restored(self):
        patched.clear()
        restore(self)

    interpreter._patch_lang, scope.restore = patch_lang, restored
