"""Triton's interpreter several times as fast, as the tests need it, in this process alone.

It saves look-ups in Python and leaves every bit as it is (``test_interpreter.py``). Its truncation
to bf16 is the kernels' own concern: see ``to_dtype`` in ``_triton/tile.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

ORIGINAL: dict[str, Any] = {}
"""Name in ``triton.runtime.interpreter`` -> what ``patch_language_once_per_launch`` replaced."""


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
