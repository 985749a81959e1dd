"""Calls that must not appear: those that run code from data, and those that wait for the device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICKLES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})
CALLS = {
    "torch.save": "writes a pickle",
    "yaml.load": "builds arbitrary objects",
    "yaml.full_load": "builds arbitrary objects",
    "yaml.unsafe_load": "builds arbitrary objects",
    "eval": "runs a text",
    "exec": "runs a text",
    "builtins.eval": "runs a text",
    "builtins.exec": "runs a text",
}


def violations(source: str, *, kernels: bool = False) -> list[str]:
    """What is wrong with a file, one line each."""
    return [
        f"line {node.lineno}: {complaint}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt | ast.expr)
        for complaint in _complaints(node, kernels)
    ]


def _complaints(node: ast.AST, kernels: bool) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            modules = [alias.name.partition(".")[0] for alias in names]
        case ast.ImportFrom(module=str(module)):
            modules = [module.partition(".")[0]]
        case _:
            modules = []
    yield from (f"imports {module}" for module in modules if module in PICKLES)
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called in CALLS:
        yield f"calls {called}, which {CALLS[called]}"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        yield f"calls {called} with allow_pickle"
    if given.get("trust_remote_code") == "True":
        yield "trusts remote code without being asked to"
    if kernels and called.endswith(".item"):
        yield "calls .item(), which waits for the device"


@pytest.mark.parametrize("folder", ["sad", "kernels", "bench"])
def test_nothing_forbidden_is_called(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)} {violation}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for violation in violations(path.read_text(), kernels=folder == "kernels")
    ]
    assert not found, "\n".join(found)


PLANTED = [
    "import pickle",
    "def f():\n    from pickle import loads",
    "import dill as d",
    "torch.save(state, path)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=flag)",
    "np.load(path, allow_pickle=True)",
    "eval('1 + 1')",
    "exec(text)",
    "builtins.eval(text)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "yaml.unsafe_load(text)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
]


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_call_is_flagged(source: str) -> None:
    assert violations(source)


def test_a_planted_sync_is_flagged_in_the_kernels_only() -> None:
    assert violations("x = loss.sum().item()", kernels=True)
    assert not violations("x = loss.sum().item()")


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "yaml.safe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=config.trust_remote_code_student)",
        "for key, value in state.items(): pass",
    ],
)
def test_the_innocent_go_free(source: str) -> None:
    assert not violations(source, kernels=True)
