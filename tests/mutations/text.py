"""Faults in how documents become tokens, targets and rows."""

from __future__ import annotations

from mutations.planting import Mutation, edit, tests

CHAT = "sad/data/chat.py"
PACKING = "sad/data/packing.py"
ROWS = "sad/data/rows.py"
STREAM = "sad/data/stream.py"


def chat(*names: str) -> tuple[str, ...]:
    return tests("sad/data/test_chat.py", *names)


def rows(*names: str) -> tuple[str, ...]:
    return tests("sad/data/test_rows.py", *(f"TestTokenising::{name}" for name in names))


SCORED = tests(
    "sad/training/test_chat_run.py",
    "test_only_what_is_said_is_scored_and_all_before_it_is_read",
)

MUTATIONS = [
    Mutation(
        "70",
        "texts begin without a BOS",
        edit(
            STREAM,
            "special_affixes(tokenizer) if config.add_special_tokens else ([], [])",
            "([], [])",
        ),
        rows("test_a_text_begins_as_the_tokenizer_begins_it"),
    ),
    Mutation(
        "70",
        "what a tokenizer puts before a text is learned, but for the first token",
        edit(STREAM, "if len(prefix) > 1:", "if False:"),
        rows("test_no_token_before_the_text_is_a_target"),
    ),
    Mutation(
        "70",
        "an end that the tokenizer adds is added again",
        edit(STREAM, "if suffix[-1:] != [end]:", "if True:"),
        rows("test_an_end_that_the_tokenizer_adds_is_not_added_twice[<|endoftext|>-1]"),
    ),
    Mutation(
        "71",
        "prompts are learned",
        edit(PACKING, "    learned[:num_prompt] = False\n", ""),
        chat(
            "TestTenShapes::test_targets_are_those_counted_by_hand[True-prompt strings]",
            "TestContext::test_prompts_are_read_but_carry_no_loss",
        )
        + SCORED,
    ),
    Mutation(
        "71",
        "all that a template writes is learned, whoever says it",
        edit(PACKING, "        learned[:] = False\n", ""),
        chat(
            "TestTenShapes::test_targets_are_those_counted_by_hand[True-multi-turn]",
            "TestTenShapes::test_what_the_assistant_says_is_what_transformers_says_it_is",
        ),
    ),
    Mutation(
        "71",
        "batches have labels where nothing is learned",
        edit(ROWS, " & self._learned(at + 1)", ""),
        chat("TestContext::test_prompts_are_read_but_carry_no_loss") + SCORED,
    ),
    Mutation(
        "71",
        "a prompt that does not begin its conversation goes unnoticed",
        edit(PACKING, "    if same < len(prompt):\n", "    if False:\n"),
        chat("TestRefused::test_in_one_line[another prompt]"),
    ),
    Mutation(
        "72",
        "a conversation is cut at the end of a row",
        edit(
            STREAM,
            "if self._row_is_full or used + whole - 1 > self._max_length:",
            "if self._row_is_full:",
        ),
        chat(
            "TestRows::test_a_conversation_that_does_not_fit_opens_the_next_row",
            "TestRows::test_rows_are_as_defined",
        ),
    ),
    Mutation(
        "72",
        "conversations are left out in silence",
        edit(
            STREAM,
            "        for count, first in self._first_counted.items():\n",
            "        for count, first in ():\n",
        ),
        chat("TestLeftOut::test_nothing_is_left_out_in_silence"),
    ),
    Mutation(
        "73",
        "a student does not stop where it was trained to end",
        edit("sad/models/stop_tokens.py", "    if not missing:\n", "    if True:\n"),
        SCORED,
    ),
    Mutation(
        "74",
        "rows of another chat template are taken from the cache",
        edit(PACKING, "            tokenizer.chat_template,\n", ""),
        chat("TestFingerprint::test_whatever_decides_what_is_learned_is_in_it"),
    ),
    Mutation(
        "74",
        "rows depend on the day on which they are made",
        edit(CHAT, 'if "strftime_now" in template:', "if False:"),
        chat("TestContext::test_a_template_that_asks_for_the_date_gives_the_same_rows_every_day"),
    ),
]
