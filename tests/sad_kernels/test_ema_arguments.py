"""What ``ema_update_`` and ``ema_swap_`` take, and what they refuse before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from sad_kernels import _dispatch, ema_swap_, ema_update_
from support.ema import bits
from support.oracle import IMPLS
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

impls = pytest.mark.parametrize("impl", IMPLS)

BOTH = {"swap": ema_swap_, "update": partial(ema_update_, decay=0.5)}
both = pytest.mark.parametrize("call", BOTH.values(), ids=BOTH)

# --- What can be iterated over -------------------------------------------------------------------

ITERABLES: dict[str, Callable[[list[Tensor]], Iterable[Tensor]]] = {
    "generator": lambda tensors: (x for x in tensors),
    "tuple": tuple,
    "values": lambda tensors: dict(enumerate(tensors)).values(),
    "ParameterList": nn.ParameterList,
}


def model_and_shadows() -> tuple[nn.Linear, list[Tensor]]:
    model = nn.Linear(3, 2)
    return model, [torch.zeros_like(p, requires_grad=False) for p in model.parameters()]


@impls
@pytest.mark.parametrize("kind", ITERABLES)
def test_whatever_can_be_iterated_over_once_is_taken(kind: str, impl: str) -> None:
    model, shadows = model_and_shadows()
    params = [p.detach().clone() for p in model.parameters()]
    ema_update_(ITERABLES[kind](shadows), model.parameters(), 0.5, impl=impl)
    assert all(map(torch.equal, shadows, [p / 2 for p in params]))
    ema_swap_(ITERABLES[kind](shadows), model.parameters(), impl=impl)
    assert all(map(torch.equal, shadows, params))
    assert all(map(torch.equal, model.parameters(), [p / 2 for p in params]))


@both
@pytest.mark.parametrize("where", ["shadows", "params"])
def test_a_tensor_is_no_list(where: str, call: Callable[..., None]) -> None:
    """Iterating over one gives its rows."""
    shadows, params = torch.zeros(2, 3), torch.ones(2, 3)
    given = {"shadows": list(shadows), "params": list(params)} | {where: locals()[where]}
    with pytest.raises(TypeError, match=f"{where} must be a list of tensors, got one tensor of"):
        call(**given)
    assert not shadows.any() and params.all()


@both
def test_a_model_is_no_list(call: Callable[..., None]) -> None:
    model, shadows = model_and_shadows()
    with pytest.raises(TypeError, match=r"params must be a list .*Linear; .*model.parameters\(\)"):
        call(shadows, model)
    with pytest.raises(TypeError, match="parameter 0 must be a tensor, got tuple"):
        call(shadows, model.named_parameters())


# --- Kinds of tensors ----------------------------------------------------------------------------


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["both", "shadows", "params"])
def test_tensors_that_were_made_in_inference_mode(
    where: str, dtype: torch.dtype, impl: str
) -> None:
    """torch's own functions write to them in inference mode only."""
    usual = torch.randn(40), torch.randn(40).to(dtype)
    with torch.inference_mode():
        shadow, param = (
            x.clone() if where in ("both", name) else x
            for name, x in zip(("shadows", "params"), usual, strict=True)
        )
    expected = [x.clone() for x in usual]
    for call in (*BOTH.values(), partial(ema_update_, decay=0.9)):
        call([expected[0]], [expected[1]], impl=impl)
        call([shadow], [param], impl=impl)
        assert torch.equal(bits(shadow), bits(expected[0]))
        assert torch.equal(bits(param), bits(expected[1]))
    with torch.inference_mode():
        ema_update_([shadow], [param], 0.5, impl=impl)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leaves_that_require_a_gradient(dtype: torch.dtype, impl: str) -> None:
    """Of one dimension and more: the former are not viewed before they are written to."""
    shadows = [nn.Parameter(torch.randn(shape)) for shape in ((), 5, (4, 5))]
    params = [nn.Parameter(torch.randn(x.shape).to(dtype)) for x in shadows]
    plain = [x.detach().clone() for x in shadows], [x.detach().clone() for x in params]
    for call in (*(partial(ema_update_, decay=d) for d in (0.9, 0.4, 0.0)), ema_swap_):
        call(*plain, impl=impl)
        call(shadows, params, impl=impl)
        for ours, theirs in zip(shadows + params, plain[0] + plain[1], strict=True):
            assert torch.equal(ours, theirs) and ours.requires_grad and ours.is_leaf


class Named(Tensor):
    """A subclass without tensors inside: it holds its own memory."""


@impls
def test_a_subclass_with_its_own_memory_is_taken(impl: str) -> None:
    shadow, param = torch.zeros(4).as_subclass(Named), torch.ones(4).as_subclass(Named)
    ema_update_([shadow], [param], 0.75, impl=impl)
    ema_swap_([shadow], [param], impl=impl)
    assert param.tolist() == [0.25] * 4 and shadow.tolist() == [1.0] * 4


