"""Lay ``sad_kernels`` out as a project for the Hugging Face Kernel Hub.

    python scripts/hub_kernel.py OUTDIR [--repo_id you/sad-kernels]

    OUTDIR/build.toml, flake.nix, CARD.md    what kernel-builder reads
    OUTDIR/torch-ext/sad_kernels/            the package as it builds it
    OUTDIR/build/torch-<backend>/            the same, built: kernels.get_local_kernel(OUTDIR)

A kernel of the Hub is loaded from any folder under any name, and several versions of it into one
process. So absolute imports become relative, and operators of torch move from the namespace
``sad_kernels`` to one that no other version has. Only these places are rewritten, found in the
syntax tree; the rest of each file keeps its bytes. A form that is not known here is an error.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "sad_kernels"
SOURCE = Path(__file__).resolve().parents[1] / "kernels" / PACKAGE
NAME = "sad-kernels"  # as the Hub writes it
LICENSE = "MIT"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
OPS = "_ops"
"""The module with the namespace of the operators, which kernel-builder writes for each backend."""

MODULE_NAME = re.compile(rf"{PACKAGE}(\.\w+)+")
NAMESPACE = f"{PACKAGE}::"


class UnknownFormError(Exception):
    """A use of the package's name that this program cannot rewrite."""


class Edit(NamedTuple):
    """Bytes ``start`` to ``stop`` of a file, and what takes their place."""

    start: int
    stop: int
    text: str


def rewritten(source: str, file: str) -> str:
    """The text of ``file``, a path within the package, with relative imports and other operators.

    Raises ``UnknownFormError`` naming file and line.
    """
    edits = list(_Rewriter(source, file).edits())
    data = source.encode()
    for edit in sorted(edits, reverse=True):  # from the end, so that earlier places stay
        data = data[: edit.start] + edit.text.encode() + data[edit.stop :]
    text = data.decode()
    ast.parse(text)
    return text


class _Rewriter:
    """Finds the places in one file that name the package."""

    def __init__(self, source: str, file: str) -> None:
        self.file = file
        self.tree = ast.parse(source)
        self.data = source.encode()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.dots = "." * len(Path(file).parts)  # one for the package's own files

    def edits(self) -> Iterator[Edit]:
        """Every edit; the operators' import comes behind that of ``__future__``."""
        documentation = set(_docstrings(self.tree))
        within = {part for node in ast.walk(self.tree) for part in _parts(node)}
        has_operators = False
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                self._refuse_import(node)
            elif isinstance(node, ast.ImportFrom):
                yield from self._import(node)
            elif isinstance(node, ast.Name | ast.Attribute):
                if PACKAGE in (getattr(node, "id", None), getattr(node, "attr", None)):
                    raise self._unknown(node)
            elif isinstance(node, ast.Constant | ast.JoinedStr):
                if node in documentation or node in within:
                    continue
                text = _text(node)
                if NAMESPACE in text:
                    has_operators = True
                    yield self._operator(node)
                elif text == PACKAGE or _is_module_name(text):
                    yield self._module_name(node)
        if has_operators:
            yield self._import_of_namespace()

    def _import(self, node: ast.ImportFrom) -> Iterator[Edit]:
        """``from sad_kernels.a import b`` -> ``from .a import b``, two dots in a folder."""
        if node.level:
            raise self._unknown(node)
        package, _, module = (node.module or "").partition(".")
        if package != PACKAGE:
            return
        start, old = self._start(node), f"from {node.module} import"
        if not self.data[start:].startswith(old.encode()):
            raise self._unknown(node)
        yield Edit(start, start + len(old), f"from {self.dots}{module} import")

    def _refuse_import(self, node: ast.Import) -> None:
        if any(alias.name.partition(".")[0] == PACKAGE for alias in node.names):
            raise self._unknown(node)

    def _operator(self, node: ast.Constant | ast.JoinedStr) -> Edit:
        """``"sad_kernels::name"`` -> ``add_op_namespace_prefix("name")``, f-strings alike."""
        start, stop = self._start(node), self._stop(node)
        text = self.data[start:stop].decode()
        if text.count(NAMESPACE) != 1 or not re.match(rf'f?"{NAMESPACE}', text):
            raise self._unknown(node)
        return Edit(start, stop, f"add_op_namespace_prefix({text.replace(NAMESPACE, '')})")

    def _module_name(self, node: ast.Constant | ast.JoinedStr) -> Edit:
        """``"sad_kernels.a"`` -> ``f"{__name__}.a"``, which is right in the package's own file."""
        start, stop, name = self._start(node), self._stop(node), _text(node)
        if self.file != "__init__.py" or self.data[start:stop] != f'"{name}"'.encode():
            raise self._unknown(node)
        return Edit(start, stop, f'f"{{__name__}}{name.removeprefix(PACKAGE)}"')

    def _import_of_namespace(self) -> Edit:
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                place = self._stop(node)
                line = f"\n\nfrom {self.dots}{OPS} import add_op_namespace_prefix"
                return Edit(place, place, line)
        raise self._unknown(self.tree.body[0])

    def _start(self, node: ast.stmt | ast.expr) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def _stop(self, node: ast.stmt | ast.expr) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def _unknown(self, node: ast.stmt | ast.expr) -> UnknownFormError:
        line = self.data.splitlines()[node.lineno - 1].decode().strip()
        return UnknownFormError(
            f"{self.file}, line {node.lineno}: {PACKAGE} must be named in a form that "
            f"{Path(__file__).name} can rewrite, got {line!r}; write it otherwise, or teach it"
        )


