"""Instructions made of Python source: the head of a function asks, its body answers."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator

from sad.data.formats.base import Conversation, Document


def functions_of(document: Document) -> Iterator[Document]:
    """The documented functions of a source file: head and docstring as prompt, body as completion.

    All have the file's name, so that whole files are held out, the same as of the files themselves.
    """
    for prompt, completion in _functions(document.text):
        yield Document(document.name, "", Conversation(prompt=prompt, completion=completion))


def _functions(source: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of old escapes in strings
            tree = ast.parse(source)
    except SyntaxError:
        return  # a few files are wrong on purpose
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring, *body = node.body
        if not body or ast.get_docstring(node) is None or docstring.end_lineno == body[0].lineno:
            continue
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        head = text.splitlines()[: (docstring.end_lineno or 0) - node.lineno + 1]
        # The line end belongs to the answer: tokenizers join it with the indentation after it.
        prompt = "\n".join(head).rstrip()
        yield prompt, text[len(prompt) :]