@pytest.fixture
def distributed() -> Iterator[Callable[[Tensor], Any]]:
    """What makes a DTensor of its local part, on a mesh of this process alone."""
    dist: Any = torch.distributed
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = DeviceMesh("cpu", [0])
        yield lambda local: DTensor.from_local(local, mesh, [Shard(0)])
    finally:
        dist.destroy_process_group()


@both
@pytest.mark.parametrize("where", ["shadow", "parameter"])
def test_a_dtensor_is_named_with_its_remedy(
    where: str, call: Callable[..., None], distributed: Callable[[Tensor], Any]
) -> None:
    shadow, param, good = torch.zeros(4), torch.ones(4), torch.zeros(3)
    s = distributed(shadow) if where == "shadow" else shadow
    p = distributed(param) if where == "parameter" else param
    with pytest.raises(TypeError, match=rf"{where} 1 must be a plain .* DTensor; .*\.to_local\(\)"):
        call([good, s], [torch.ones(3), p])
    compiled = torch.compile(lambda s, p: call([s], [p]), backend="eager")
    with pytest.raises(TypeError, match=rf"{where} 0 must be a plain .* DTensor; .*\.to_local\(\)"):
        compiled(s, p)
    assert not good.any() and not shadow.any() and param.all()
    call([distributed(shadow).to_local()], [distributed(param).to_local()])
    assert shadow.all()


NO_PLAIN_TENSORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "wrapper": (lambda: TwoTensor(torch.zeros(4), torch.zeros(4)), "plain tensor, got TwoTensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(4)], layout=torch.jagged),
        "plain tensor, got NestedTensor",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.zeros(4)]),
        "dense tensor, got a nested tensor",
    ),
    "sparse": (lambda: torch.zeros(4).to_sparse(), "dense tensor, got torch.sparse_coo"),
    "mkldnn": (lambda: torch.zeros(4).to_mkldnn(), "dense tensor, got torch._mkldnn"),
}


@both
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("kind", NO_PLAIN_TENSORS)
def test_tensors_without_memory_of_their_own_are_refused(
    kind: str, call: Callable[..., None]
) -> None:
    make, says = NO_PLAIN_TENSORS[kind]
    plain = torch.ones(4)
    with pytest.raises(TypeError, match=f"shadow 0 must be a {says}; "):
        call([make()], [plain])
    with pytest.raises(TypeError, match=f"parameter 0 must be a {says}; "):
        call([plain], [make()])


# --- Compilers and transforms --------------------------------------------------------------------


@impls
def test_a_compiled_call_takes_generators_and_inference_tensors(impl: str) -> None:
    model, shadows = model_and_shadows()
    with torch.inference_mode():
        frozen = [torch.zeros_like(p) for p in model.parameters()]

    @torch.compile(backend="eager", fullgraph=True)
    def step(model: nn.Linear, shadows: dict[int, Tensor], frozen: list[Tensor]) -> None:
        ema_update_(shadows.values(), model.parameters(), 0.5, impl=impl)
        ema_update_(frozen, tuple(model.parameters()), 0.5, impl=impl)

    step(model, dict(enumerate(shadows)), frozen)
    for ours, other, param in zip(shadows, frozen, model.parameters(), strict=True):
        assert torch.equal(ours, param.detach() / 2) and torch.equal(other, ours)


@both
@pytest.mark.parametrize("inner", [lambda f: f, torch.func.grad], ids=["vmap", "vmap of grad"])
def test_batches_are_refused(inner: Callable[..., Any], call: Callable[..., None]) -> None:
    shadows, params = torch.zeros(3, 4), torch.ones(3, 4)

    def one(param: Tensor, shadow: Tensor) -> Tensor:
        call([shadow], [param])
        return param.sum()

    for in_dims, named in (((0, 0), "shadows and params"), ((0, None), "params")):
        given = params, shadows if in_dims[1] == 0 else shadows[0]
        with pytest.raises(RuntimeError, match=f"^{named} must not be batched by torch.vmap, got"):
            torch.vmap(inner(one), in_dims)(*given)
    assert not shadows.any() and params.all()


@impls
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_other_transforms_see_a_call_without_a_gradient(impl: str) -> None:
    shadow, param, fixed = torch.zeros(4), torch.ones(4), torch.zeros(4)

    def loss(x: Tensor) -> Tensor:
        ema_update_([shadow], [x], 0.5, impl=impl)
        ema_update_([fixed], [param], 0.5, impl=impl)  # tensors that no transform wraps
        return (x * x).sum()

    assert torch.func.grad(loss)(param).tolist() == [2.0] * 4
    assert torch.func.jvp(loss, (param,), (param,)) == (4, 8)
    torch.vmap(lambda x: loss(param) + x)(torch.zeros(2))
    assert shadow.tolist() == fixed.tolist() == [0.875] * 4


