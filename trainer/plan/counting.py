"""What a module has to compute and to keep, counted operation by operation on fake tensors: nothing is allocated.

The module runs twice, with two batch sizes, and all that is counted is a straight line through both: what it keeps of the
batch, and what it keeps whatever the batch. Its units (a transformer's blocks) are told apart, so that blocks alike are run
once and counted as often as they are there, and so that one pass says what each kind of recomputation would keep.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trainer.flops import FORMULAS
from trainer.live_tensors import LiveTensors
from trainer.models.layers import sinusoids
from trainer.parallel.apply import KEPT_OPERATIONS

Kind = Literal["matmul", "convolution", "attention", "other"]
Recompute = Literal["none", "selective", "full"]
_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.convolution, _ATEN.convolution_backward}
_FREE = {_ATEN.detach.default, torch.ops.prim.device.default}
_KEPT = set(KEPT_OPERATIONS)
BATCHES = (2, 3)
"""That are counted; what is between and beyond them is on the line through both."""
IN_FLOAT32 = {
    torch.layer_norm, torch.nn.functional.layer_norm, torch.group_norm, torch.nn.functional.group_norm, torch.rms_norm,
    torch.nn.functional.rms_norm, torch.softmax, torch.nn.functional.softmax, Tensor.softmax, torch.exp, Tensor.exp,
    torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt,
}  # fmt: skip
"""What CUDA's autocast computes in float32 and the CPU's does not (torch's list, the ones that our models call)."""


@dataclass(frozen=True)
class Line:
    """A straight line over the images of a forward pass."""

    fixed: float = 0.0
    per_image: float = 0.0

    def at(self, images: float) -> float:
        return self.fixed + self.per_image * images

    def __add__(self, other: "Line") -> "Line":
        return Line(self.fixed + other.fixed, self.per_image + other.per_image)

    def __mul__(self, times: float) -> "Line":
        return Line(self.fixed * times, self.per_image * times)


@dataclass(frozen=True)
class Operation:
    kind: Kind
    flops: Line
    bytes: Line
    """Read and written, each tensor once."""
    kept: bool
    """Selective recomputation keeps what it gives."""


@dataclass(frozen=True)
class Tally:
    """Of one unit, or of all that is in none."""

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    saved: Line
    """Bytes that its forward pass made and that are still there at the end of the module's."""
    outputs: Line
    """Bytes of it that the unit gives to the next one: of a unit that is recomputed, these stay."""
    products: Line
    """Bytes of matrix products and attentions, which selective recomputation keeps as well, wanted or not."""


@dataclass(frozen=True)
class ModuleCount:
    outside: Tally
    units: tuple[tuple[Tally, int], ...]
    """Each kind of units, and how many there are."""
    transient: Line
    """The most that the backward pass holds beyond what the forward pass has kept."""

    def kept(self, recompute: Recompute) -> Line:
        """Bytes that are there at the end of the forward pass; the fixed part is weights in the autocast's precision."""
        total = self.outside.saved
        for tally, times in self.units:
            total = total + _kept_of(tally, recompute) * times
        return total

    def recomputed(self, recompute: Recompute) -> Line:
        """Bytes that come on top while one unit is recomputed."""
        if recompute == "none":
            return Line()
        spans = [tally.saved + _kept_of(tally, recompute) * -1.0 for tally, _ in self.units]
        return max(spans, key=lambda line: line.at(BATCHES[-1]), default=Line())

    def operations(self, recompute: Recompute = "none") -> tuple[list[Operation], list[Operation]]:
        """(forward, backward) with what is recomputed in the latter."""
        forward, backward = list(self.outside.forward), list(self.outside.backward)
        for tally, times in self.units:
            again = [op for op in tally.forward if recompute == "full" or (recompute == "selective" and not op.kept)]
            forward += list(tally.forward) * times
            backward += [*tally.backward, *again] * times
        return forward, backward

    def flops(self) -> Line:
        """Of a forward and a backward pass, what is recomputed left out, as `trainer.flops` counts."""
        forward, backward = self.operations()
        return sum_lines(op.flops for op in (*forward, *backward))


def _kept_of(tally: Tally, recompute: Recompute) -> Line:
    # weights in the autocast's precision are cached until the forward pass ends, however it is recomputed
    weights = Line(tally.saved.fixed)
    if recompute == "none":
        return tally.saved
    return weights + Line(0.0, tally.outputs.per_image + tally.products.per_image * (recompute == "selective"))


def sum_lines(lines: Iterable[Line]) -> Line:
    total = Line()
    for line in lines:
        total = total + line
    return total


# -------------------------------------------------------------------------------------------------------- what is counted


@dataclass
class _Raw:
    """One pass at one batch size."""

    forward: list[tuple[Kind, int, int, bool]]
    backward: list[tuple[Kind, int, int, bool]]
    saved: int = 0
    outputs: int = 0
    products: int = 0


class Counting(LiveTensors):
    """Every operation within: its arithmetic, what it reads and writes, which unit it is of."""

    def __init__(self, units: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.raw = [_Raw([], []) for _ in range(len(units) + 1)]
        """Of each unit; the last one: of what is in none."""
        self._unit = self._outside = len(units)
        self._owner: dict[int, int] = {}
        """The unit that made what is there."""
        self._product = False
        self._outputs: list[set[int]] = [set() for _ in self.raw]
        self._given: set[Any] = set()
        self.in_backward = False
        for i, unit in enumerate(units):
            self._listen(i, unit)

    def _listen(self, index: int, unit: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._unit = index
            self._given = {t.grad_fn for t in _tensors((args, kwargs)) if t.grad_fn is not None}

        def after(_: nn.Module, __: Any, ___: Any, out: Any) -> None:
            self._unit = self._outside
            made = _tensors(out)
            self._outputs[index] |= {t.untyped_storage()._cdata for t in made}
            _mark([t.grad_fn for t in made if t.grad_fn is not None], self._given, index)

        unit.register_forward_pre_hook(before, with_kwargs=True)
        unit.register_forward_hook(after, with_kwargs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._product = func in _KEPT
        owner = self._unit
        if self.in_backward:
            node: Any = torch._C._current_autograd_node()
            owner = self._outside if node is None else node.metadata.get("unit", self._outside)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view and func not in _FREE:
            formula = FORMULAS.get(func._overloadpacket)
            flops = int(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0
            touched = {id(t): t.numel() * t.element_size() for t in _tensors((args, kwargs, out))}
            raw = self.raw[owner]
            kind = _kind(func._overloadpacket, flops)
            (raw.backward if self.in_backward else raw.forward).append(
                (kind, flops, sum(touched.values()), self._product)
            )
        return out

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        super()._add(storage, size)
        if size and not self.in_backward:
            self._owner[storage._cdata] = self._unit
            self.raw[self._unit].products += size * self._product

    def _forget(self, key: int) -> None:
        super()._forget(key)
        owner = self._owner.pop(key, None)
        if owner is not None:
            self._outputs[owner].discard(key)  # the address may be another's soon

    def end_forward(self) -> None:
        """Sort what is still there."""
        for key, unit in self._owner.items():
            raw, size = self.raw[unit], self._sizes[key]
            raw.saved += size
            raw.outputs += size * (key in self._outputs[unit])
        self.in_backward = True


def _kind(packet: Any, flops: int) -> Kind:
    if not flops:
        return "other"
    if packet in _CONVOLUTIONS:
        return "convolution"
    return "attention" if "attention" in str(packet) else "matmul"


def _tensors(tree: Any) -> list[Tensor]:
    out: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            out.append(leaf)
        elif hasattr(leaf, "__dataclass_fields__"):
            out += _tensors([getattr(leaf, name) for name in leaf.__dataclass_fields__])
    return out


def _mark(ends: list[Any], stop: set[Any], unit: int) -> None:
    """Write the unit onto the autograd nodes between its inputs and its outputs."""
    seen, todo = set(stop), list(ends)
    while todo:
        node = todo.pop()
        if node in seen or node.name().endswith("AccumulateGrad") or "unit" in node.metadata:
            continue
        seen.add(node)
        node.metadata["unit"] = unit
        todo += [following for following, _ in node.next_functions if following is not None]


# ------------------------------------------------------------------------------------------------------------- a precision


class _CudaRules(TorchFunctionMode):
    """What autocast on a GPU lifts to float32 and on a CPU does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_FLOAT32:
            args = tuple(_lifted(arg) for arg in args)
            kwargs = {name: _lifted(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _lifted(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value


@contextmanager
def precision(*, bf16: bool) -> Iterator[None]:
    """As `trainer.parallel.apply.autocast` on a GPU; without, float32 as on a CPU."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), _CudaRules() if bf16 else nullcontext():
        yield


@contextmanager
def fake() -> Iterator[None]:
    """Within, modules and tensors have sizes and no values."""
    sinusoids.cache_clear()  # what is kept from call to call is neither to be found here nor to be left behind
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        sinusoids.cache_clear()


# --------------------------------------------------------------------------------------------------------------- counting


def count_trained(
    build: Callable[[], tuple[nn.Module, Sequence[nn.Module]]],
    call: Callable[[nn.Module, int], Tensor],
    whole: Sequence[nn.Module],
    *,
    bf16: bool = True,
) -> ModuleCount:
    """
    Args:
        build: the module and its units, called within `fake`; it may have fewer units than the one that is trained.
        call: (module, images) -> what the backward pass begins at, within autocast.
        whole: the units of the trained module, each alike to one of those built.
    """
    passes, transients = [], []
    for images in BATCHES:
        with fake():
            module, units = build()
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop)
            with Counting(units) as counting:
                with precision(bf16=bf16):
                    end = call(module, images)
                counting.end_forward()
                kept = counting.peak_bytes = counting.bytes
                end.backward()
            transients.append(counting.peak_bytes - kept)
            passes.append(counting.raw)
            del end
    kinds = {signature(unit): i for i, unit in enumerate(units)}
    lines = [_tally(*of_both) for of_both in zip(*passes, strict=True)]
    *of_units, outside = lines
    times = Counter(kinds[signature(unit)] for unit in whole)
    return ModuleCount(outside, tuple((of_units[i], n) for i, n in times.items()), _line(*transients))


def _drop(parameter: Tensor) -> None:
    parameter.grad = None  # sharding reduces a gradient and frees it as soon as its unit is done


def signature(unit: nn.Module) -> tuple[Any, ...]:
    """Units with the same one compute alike on inputs alike."""
    return type(unit).__name__, tuple((name, tuple(p.shape)) for name, p in unit.named_parameters())


@dataclass(frozen=True)
class FrozenCount:
    operations: tuple[Operation, ...]
    peak: Line
    """The most that it holds at once, beyond its weights."""

    def flops(self) -> Line:
        return sum_lines(op.flops for op in self.operations)


def count_frozen(call: Callable[[int], object], *, bf16: bool = True, grad: bool = False) -> FrozenCount:
    """Of a function of the number of images, called within `fake`; forward alone, or with what it differentiates itself."""
    raws, peaks = [], []
    for images in BATCHES:
        sinusoids.cache_clear()
        with Counting() as counting, precision(bf16=bf16), torch.set_grad_enabled(grad):
            call(images)
        raws.append(counting.raw[-1])
        peaks.append(counting.peak_bytes)
    return FrozenCount(_tally(*raws).forward, _line(*peaks))


def _line(first: float, second: float) -> Line:
    low, high = BATCHES
    slope = (second - first) / (high - low)
    return Line(first - slope * low, slope)


def _tally(first: _Raw, second: _Raw) -> Tally:
    return Tally(
        _operations(first.forward, second.forward),
        _operations(first.backward, second.backward),
        _line(first.saved, second.saved),
        _line(first.outputs, second.outputs),
        _line(first.products, second.products),
    )


def _operations(
    first: list[tuple[Kind, int, int, bool]], second: list[tuple[Kind, int, int, bool]]
) -> tuple[Operation, ...]:
    assert [op[0] for op in first] == [op[0] for op in second], "two batch sizes run different operations"
    return tuple(
        Operation(kind, _line(flops, more_flops), _line(size, more_size), kept)
        for (kind, flops, size, kept), (_, more_flops, more_size, _) in zip(first, second, strict=True)
    )
