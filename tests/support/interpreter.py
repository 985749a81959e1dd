"""Triton's interpreter as the tests need it: rounding like a GPU, and several times as fast.

Both change the interpreter of this process alone. The kernels' arithmetic stays NumPy's: the second
one saves look-ups in Python and leaves every bit as it is (``test_interpreter.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

ORIGINAL: dict[str, Any] = {}
"""Name in ``triton.runtime.interpreter`` -> what ``patch_language_once_per_launch`` replaced."""


def round_bfloat16_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """Convert fp32 to bf16 as every GPU does. The interpreter truncates, which would hide a kernel
    that really does."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)
        y = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
        return y.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(x))

    patch.setattr(interpreter, "_convert_float", rounded)


def patch_language_once_per_launch(patch: pytest.MonkeyPatch) -> None:
    """Save the interpreter its repeated search through ``triton.language``.

    To interpret a kernel, Triton replaces the builtins of ``triton.language`` until the launch
    ends. It does so anew, and finds them by sorting all members of its modules, whenever a kernel
    calls a device function: two thirds of the time of a small kernel. Here the names are found
    once per process, and a module is patched once per launch. Versions of Triton that patch in
    another way are left alone.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    own_scope: Any = getattr(interpreter, "_LangPatchScope", None)
    if own_scope is None:  # triton 3.6
        return
    patched: set[str] = set()  # modules, in the launch that runs
    builtins: dict[object, list[str]] = {}
    modules: dict[object, set[str]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}

    class Scope(own_scope):
        def restore(self) -> None:
            super().restore()
            patched.clear()

    def patch_builtin(package: object, builder: object, scope: Any) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [name for name, x in members if tl.core.is_builtin(x)]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not patched already
                interpreter._patch_attr(package, name, member, builder, scope)

    patch_language = interpreter._patch_lang

    def patch_missing(function: Any) -> Any:
        if function not in modules:
            seen = function.__globals__.values()
            modules[function] = {x.__name__ for x in seen if x is tl or x is tl.core}
        if modules[function] and modules[function] <= patched:
            return own_scope()  # nothing to restore
        scope = patch_language(function)
        patched.update(modules[function])
        return scope

    numpy_dtype = interpreter._get_np_dtype

    def cached_numpy_dtype(dtype: Any) -> np.dtype[Any]:
        element: Any = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return numpy_dtype(element)
        if element.name not in dtypes:
            dtypes[element.name] = numpy_dtype(element)
        return dtypes[element.name]

    replaced: dict[str, Callable[..., Any]] = {
        "_LangPatchScope": Scope,
        "_patch_builtin": patch_builtin,
        "_patch_lang": patch_missing,
        "_get_np_dtype": cached_numpy_dtype,
    }
    for name, value in replaced.items():
        ORIGINAL[name] = getattr(interpreter, name)
        patch.setattr(interpreter, name, value)