# --- Bad input changes nothing -------------------------------------------------------------------

GOOD = (torch.zeros(4), torch.ones(4))
TIED = torch.ones(6)

BAD_PAIRS = {
    "shape": (torch.zeros(4), torch.ones(2, 2), ValueError, "one shape"),
    "integers": (torch.zeros(4), torch.ones(4, dtype=torch.int32), TypeError, "floating-point"),
    "bf16 shadow": (torch.zeros(4).half(), torch.ones(4), TypeError, "float32"),
    "device": (torch.zeros(4), torch.ones(4, device="meta"), ValueError, "one device"),
    "no tensor": (torch.zeros(4), [1.0] * 4, TypeError, "must be a tensor"),
    "strides": (torch.zeros(2, 3), torch.ones(3, 2).T, ValueError, "dense with equal strides"),
    "strides of the shadow": (
        torch.zeros(3, 2).T,
        torch.ones(2, 3),
        ValueError,
        "dense with equal strides",
    ),
    "holes": (torch.zeros(8)[::2], torch.ones(8)[::2], ValueError, "dense with equal strides"),
    "expanded": (
        torch.zeros(1).expand(4),
        torch.ones(1).expand(4),
        ValueError,
        "dense with equal strides",
    ),
    "shadow is parameter": (TIED, TIED, ValueError, "share memory"),
    "shadow overlaps parameter": (TIED[:4], TIED[2:], ValueError, "share memory"),
    "listed before": (GOOD[0], torch.ones(4), ValueError, "share memory"),
    "tied to one before": (torch.zeros(2, 2), GOOD[1].view(2, 2), ValueError, "share memory"),
}


@impls
@pytest.mark.parametrize("function", ["update", "swap"])
@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_refused_before_anything_is_written(
    name: str, function: str, impl: str
) -> None:
    shadow, param, error, message = BAD_PAIRS[name]
    good_shadow, good_param = GOOD
    with pytest.raises(error, match=message):
        if function == "update":
            ema_update_([good_shadow, shadow], [good_param, param], 0.5, impl=impl)
        else:
            ema_swap_([good_shadow, shadow], [good_param, param], impl=impl)
    assert good_shadow.tolist() == [0.0] * 4 and good_param.tolist() == [1.0] * 4


@impls
def test_neighbours_in_one_buffer_are_not_overlapping(impl: str) -> None:
    flat = torch.tensor([0.0, 0.0, 4.0, 8.0])
    ema_update_([flat[:2]], [flat[2:]], 0.5, impl=impl)
    assert flat.tolist() == [2.0, 4.0, 4.0, 8.0]


def test_lists_must_have_one_length() -> None:
    for call in BOTH.values():
        with pytest.raises(ValueError, match="one length, got 2 and 1"):
            call([torch.zeros(1), torch.zeros(1)], [torch.ones(1)])


def test_fp16_cannot_be_exchanged_with_fp32() -> None:
    with pytest.raises(TypeError, match="one dtype"):
        ema_swap_([torch.zeros(4)], [torch.ones(4).half()])


@pytest.mark.parametrize(
    ("decay", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        (float("nan"), ValueError),
        ("0.9", TypeError),
        (True, TypeError),
        (torch.ones(1), ValueError),
        (torch.tensor(1), ValueError),
    ],
)
def test_bad_decay_is_refused(decay, error: type[Exception]) -> None:
    with pytest.raises(error, match="decay must"):
        ema_update_([torch.zeros(1)], [torch.ones(1)], decay)


@pytest.mark.parametrize("pairs", [0, 1])
@both
def test_impl_is_met_or_refused(
    call: Callable[..., None], pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows, params = [torch.zeros(1)] * pairs, [torch.ones(1)] * pairs
    with pytest.raises(ValueError, match="impl must be one of"):
        call(shadows, params, impl="cuda")
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        call(shadows, params, impl="triton")
    assert [shadow.tolist() for shadow in shadows] == [[0.0]] * pairs


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_triton_refuses_float64(decay: float) -> None:
    good, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    for call in (ema_swap_, partial(ema_update_, decay=decay)):
        with pytest.raises(TypeError, match="impl='torch' for float64"):
            call([good, double], [torch.ones(1), double + 1], impl="triton")
        assert good == 0 and double == 0


@impls
def test_nothing_to_do(impl: str) -> None:
    ema_update_([], [], 0.5, impl=impl)
    ema_swap_([], [], impl=impl)
    ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, impl=impl)
    ema_swap_([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.bfloat16)], impl=impl)