def _docstrings(tree: ast.AST) -> Iterator[ast.expr]:
    """Texts that stand alone: docstrings, and those behind a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """The constants within an f-string, which is looked at as a whole."""
    if isinstance(node, ast.JoinedStr):
        yield from (part for part in node.values if isinstance(part, ast.Constant))


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    """What a string or an f-string says for certain; nothing for other constants."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    return "".join(value for value in values if isinstance(value, str))


def _is_module_name(text: str) -> bool:
    """Whether a text is the dotted name of a module of the package, and nothing else."""
    if not MODULE_NAME.fullmatch(text):
        return False
    path = SOURCE.joinpath(*text.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


# The project


def package_files() -> dict[str, str]:
    """Path within the package -> rewritten text, of every file that Python reads."""
    return {
        path.relative_to(SOURCE).as_posix(): rewritten(
            path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix()
        )
        for path in sorted(SOURCE.rglob("*.py"))
    }


def version() -> int:
    """The major version, which is what the Hub counts; 0 is for what may still change."""
    text = (SOURCE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(\d+)\.', text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def write_project(out: Path, repo_id: str) -> None:
    """Write the project and its builds into ``out``, an empty or new folder."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"error: OUTDIR must be empty, got {out}; name a new folder")
    files = package_files()
    _write(out, _project_files(repo_id))
    _write(out / "torch-ext" / PACKAGE, files)
    for backend in BACKENDS:
        _write(out / "build" / f"torch-{backend}", built(files, backend))


def built(files: dict[str, str], backend: str) -> dict[str, str]:
    """The files of a build for ``backend``, as kernel-builder would name and describe them."""
    content = json.dumps(files, sort_keys=True).encode()
    identifier = f"_{PACKAGE}_{backend}_{hashlib.sha256(content).hexdigest()[:8]}"
    files = files | {f"{OPS}.py": _ops_module(identifier), f"{PACKAGE}/__init__.py": _OLD_PLACE}
    metadata = {
        "name": NAME,
        "id": identifier,
        "version": version(),
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: _digest(text) for name, text in sorted(files.items())},
        },
    }
    return files | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _ops_module(identifier: str) -> str:
    return f'''"""The namespace of this version's operators."""

import torch

ops = torch.ops.{identifier}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{identifier}::{{op_name}}"
'''


_OLD_PLACE = '''"""The package, where releases of ``kernels`` before 0.11 look for it."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location(f"{__name__}_build", _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({name: getattr(_module, name) for name in __all__})
'''


def _project_files(repo_id: str) -> dict[str, str]:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return {
        "build.toml": f"""[general]
name = "{NAME}"
version = {version()}
edition = 5
license = "{LICENSE}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
""",
        "flake.nix": """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
""",
        "CARD.md": f"""---
library_name: kernels
license: {LICENSE.lower()}
---

Cross-entropy and distillation losses over large vocabularies, from logits or from hidden states
without whole logits, and moving averages of whole models.

```python
from kernels import get_kernel

sad_kernels = get_kernel("{repo_id}", version={version()}, trust_remote_code=True)
help(sad_kernels.linear_distill_loss)
```
""",
    }


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def main(words: list[str]) -> int:
    """The command: write the project, or say in one line what stands in its way."""
    parser = argparse.ArgumentParser(description="Lay sad_kernels out for the Kernel Hub.")
    parser.add_argument("out", metavar="OUTDIR", type=Path, help="an empty or new folder")
    parser.add_argument("--repo_id", default=f"you/{NAME}", help="where it will be uploaded")
    options = parser.parse_args(words)
    try:
        write_project(options.out, options.repo_id)
    except UnknownFormError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}: build.toml, torch-ext, build for {', '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
