"""Conversations as text: chat templates, and which characters of a conversation are learned.

What is learned of a record is decided by three keys: ``data.completion_only_loss`` and
``data.assistant_only_loss``, as in TRL, and ``data.chat_template`` (or ``chat_template_path``),
which marks what the assistant says with ``{% generation %}``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sad.config.sections import DataConfig
from sad.data.formats.base import Conversation, Document, Message
from sad.data.tokenizers import load_tokenizer
from sad.errors import UnfitError, UsageError, one_line

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_ASKS_FOR_NULL = re.compile(r"\bcontent\b['\"\]]*\s+(is|is\s+not|==|!=)\s+[Nn]one\b")

_FIXED_DATE = {
    "%d": "01", "%-d": "1", "%e": " 1", "%m": "01", "%b": "Jan", "%B": "January", "%y": "25",
    "%Y": "2025", "%a": "Wed", "%A": "Wednesday", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
"""What a template is told when it asks for the date: the same text must give the same rows on
another day."""

_STRFTIME_NOW = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _FIXED_DATE.items())
    + " }}{%- endmacro %}{{ '' }}"
)
"""Takes the place of the function of this name that transformers offers to templates."""


class RenderedConversation(NamedTuple):
    """The text of a conversation, and what of it is learned."""

    text: str
    prompt: str  # its tokens begin those of the text, and are context alone; "" for none
    spans: list[tuple[int, int]] | None  # characters that are learned; None: all after the prompt
    from_template: bool  # which has brought special tokens; else it is treated as a text is
    empty_turns: int  # turns of the assistant without anything said


def render(
    document: Document, tokenizer: PreTrainedTokenizerFast, config: DataConfig
) -> RenderedConversation:
    """The text of a document that is a conversation.

    Raises ``UnfitError`` naming the document if the chat template is missing, does not mark what
    ``assistant_only_loss`` needs, or refuses the messages.
    """
    conversation = document.conversation
    assert conversation is not None, document.name
    _, prompt, completion, *_ = conversation
    only_completion = config.completion_only_loss is not False
    if isinstance(prompt, str) and isinstance(completion, str):
        prefix = prompt if only_completion else ""
        empty = 0 if completion.strip() else 1
        return RenderedConversation(prompt + completion, prefix, None, False, empty)

    messages = messages_of(conversation)
    template = _template_for(conversation, tokenizer, document.name)
    if config.assistant_only_loss and not _GENERATION.search(template):
        raise UnfitError(
            "chat template must mark what the assistant says with {% generation %} for "
            "data.assistant_only_loss, got one without; name one that does in "
            "data.chat_template_path"
        )

    def apply(messages: list[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        return _apply(template, messages, conversation, tokenizer, document.name, **options)

    text, spans = apply(messages, return_assistant_tokens_mask=config.assistant_only_loss)
    context = ""
    if isinstance(prompt, list) and prompt and only_completion:
        context, _ = apply(prompt, add_generation_prompt=True)
    learned = spans if config.assistant_only_loss else None
    said = completion if isinstance(completion, list) else messages
    return RenderedConversation(text, context, learned, True, sum(map(_says_nothing, said)))


class RenderedPrompts(NamedTuple):
    """What the student answers, and what the teacher reads in its place."""

    prompt: str  # "" for a conversation that begins with the assistant
    teacher_prompt: str | None
    from_template: bool  # as in RenderedConversation


def render_prompts(document: Document, tokenizer: PreTrainedTokenizerFast) -> RenderedPrompts:
    """The prompt of a document that is a conversation: what comes before its last answer.

    Raises ``UnfitError`` as ``render`` does.
    """
    conversation = document.conversation
    assert conversation is not None, document.name
    theirs = conversation.teacher_prompt
    if isinstance(conversation.prompt, str):
        assert theirs is None or isinstance(theirs, str), document.name
        return RenderedPrompts(conversation.prompt, theirs, False)
    template = _template_for(conversation, tokenizer, document.name)

    def asked(messages: list[Message]) -> str:
        if not messages:
            return ""
        options = {"add_generation_prompt": True}
        return _apply(template, messages, conversation, tokenizer, document.name, **options)[0]

    before = conversation.prompt
    if before is None:
        before = _before_last_answer(conversation.messages or [])
    other = asked(theirs) if isinstance(theirs, list) else None
    return RenderedPrompts(asked(before), other, True)


def _before_last_answer(messages: list[Message]) -> list[Message]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def messages_of(conversation: Conversation) -> list[Message]:
    """All messages of a conversation, those of prompt and completion joined."""
    _, prompt, completion, *_ = conversation
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    return conversation.messages or []


def set_chat_template(tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> None:
    """Give ``tokenizer`` the chat template of the configuration, if that names one.

    It is exported with the student, which is then spoken to as it was trained. Raises
    ``UsageError`` for a path where nothing is, ``UnfitError`` for a tokenizer without a template.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if config.chat_template_path is None:
        return
    path = Path(config.chat_template_path).expanduser()
    for file in (path, path / "chat_template.jinja"):
        if file.is_file():
            tokenizer.chat_template = _read_template(file)
            return
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        raise UsageError(
            f"data.chat_template_path must name a file that exists, got {path}; check the path"
        )
    template = load_tokenizer(config.chat_template_path).chat_template
    if not template:
        raise UnfitError(
            "data.chat_template_path must name a tokenizer that has a chat template, got "
            f"'{config.chat_template_path}' without one; name another, or a Jinja file"
        )
    tokenizer.chat_template = template


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"data.chat_template_path must be readable as UTF-8 text, got '{one_line(error)}' for "
            f"{file}; check the file"
        ) from error


