"""The text of ``sad distill --help``: every key with its type, its default and its docstring.

The docstrings are read from the source of the schema, where each stands under its field.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

from sad.config import DistillConfig
from sad.fields import field_types, without_none

WIDTH = 96
TYPE_WORDS = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}


def keys_help() -> str:
    """One entry per key, under the headings that the schema's source gives them."""
    headings = field_headings(DistillConfig)
    blocks: list[str] = []
    for item in fields(DistillConfig):
        if item.name in headings:
            blocks.append(f"{headings[item.name]}:")
        section = field_types(DistillConfig)[item.name]
        if is_dataclass(section) and isinstance(section, type):
            blocks += [_entry(section, inner, f"{item.name}.") for inner in fields(section)]
        else:
            blocks.append(_entry(DistillConfig, item, ""))
    return "\n".join(blocks)


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the docstring under it, on one line."""
    docs: dict[str, str] = {}
    for statement, following in pairwise(_class_node(cls).body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs


def field_headings(cls: type) -> dict[str, str]:
    """First field of each group -> the comment line above it, which is the group's heading."""
    source = inspect.getsource(cls)
    return {name: title for title, name in re.findall(r"^    # (.+)\n    (\w+):", source, re.M)}


def _class_node(cls: type) -> ast.ClassDef:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node


def _entry(cls: type, item: Field[Any], prefix: str) -> str:
    words = f"  --{prefix}{item.name} {_type_word(field_types(cls)[item.name])}"
    if item.default not in (MISSING, None, ()):
        words += f"  [{str(item.default).lower() if item.type == 'bool' else item.default}]"
    elif item.default is MISSING:
        words += "  [required]"
    indent = " " * 6
    doc = field_docs(cls)[item.name]
    return f"{words}\n{textwrap.fill(doc, WIDTH, initial_indent=indent, subsequent_indent=indent)}"


def _type_word(hint: Any) -> str:
    inner = without_none(hint)
    if get_origin(inner) is Literal:
        return "|".join(get_args(inner))
    if get_origin(inner) is tuple:
        return f"{_type_word(get_args(inner)[0])} ..."
    return TYPE_WORDS[inner]
