"""What readers of text share: the document, and what a record holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sad.config.sections import DataConfig
from sad.errors import UnfitError, shortened

Record = Mapping[str, Any]
"""Field -> value: a line of JSON, a row of a table."""

Message = dict[str, Any]
"""``role``, ``content``, and whatever else a chat template reads."""

RECORD_FIELDS = (("messages",), ("prompt", "completion"), ("text",))
"""The fields that a record is read from, where ``data.text_field`` names none: the first that it
has."""

TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
"""Fields beside messages that are handed to the chat template."""

TEACHER_PROMPT = "teacher_prompt"
"""The field of what the teacher reads in the prompt's place."""


class Conversation(NamedTuple):
    """The messages of a chat, or a prompt and its completion: two texts, or messages both."""

    messages: list[Message] | None = None
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    teacher_prompt: str | list[Message] | None = None
    """What the teacher reads in the prompt's place, where the student writes the answer."""

    def to_json(self) -> str:
        """Equal only for what a chat template cannot tell apart: the order of keys counts.

        Raises ``UnfitError`` for values of hundreds of levels.
        """
        # Without a prompt for the teacher as before there was one: rows keep their fingerprint.
        fields = self[:-1] if self.teacher_prompt is None else self
        try:
            return json.dumps(fields, default=str)
        except RecursionError as error:
            raise UnfitError(
                "conversations must hold few levels of nesting, got hundreds; look for a list in a "
                "list in a list"
            ) from error


TEXT = frozenset({"text"})
COMPLETION = frozenset({"completion"})
MESSAGES = frozenset({"messages"})


class Document(NamedTuple):
    """One text or conversation with its name; the model attends within one, never across two."""

    name: str
    text: str
    conversation: Conversation | None = None  # in place of a text, which is empty then

    @property
    def kind(self) -> frozenset[str]:
        """``TEXT``, or one or both of ``COMPLETION`` and ``MESSAGES``."""
        if self.conversation is None:
            return TEXT
        prompt = self.conversation.prompt
        if prompt is None:
            return MESSAGES
        return COMPLETION if isinstance(prompt, str) else COMPLETION | MESSAGES

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing but white space."""
        if self.conversation is None:
            return not self.text or self.text.isspace()
        _, prompt, completion, *_ = self.conversation
        if isinstance(prompt, str) and isinstance(completion, str):
            return not (prompt + completion).strip()
        return not (self.conversation.messages or prompt or completion)


def document_of(record: Record, config: DataConfig, name: str, where: str) -> Document:
    """The document that a record holds; raise ``UnfitError`` for a record that holds none.

    A field that is null counts as absent.
    """
    if config.text_field is not None:
        require_field(config.text_field, record, where)
        return Document(name, require_text(record[config.text_field], config.text_field, where))
    match next((fields for fields in RECORD_FIELDS if _has(record, fields)), None):
        case ("messages",):
            messages = _messages(record["messages"], "messages", where)
            more = _template_fields(record, where) | _teacher_prompt(record, list, where)
            return Document(name, "", Conversation(messages, **more))
        case ("prompt", "completion"):
            return Document(name, "", _prompt_and_completion(record, where))
        case ("text",):
            return Document(name, require_text(record["text"], "text", where))
        case _:
            if "text" in record:
                require_text(record["text"], "text", where)  # null
            raise no_known_field(record, where)


def holds_document(fields: Iterable[str], config: DataConfig) -> bool:
    """Whether records with these fields can hold documents."""
    names = set(fields)
    known = RECORD_FIELDS if config.text_field is None else ((config.text_field,),)
    return any(names.issuperset(needed) for needed in known)


def columns_to_read(columns: Sequence[str], config: DataConfig, where: str) -> list[str]:
    """The columns of a table that documents are made from; ``UnfitError`` where there are none."""
    if not holds_document(columns, config):
        if config.text_field is not None:
            require_field(config.text_field, columns, where)
        raise no_known_field(columns, where)
    if config.text_field is not None:
        return [config.text_field]
    known = (*RECORD_FIELDS, TEMPLATE_FIELDS, (TEACHER_PROMPT,))
    wanted = {field for fields in known for field in fields}
    return [column for column in columns if column in wanted]


def require_field(field: str, fields: Iterable[str], where: str) -> None:
    """Raise ``UnfitError`` that lists ``fields`` unless ``field`` is among them."""
    names = list(fields)
    if field not in names:
        raise UnfitError(
            f"{where} must have the field '{field}', got {_listed(names)}; set data.text_field to "
            "the field that holds the text"
        )


def no_known_field(fields: Iterable[str], where: str) -> UnfitError:
    """The error for a record without any of ``RECORD_FIELDS``."""
    names = list(fields)
    remedy = "set data.text_field to the field that holds the text"
    if "conversations" in names:  # ShareGPT
        remedy = "rename 'conversations', each with 'role' and 'content', to 'messages'"
    elif "prompt" in names or "completion" in names:
        remedy = "give each prompt its completion"
    return UnfitError(
        f"{where} must have the field 'messages', or 'prompt' and 'completion', or 'text', got "
        f"{_listed(names)}; {remedy}"
    )


def require_text(value: Any, field: str, where: str) -> str:
    """``value``, the content of a record's ``field``; raise ``UnfitError`` unless it is a text."""
    if not isinstance(value, str):
        raise UnfitError(
            f"{where} must hold text in field '{field}', got {type_name(value)}; remove the "
            "record, or set data.text_field to the field that holds the text"
        )
    return value


