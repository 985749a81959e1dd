"""What a forward pass without gradients holds at most, measured on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sad.models.heads import Backbone

ContextFactory = Callable[[], AbstractContextManager[object]]


class PeakOfStorages(TorchDispatchMode):
    """Within, ``peak`` is the most bytes that new tensors hold at once, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this tensor, nor views of it."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # torch's fake of it takes bf16 alone
            out = args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def forward_peak(
    model: PreTrainedModel,
    device: torch.device,
    rows: int,
    length: int,
    autocast: ContextFactory = nullcontext,
) -> int:
    """Bytes beyond its weights that a model of meta tensors holds at most while it runs packed rows
    in eval mode, its final hidden states included. The model's tensors are replaced by fake ones.
    """
    model.eval()
    with FakeTensorMode(), torch.no_grad():
        put_tensors(model, device)
        ids, positions = (
            torch.zeros(rows, length, dtype=torch.int64, device=device) for _ in range(2)
        )
        with PeakOfStorages() as storages, autocast():
            for tensor in (*model.parameters(), *model.buffers()):
                storages.leave_out(tensor)
            Backbone(model)(ids, positions)
    return storages.peak


def put_tensors(model: nn.Module, device: torch.device) -> None:
    """Give a model of meta tensors empty ones on ``device``: under ``FakeTensorMode``, fake ones.

    ``Module.to_empty`` would swap tensors in place, which fake ones do not allow.
    """
    tensors: dict[int, Tensor] = {}  # one for each: tied ones stay tied
    for module in model.modules():
        owned: tuple[Any, ...] = (module._parameters, module._buffers)
        for own in owned:
            for name, old in own.items():
                if old is None:
                    continue
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                own[name] = tensors.setdefault(id(old), new)
