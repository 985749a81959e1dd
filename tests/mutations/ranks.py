"""Faults of a run on several ranks: each was met when FSDP2 was first tried on this trainer."""

from __future__ import annotations

from mutations.planting import Mutation, edit

SHARDING = "sad/distributed/sharding.py"
TRAINER = "sad/training/trainer.py"
METERS = "sad/training/meters.py"


def runs(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sad/distributed/test_runs.py::{name}" for name in names)


def gradients(*names: str) -> tuple[str, ...]:
    test = "test_every_gradient_is_that_of_one_process"
    return tuple(f"tests/sad/distributed/test_sharding.py::{test}[{name}]" for name in names)


MUTATIONS = [
    Mutation(
        "90",
        "averaged weights are scored with what was gathered of the raw ones",
        (
            *edit(
                TRAINER,
                "        reshard(self.student)\n        with self.ema",
                "        with self.ema",
            ),
            *edit(
                TRAINER,
                "            yield\n            reshard(self.student)\n",
                "            yield\n",
            ),
        ),
        runs("test_a_run_on_ranks_is_the_run_of_one_process[kd-2-1]"),
    ),
    Mutation(
        "91",
        "gradients of layers are averaged, those of the root are summed",
        edit(
            SHARDING,
            "    for module in fsdp_modules(root):\n        # Each",
            "    for module in [root]:\n        # Each",
        ),
        gradients("2 ranks"),
    ),
    Mutation(
        "92",
        "a factor that gloo cannot reduce with",
        edit(SHARDING, "        module.set_force_sum_reduction_for_comms(True)\n", ""),
        gradients("2 ranks"),
        error="RankFailedError",
    ),
    Mutation(
        "93",
        "a rank without rows leaves the others waiting in an evaluation",
        edit(
            "sad/training/inputs.py",
            "            batch = rank_batch(self.eval_rows, together, share, start)\n"
            "            yield batch.to(self.device)\n",
            "            if len(together[share]):\n"
            "                yield self.eval_rows.batch(together[share]).to(self.device)\n",
        ),
        runs("test_a_run_on_ranks_is_the_run_of_one_process[kd-2-1]"),
        error="RankFailedError",
    ),
    Mutation(
        "94",
        "every rank goes on with the sums that all ranks had together",
        edit("sad/training/state.py", "    trainer.meter.keep_on_main(trainer.world)\n", ""),
        runs("test_sums_between_two_log_lines_survive_another_number_of_ranks"),
    ),
    Mutation(
        "95",
        "the loss is divided by the targets of one rank",
        edit(
            "sad/training/batches.py",
            "counts(np.concatenate(rows))\n",
            "counts(np.concatenate(rows)[self._world.share(20)])\n",
        ),
        gradients("2 ranks"),
    ),
    Mutation(
        "96",
        "what is gathered of a split vocabulary, by a name that torch has deprecated",
        edit(
            "kernels/sad_kernels/vocab.py",
            "    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=of_name)\n",
            "    dist.all_gather_into_tensor(out, x.contiguous(), group=of_name)\n",
        ),
        ("tests/sad_kernels/test_vocab_shard.py::test_a_second_backward[torch]",),
        error="RankFailedError",
        says="`torch.distributed.all_gather_into_tensor` is deprecated",
    ),
]
