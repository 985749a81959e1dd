"""Faults of the moving average's update and swap, in torch and in the kernels."""

from __future__ import annotations

from mutations.planting import Mutation, edit, tests

TORCH = "kernels/sad_kernels/_torch/ema.py"
TRITON = "kernels/sad_kernels/_triton/ema.py"


def ops(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_ema_ops.py", *names)


MUTATIONS = [
    Mutation(
        "8",
        "offsets into the table of blocks have 32 bits",
        edit(TRITON, "tl.program_id(0).to(tl.int64) * 3", "tl.program_id(0) * 3"),
        tests("contracts/test_compile.py", "test_kernels_compile_within_their_budgets[ema]"),
        says="must multiply the row index in 64 bits",
    ),
    Mutation(
        "8",
        "the table of blocks is made in 32 bits",
        edit(
            TRITON,
            "torch.arange(0, extent.numel, block)",
            "torch.arange(0, extent.numel, block).int()",
        ),
        tests("sad_kernels/test_ema_triton.py", "test_tables_reach_past_32_bits"),
    ),
    Mutation(
        "34",
        "the sign of the step is flipped",
        edit(TORCH, "torch.addcmul(base, step, p - s)", "torch.addcmul(base, step, s - p)"),
        ops("test_hand_computed_value[False-torch]", "test_hand_computed_value[True-torch]"),
    ),
    Mutation(
        "34",
        "the sign of the step is flipped, in the kernel",
        edit(TRITON, "step = p - s", "step = s - p"),
        ops("test_hand_computed_value[False-triton]", "test_hand_computed_value[True-triton]"),
    ),
    Mutation(
        "34",
        "decay and its complement change places",
        edit(TORCH, "    w = 1.0 - keep\n", "    w, keep = keep, 1.0 - keep\n"),
        ops("test_hand_computed_value[False-torch]"),
    ),
    Mutation(
        "34",
        "decay and its complement change places, on their way to the kernel",
        edit(TRITON, "torch.stack((1.0 - keep, keep))", "torch.stack((keep, 1.0 - keep))"),
        ops("test_hand_computed_value[False-triton]"),
    ),
    Mutation(
        "35",
        "shadows keep 16 bits",
        edit(
            TORCH,
            "torch.where(exact, base, moved, out=s)",
            "s.copy_(torch.where(exact, base, moved).bfloat16())",
        ),
        ops("test_many_steps_follow_float64[dtype1-torch]"),
    ),
    Mutation(
        "35",
        "shadows keep 16 bits, in the kernel",
        edit(
            TRITON,
            "return tl.where(keep == 0.0, p, moved)",
            "return tl.where(keep == 0.0, p, moved).to(tl.bfloat16).to(tl.float32)",
        ),
        ops("test_many_steps_follow_float64[dtype1-triton]"),
    ),
    Mutation(
        "35",
        "1 - decay is formed in fp32",
        edit(
            TORCH,
            "    keep = on_device(decay, shadow.device)\n    w = 1.0 - keep\n",
            "    keep = on_device(decay, shadow.device).float()\n    w = 1.0 - keep\n",
        ),
        ops("test_the_first_step_is_rounded_once[0.9999-False-torch]"),
    ),
    Mutation(
        "35",
        "1 - decay is formed in fp32, on its way to the kernel",
        edit(
            TRITON,
            "keep = decay.to(device, torch.float64, non_blocking=True)",
            "keep = decay.to(device, torch.float32, non_blocking=True)",
        ),
        ops("test_the_first_step_is_rounded_once[0.9999-False-triton]"),
    ),
    Mutation(
        "37",
        "a swap drops what the parameter cannot hold of the shadow",
        edit(TORCH, "s.copy_((residue << 16) | low)", "s.copy_(residue << 16)"),
        ops("test_swapping_twice_is_the_identity[torch]"),
    ),
    Mutation(
        "37",
        "a swap drops what the parameter cannot hold of the shadow, in the kernel",
        edit(TRITON, "return (residue << 16) | low, rounded", "return residue << 16, rounded"),
        ops("test_swapping_twice_is_the_identity[triton]"),
    ),
    Mutation(
        "37",
        "the rounding of a swap is not undone by the next",
        edit(
            TORCH, "_turn(p.to(torch.int32) & 0xFFFF, -up)", "_turn(p.to(torch.int32) & 0xFFFF, up)"
        ),
        ops("test_swapping_twice_is_the_identity[torch]"),
    ),
    Mutation(
        "37",
        "the rounding of a swap is not undone by the next, in the kernel",
        edit(
            TRITON, "_turned(p.to(tl.int32) & 0xFFFF, -up)", "_turned(p.to(tl.int32) & 0xFFFF, up)"
        ),
        ops("test_swapping_twice_is_the_identity[triton]"),
    ),
]
