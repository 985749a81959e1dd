"""Models that are split over ranks by FSDP2, and gradients that are summed over them.

``fully_shard`` keeps a part of each parameter on every rank and gathers the whole around the layer
that computes with it. The losses are divided by the units of the whole window on every rank, so
gradients are summed over ranks and not averaged: no factor depends on their number.

The root module is the student *with* its losses, or the teacher up to its hidden states. Around its
forward pass the embedding, the last norm and the head are whole, where the loss needs the head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from sad.distributed.tensors import whole
from sad.distributed.world import World


def shard_trained(
    root: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Split a model that is trained over the ranks of ``mesh``, in place: each of its ``layers`` by
    itself, and the rest of ``root`` as one. Its parameters become ``DTensor``.

    They keep their dtype, are gathered and computed with in ``compute_dtype``, and have their
    gradients summed in fp32. Without ``reshard_after_forward`` a layer stays whole until its
    backward pass; with ``cpu_offload`` the parts lie in host memory.
    """
    precision = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        # Inputs of the root are token ids and the teacher's tensors, which keep their dtypes.
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    mesh = _without_replicas(mesh)
    for layer in layers:
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(root, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for module in fsdp_modules(root):
        # Each of these settings is of one module alone. Both are needed: a factor is sent as a
        # reduction that gloo does not have, unless it is a sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def shard_frozen(
    root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, *, keep_root: bool
) -> None:
    """Split a model that is only run: each of its ``layers`` by itself, the rest of ``root`` as
    one, which with ``keep_root`` stays whole after a forward pass."""
    mesh = _without_replicas(mesh)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh, reshard_after_forward=not keep_root)


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    """The modules of a split model that are gathered as one, the root among them."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def set_last_backward(root: nn.Module, *, last: bool, sync_each: bool) -> None:
    """Say whether the next backward pass of a split model is the ``last`` of its window.

    Gradients are summed over ranks after each of them, or, without ``sync_each``, after the last.
    """
    assert isinstance(root, FSDPModule)
    root.set_is_last_backward(last)
    if not sync_each:
        root.set_requires_gradient_sync(last)


def whole_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The state dict of a split model with whole tensors, in host memory of the first rank; the
    others, which have to ask for it too, get an empty one."""
    state: dict[str, Tensor] = {}
    gathered: dict[int, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:  # a tied one is one tensor
            part = whole(tensor.detach())
            gathered[id(tensor)] = part.cpu() if world.main else None
        if world.main:
            state[name] = gathered[id(tensor)]
    return state


def reshard(root: nn.Module) -> None:
    """Drop the gathered parameters of a split model.

    The root's stay gathered after a forward pass without gradients: whoever changes the parameters
    then has to call this, or the next forward pass computes with the old ones.
    """
    for module in fsdp_modules(root):
        module.reshard()


def _without_replicas(mesh: DeviceMesh) -> DeviceMesh:
    """The dimensions of the mesh that FSDP is to know: a single copy is not replicated."""
    return mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh
