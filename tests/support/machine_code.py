"""Resources and memory accesses of compiled Triton kernels, parsed from the compiler's output.

``resources``       registers, spills and shared memory, as the assemblers report them
``access_widths``   bytes of the widest load and store through each pointer argument
``double_arithmetic``, ``row_products``    slow fp64 and overflowing products in Triton's IR

All of them read text: PTX, LLVM IR, GCN assembly and Triton IR name the result of an instruction
before its operands, so following a value means collecting names until nothing is added.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from triton import knobs

Names = frozenset[str]

REGISTER = re.compile(r"%[\w.]+")


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, spills (bytes or registers), and bytes of shared memory."""
    if "amdgcn" in kernel.asm:
        return _amd_resources(kernel.asm["amdgcn"]) | {"shared_bytes": kernel.metadata.shared}
    return _nvidia_resources(kernel.asm["cubin"]) | {"shared_bytes": kernel.metadata.shared}


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    """Registers and spills by cuobjdump; its STACK equals the spills that ptxas reports."""
    tool = knobs.nvidia.cuobjdump.path  # comes with Triton
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {"registers": _only(r"\bREG:(\d+)", said), "spills": _only(r"\bSTACK:(\d+)", said)}


def _amd_resources(assembly: str) -> dict[str, int]:
    spills = (".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size")
    return {
        "registers": _only(r"^ *\.vgpr_count: *(\d+)", assembly),
        "spills": sum(_only(rf"^ *{re.escape(name)}: *(\d+)", assembly) for name in spills),
    }


def _only(pattern: str, text: str) -> int:
    (number,) = re.findall(pattern, text, re.MULTILINE)
    return int(number)


# Access widths

PTX_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\s.*?\[\s*(%\w+)")
PTX_PARAMETER = re.compile(r"\bld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")

LLVM_LOAD = re.compile(
    r" = (?:tail )?(?:call|load) (<\d+ x \w+>|\w+)(?:, | @llvm[\w.]*load[\w.]*\()"
    r"ptr addrspace\([18]\) (?:align \d+ )?(%[\w.]+)"
)
LLVM_STORE = re.compile(
    r"(?:\bstore |@llvm[\w.]*store[\w.]*\()(<\d+ x \w+>|\w+) .*?"
    r"ptr addrspace\([18]\) (?:align \d+ )?(%[\w.]+)"
)
LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


def access_widths(kernel: Any, arguments: dict[str, str]) -> dict[str, dict[str, int]]:
    """The widest access of one thread as ``{"load_bytes": {pointer: bytes}, "store_bytes": ...}``.

    ``arguments`` are names and types of the run-time arguments in order. Pointers that were
    themselves loaded through argument ``table`` are called ``*table 1``, ``*table 2`` and so on.
    """
    if "ptx" in kernel.asm:
        accesses = _ptx_accesses(kernel.asm["ptx"], arguments)
    else:
        accesses = _llvm_accesses(kernel.asm["llir"], arguments)
    widths: dict[str, dict[str, int]] = {"load_bytes": {}, "store_bytes": {}}
    for kind, pointer, size in accesses:
        of_kind = widths[kind]
        of_kind[pointer] = max(size, of_kind.get(pointer, 0))
    return {kind: dict(sorted(found.items())) for kind, found in widths.items()}


def _ptx_accesses(ptx: str, arguments: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    lines = [re.sub(r"@!?%p\d+|//.*", "", line) for line in ptx.splitlines()]
    pointers = _pointers(arguments)
    parameters = {register: int(i) for register, i in PTX_PARAMETER.findall(ptx)}
    sources = {r: frozenset({pointers[i]}) for r, i in parameters.items() if i in pointers}
    computed = [line for line in lines if "st.global" not in line]
    _follow(computed, sources, is_load=lambda line: "ld.global" in line)
    for line in lines:
        for kind, vector, bits, address in PTX_ACCESS.findall(line):
            size = int(vector or 1) * int(bits) // 8
            yield f"{'load' if kind == 'ld' else 'store'}_bytes", _base(sources, address), size


def _llvm_accesses(llir: str, arguments: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    lines = [line.split(", !")[0] for line in llir.splitlines()]
    sources = {f"%{i}": frozenset({name}) for i, name in _pointers(arguments).items()}
    computed = [line for line in lines if " = " in line]
    _follow(computed, sources, is_load=lambda line: LLVM_LOAD.search(line) is not None)
    for line in lines:
        for kind, pattern in (("load_bytes", LLVM_LOAD), ("store_bytes", LLVM_STORE)):
            for kind_of_value, address in pattern.findall(line):
                yield kind, _base(sources, address), _llvm_bytes(kind_of_value)


def _pointers(arguments: dict[str, str]) -> dict[int, str]:
    return {i: name for i, (name, kind) in enumerate(arguments.items()) if kind.startswith("*")}


def _llvm_bytes(kind: str) -> int:
    """Bytes of a type, at most 16: a wider vector takes several instructions."""
    vector = re.match(r"<(\d+) x (\w+)>", kind)
    number, scalar = (int(vector[1]), vector[2]) if vector else (1, kind)
    bits = LLVM_BITS.get(scalar) or int(scalar.removeprefix("i"))
    return min(16, number * bits // 8)


def _base(sources: dict[str, Names], address: str) -> str:
    """The pointer argument that an address is computed from, not loaded offsets."""
    names = sorted(sources.get(address, ()), key=lambda name: (name.startswith("*"), name))
    return names[0] if names else "unknown"


def _follow(lines: Iterable[str], sources: dict[str, Names], is_load: Any) -> None:
    """Propagate ``sources`` from registers to everything computed from them."""
    steps = []
    for line in lines:
        registers = REGISTER.findall(line)
        if len(registers) > 1:
            results = registers[: _results(line)]
            steps.append((results, registers[len(results) :], is_load(line)))
    loads: dict[str, list[int]] = {}  # through each pointer: the steps
    changed = True
    while changed:
        changed = False
        for i, (results, operands, loaded) in enumerate(steps):
            found = frozenset().union(*(sources.get(name, frozenset()) for name in operands))
            if loaded:
                found = frozenset(_loaded(name, i, loads) for name in found if name[0] != "*")
            for result in results:
                if not found <= sources.get(result, frozenset()):
                    sources[result] = sources.get(result, frozenset()) | found
                    changed = True


def _loaded(pointer: str, step: int, loads: dict[str, list[int]]) -> str:
    through = loads.setdefault(pointer, [])
    if step not in through:
        through.append(step)
    return f"*{pointer} {through.index(step) + 1}"


def _results(line: str) -> int:
    """The number of a line's result registers: those in the first braces, else one."""
    vector = re.match(r"[^%]*\{([^}]*)\}", line)
    return len(REGISTER.findall(vector[1])) if vector else 1


# Faults in Triton's own IR

ASSIGNED = re.compile(r"^\s*(%[\w#:]+(?:, %[\w#:]+)*) = ")
BINDING = re.compile(r"(%\w+) = (%\w+)")  # loop variables and what they start from
FREE_OF_VALUES = ("tt.func", "#loc", "module", "llvm.func")


def double_arithmetic(ttir: str) -> list[str]:
    """The fp64 operations of an IR, except for rounding a scalar argument to fp32."""
    scalar_rounding = re.compile(r"arith\.truncf %\w+ : f64 to f32\b")
    return [
        line.split(" loc(")[0].strip()
        for line in ttir.splitlines()
        if re.search(r"\bf64\b|xf64\b", line)
        and not line.strip().startswith(FREE_OF_VALUES)
        and not scalar_rounding.search(line)
    ]


def row_products(ttir: str) -> tuple[list[str], list[str]]:
    """Products of the row index (program axis 0) in fewer than 64 bits, and those in 64 bits."""
    wide = re.compile(r": (tensor<[\dx]+x)?i64\b")
    products = _row_products(ttir)
    return [p for p in products if not wide.search(p)], [p for p in products if wide.search(p)]


def _row_products(ttir: str) -> list[str]:
    lines = [line.split(" loc(")[0].strip() for line in ttir.splitlines()]
    rows: set[str] = set()
    before = -1
    while before != len(rows):
        before = len(rows)
        for line in lines:
            assigned = ASSIGNED.match(line)
            if assigned is None or re.search(r"tt\.load|arith\.cmp|tt\.func", line):
                continue
            rows |= {new for new, old in BINDING.findall(line) if old in rows}
            operands = REGISTER.findall(line[assigned.end() :])
            if "tt.get_program_id x" in line or (
                rows.intersection(operands) and not re.search(r"\bscf\.|tt\.ptr", line)
            ):
                rows.update(REGISTER.findall(assigned[1]))
    return [
        line
        for line in dict.fromkeys(lines)
        if "arith.muli" in line and rows.intersection(REGISTER.findall(line.split("=", 1)[1]))
    ]
