"""Faults of a teacher's cache: what would train another student without a word, or none at all."""

from __future__ import annotations

from mutations.planting import Mutation, edit

SPARSE = "sad/teachers/cache/sparse.py"
WRITER = "sad/teachers/cache/writer.py"
READER = "sad/teachers/cache/reader.py"
CACHED = "sad/teachers/cached.py"
CHECKS = "sad/teachers/cache/checks.py"


def runs(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sad/teachers/cache/test_cached_runs.py::{name}" for name in names)


def writing(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sad/teachers/cache/test_writing.py::{name}" for name in names)


def crossed(*names: str) -> tuple[str, ...]:
    file = "tests/sad/training/test_cross_tokenizer_cached.py"
    return tuple(f"{file}::{name}" for name in names)


MUTATIONS = [
    Mutation(
        "97",
        "samples drawn from where the process has come to",
        edit(
            WRITER,
            '    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()\n',
            "    key = os.urandom(8)\n",
        ),
        writing("test_any_number_of_processes_makes_the_same_bits[2]"),
    ),
    Mutation(
        "98",
        "a whole cache trusted without its hashes",
        edit(
            READER,
            "            world.main_first(lambda: self._verify(memory))\n",
            "            pass\n",
        ),
        runs("test_a_damaged_cache_trains_nothing[a flipped bit]"),
    ),
    Mutation(
        "99",
        "records in the order of the text, whatever that of the batch is",
        edit(
            CACHED,
            "        return torch.from_numpy(places)\n",
            "        return torch.from_numpy(np.sort(places))\n",
        ),
        runs("test_sparse_targets_are_those_of_the_live_teacher[topk]"),
    ),
    Mutation(
        "100",
        "a window smaller than what is read between two checkpoints is taken",
        edit(CHECKS, "    if window < needed:\n", "    if False:\n"),
        writing("test_a_window_that_both_would_wait_for_is_refused"),
    ),
    Mutation(
        "101",
        "the tail of re-tempered targets taken from temperature 1",
        edit(SPARSE, 'record["tail"][..., column_of_tail, None]', 'record["tail"][..., 0, None]'),
        runs("test_top_k_targets_serve_every_temperature_they_were_made_for"),
    ),
    Mutation(
        "101",
        "a tail beside held-out ids at the temperature that samples were drawn at",
        edit(
            "sad/teachers/cache/source.py",
            "top_k(logits, facts.top_k, facts.tail_temperatures)",
            "top_k(logits, facts.top_k, facts.temperatures)",
        ),
        crossed("test_a_sampled_cache_at_another_temperature_is_read"),
    ),
    Mutation(
        "99",
        "a cache of other outcomes trained from",
        edit(
            CHECKS,
            '(hash of their tables)", theirs.outcomes, ours.outcomes,',
            '(hash of their tables)", ours.outcomes, ours.outcomes,',
        ),
        crossed("test_a_cache_of_other_outcomes_is_refused"),
    ),
    Mutation(
        "99",
        "likelihoods of groups, one position late",
        edit(
            "sad/teachers/cache/source.py",
            "known.log_probs.cpu().clamp(max=0.0)",
            "known.log_probs.cpu().clamp(max=0.0).roll(1, 1)",
        ),
        crossed(
            "test_likelihoods_from_a_cache_are_the_teachers",
            "test_a_served_teacher_gives_the_likelihood_of_its_own_tokens[vllm]",
        ),
    ),
]