def record_of_row(row: Record) -> Record:
    """A row of a table as a record, without the nulls inside of its fields.

    A table gives every record the fields of all others: a message the ``tool_calls`` of another.
    """
    return {field: _without_nulls(value) for field, value in row.items()}


def type_name(value: object) -> str:
    """The type of a record's value as an error message names it: ``null``, ``int``, ``list``."""
    return "null" if value is None else type(value).__name__


# What a record holds


def _has(record: Record, fields: tuple[str, ...]) -> bool:
    return all(record.get(field) is not None for field in fields)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(f"'{shortened(name, 80)}'" for name in names[:10]) + more or "no field"


def _prompt_and_completion(record: Record, where: str) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        more = _teacher_prompt(record, str, where)
        return Conversation(prompt=prompt, completion=completion, **more)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UnfitError(
            f"{where} must hold texts or messages in both 'prompt' and 'completion', got "
            f"{type_name(prompt)} and {type_name(completion)}; write both in the same form"
        )
    return Conversation(
        prompt=_messages(prompt, "prompt", where),
        completion=_messages(completion, "completion", where),
        **_template_fields(record, where) | _teacher_prompt(record, list, where),
    )


def _teacher_prompt(record: Record, form: type, where: str) -> dict[str, Any]:
    """What the teacher reads in the prompt's place: a text beside a text, else messages."""
    value = record.get(TEACHER_PROMPT)
    if value is None:
        return {}
    if form is str:
        return {TEACHER_PROMPT: require_text(value, TEACHER_PROMPT, where)}
    return {TEACHER_PROMPT: _messages(value, TEACHER_PROMPT, where)}


def _messages(value: Any, field: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        got = type_name(value)
        if isinstance(value, list):
            got = f"list of {type_name(next(v for v in value if not isinstance(v, dict)))}"
        raise UnfitError(
            f"{where} must hold messages in field '{field}', got {got}; write a list of objects "
            "with 'role' and 'content', or set data.text_field to the field that holds the text"
        )
    for number, message in enumerate(value):
        if not isinstance(message.get("role"), str):
            got = _listed(list(message))
            if "role" in message:
                got = f"a 'role' that is {type_name(message['role'])}"
            raise UnfitError(
                f"{where} must have a 'role' in each message, got {got} in message {number} of "
                f"'{field}'; write 'role' and 'content'"
            )
    return value


def _template_fields(record: Record, where: str) -> dict[str, Any]:
    tools = _parsed(record.get("tools"), list, "tools", where)
    kwargs = _parsed(record.get("chat_template_kwargs"), dict, "chat_template_kwargs", where)
    return {"tools": tools or None, "template_kwargs": kwargs or None}


def _parsed(value: Any, kind: type, field: str, where: str) -> Any:
    """A list or an object, which tables often hold as JSON text."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
    if parsed is not None and not isinstance(parsed, kind):
        form = {list: "a list", dict: "an object"}[kind]
        raise UnfitError(
            f"{where} must hold {form} in field '{field}', got {type_name(parsed)}; write it as "
            "JSON has it"
        )
    return parsed
