"""Faults of what a teacher with another tokenizer is compared by."""

from __future__ import annotations

from mutations.planting import Mutation, edit

ALIGNMENT = "sad/data/alignment.py"
DOCUMENTS = "sad/data/aligned_documents.py"


def aligned(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sad/data/test_alignment.py::{name}" for name in names)


MUTATIONS = [
    Mutation(
        "110",
        "rows that are cut before the token at which both meet",
        edit(
            ALIGNMENT,
            "            self._close(pairs[last - 1] + 1)\n",
            "            self._close(pairs[last - 1])\n",
        ),
        aligned("test_equal_tokenizers_give_the_rows_of_one[False-True]"),
    ),
    Mutation(
        "110",
        "a group that ends with its row taken for whole",
        edit(ALIGNMENT, "            begins[-1] &= goes_on and teacher_goes_on\n", ""),
        aligned("test_a_group_is_the_same_text_on_both_sides"),
    ),
    Mutation(
        "110",
        "what templates write after an answer compared",
        edit(
            DOCUMENTS,
            "            of_span[-1] = MEETING\n",
            "            of_span[-1] = BOUNDARY\n",
        ),
        ("tests/sad/data/test_aligned_chat.py::"
         "test_templates_are_compared_in_what_the_assistant_says",),
    ),
    Mutation(
        "111",
        "targets with a teacher that weigh as much as both terms and the divergence",
        edit(
            "sad/losses/cross_tokenizer.py",
            "            token_weights = torch.where(compared, share, 1.0)\n",
            "            token_weights = torch.ones_like(compared, dtype=torch.float32)\n",
        ),
        ("tests/sad/losses/test_cross_tokenizer_toys.py::"
         "test_two_exact_models_can_disagree",
         "tests/sad/training/test_cross_tokenizer.py::test_prefix_is_its_definition"),
    ),
    Mutation(
        "111",
        "the shorter of two outcomes blamed where labels disagree",
        edit(
            "sad/data/outcomes.py",
            "tables.sizes[x] >= tables.sizes[y]",
            "tables.sizes[x] < tables.sizes[y]",
        ),
        ("tests/sad/data/test_outcomes.py::"
         "test_an_outcome_that_disagrees_too_often_is_closed",),
    ),
]  # fmt: skip
