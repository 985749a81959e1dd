"""Faults of the moving average's update and swap, in torch and in the kernels."""

from __future__ import annotations

from mutations.planting import Mutation, edit, tests

TORCH = "kernels/sad_kernels/_torch/ema.py"
TRITON = "kernels/sad_kernels/_triton/ema.py"


def ops(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_ema_ops.py", *names)


def cpu(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_ema_cpu.py", *names)


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
        edit(TORCH, "_foreach_lerp_(shadows, params, w)", "_foreach_lerp_(shadows, params, -w)"),
        ops("test_hand_computed_value[False-torch]", "test_hand_computed_value[True-torch]"),
    ),
    Mutation(
        "34",
        "the sign of the step is flipped, for a parameter that is nearer than the shadow",
        edit(TORCH, "torch.sub(p, s, out=s)", "torch.sub(s, p, out=s)"),
        cpu("test_an_update_has_the_bits_of_the_other_devices[0.3-numbers-dtypes0]"),
    ),
    Mutation(
        "34",
        "the sign of the step is flipped, on a device that is not a CPU",
        edit(TORCH, "torch.addcmul(base, step, p - s)", "torch.addcmul(base, step, s - p)"),
        cpu("test_an_update_has_the_bits_of_the_other_devices[0.75-numbers-dtypes0]"),
    ),
    Mutation(
        "34",
        "a step that rounds to 1/2 taken from the wrong side",
        edit(TORCH, "w < 0.5 and 0.0 < float(step) < 0.5", "0.0 < w < 0.5"),
        cpu("test_an_update_has_the_bits_of_the_other_devices[0.5000000000009095-numbers-dtypes0]"),
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
        edit(
            TORCH,
            "    w = 1.0 - keep\n    if w == 0.0:\n",
            "    w, keep = keep, 1.0 - keep\n    if w == 0.0:\n",
        ),
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
            "            lists._foreach_lerp_(shadows, upcast, w)\n",
            "            lists._foreach_lerp_(shadows, upcast, w)\n"
            "            lists._foreach_copy_(shadows, [s.bfloat16() for s in shadows])\n",
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
        edit(TORCH, "float(decay)", "float(decay.float())"),
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
        edit(
            TORCH,
            "torch.add(s, room.half, out=wide)",
            "torch.add(s.bitwise_and_(-65536), room.half, out=wide)",
        ),
        cpu("test_a_swap_has_the_bits_of_the_reference[numbers-dtypes0]"),
    ),
    Mutation(
        "37",
        "a swap drops what the parameter cannot hold of the shadow, next to zero",
        edit(TORCH, "s.copy_((residue << 16) | low)", "s.copy_(residue << 16)"),
        cpu("test_a_swap_has_the_bits_of_the_reference[bits-dtypes0]"),
    ),
    Mutation(
        "37",
        "a swap steps down from a parameter of zero, to NaN",
        edit(TORCH, "if int(folded.amax()) <= LAST", "if int(folded[1].amax()) <= LAST"),
        cpu("test_only_elements_off_the_circle_are_swapped_apart[parameters]"),
    ),
    Mutation(
        "37",
        "a swap rounds a NaN to -0.0",
        edit(TORCH, "if int(folded.amax()) <= LAST", "if int(folded[0].amax()) <= LAST"),
        ops("test_nan_shadows_stay_nan[2147483647-torch]"),
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