def _template_for(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, name: str) -> str:
    if not tokenizer.chat_template:
        raise UnfitError(
            f"tokenizer must have a chat template for records of messages such as {name}, got "
            "none; name a model that has one, such as a chat model of the same family, or a Jinja "
            "file in data.chat_template_path"
        )
    try:
        return tokenizer.get_chat_template(None, conversation.tools)
    except ValueError as error:  # several templates, none of them the default
        raise UnfitError(
            f"tokenizer must have one default chat template, got '{one_line(error)}'; name one in "
            "data.chat_template_path"
        ) from error


def _apply(
    template: str,
    messages: list[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    **options: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of messages, and where in it the assistant speaks.

    What ``apply_chat_template`` does before it tokenizes: its mask of tokens has a character's end
    wrong where a turn is empty or ends in white space, and the text itself is needed as well.
    """
    variables = {**tokenizer.special_tokens_map, **(conversation.template_kwargs or {})}
    if "strftime_now" in template:
        template = _STRFTIME_NOW + template
    given = [_given(message, template) for message in messages]
    try:
        rendered: Any = render_jinja_template(
            [given], tools=conversation.tools, chat_template=template, **(variables | options)
        )
    except TemplateSyntaxError as error:  # in whichever record it is met first
        raise UnfitError(
            f"the chat template must be written in Jinja, got '{one_line(error)}' in line "
            f"{error.lineno}; correct it, or name another in data.chat_template_path"
        ) from error
    except Exception as error:  # whatever a template does with what it did not expect
        raise UnfitError(
            f"{name} must fit the chat template, got '{one_line(error)}'; correct the record, or "
            "name another template in data.chat_template_path"
        ) from error
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


def _given(message: Message, template: str) -> Message:
    """A message without its nulls, which most templates would write as ``None``.

    Some, such as DeepSeek's, know by a content of null that a message calls tools, and write
    nothing of it where there is none: a template that asks gets the null, given or left out.
    """
    given = {key: value for key, value in message.items() if value is not None}
    return {"content": None, **given} if _ASKS_FOR_NULL.search(template) else given


def _says_nothing(message: Message) -> bool:
    said = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
    return message["role"] == "assistant" and not any(_says(message.get(key)) for key in said)


def _says(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)
