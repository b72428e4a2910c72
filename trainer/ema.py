"""Moving averages of the weights: float32, sharded as the weights are, beside them or in host memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.background import Background
from trainer.parallel.apply import reshard
from trainer.power_profiles import exponent, share
from trainer.tensors import local, locals_of


class EMA:
    """ema <- ema + (1 - decay) (weights - ema), for the trainable parameters; and beside it averages of power-function
    profiles (`trainer.power_profiles`), of which others can be made afterwards."""

    def __init__(self, module: nn.Module, *, offload: bool = False, profiles: Sequence[float] = ()) -> None:
        """
        Args:
            offload: keep the averages in host memory; the same numbers, and `wait_for_copy` before the weights change.
            profiles: widths sigma_rel of the power-function averages.
        """
        self._parameters = dict(module.named_parameters())
        copy = in_host_memory if offload else lambda parameter: parameter.detach().clone().float()
        self._average: dict[str, Tensor] = {name: copy(parameter) for name, parameter in self._parameters.items()}
        self._profiles = {width: {name: copy(p) for name, p in self._parameters.items()} for width in profiles}
        self._exponents = {width: exponent(width) for width in profiles}
        self._host = HostUpdate(self._weights()) if offload else None

    @property
    def average(self) -> dict[str, Tensor]:
        """Up to date: waits for an update that is under way in host memory."""
        if self._host:
            self._host.finish()
        return self._average

    @property
    def profiles(self) -> dict[float, dict[str, Tensor]]:
        """The power-function averages by their width; up to date, too."""
        if self._host:
            self._host.finish()
        return self._profiles

    def _weights(self) -> list[Tensor]:
        return locals_of(self._parameters.values())

    def update(self, decay: float, skip: Tensor, steps: int = 1) -> None:
        """
        Args:
            skip: 1.0 on the device where this step's update was skipped: then the plain average does not move, and the host
                needn't know. In the profiles, whose time is steps, the weights stand for another step.
            steps: done by now, for the profiles.
        """
        average = locals_of(self._average.values())
        profiles = [
            (locals_of(of_profile.values()), share(self._exponents[width], steps))
            for width, of_profile in self._profiles.items()
        ]

        def take_step(weights: list[Tensor], skip: Tensor) -> None:
            move(average, weights, decay, skip)
            for of_profile, part in profiles:
                follow(of_profile, weights, part)

        if self._host:
            self._host.start(self._weights(), skip, take_step)
        else:
            take_step(self._weights(), skip)

    def wait_for_copy(self) -> None:
        """Before the weights change again: the device, not the host, waits until they have been copied."""
        if self._host:
            self._host.wait_for_copy()

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within, the module computes with the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        weights, average = self._weights(), locals_of(self.average.values())
        kept = [torch.empty_like(a).copy_(w) for w, a in zip(weights, average, strict=True)]
        torch._foreach_copy_(weights, average)
        torch._foreach_copy_(average, kept)


@contextmanager
def averaged(module: nn.Module, ema: EMA) -> Iterator[None]:
    """Within, the module is the average of its weights, in evaluation mode."""
    reshard(module)
    with ema.in_place_of_weights():
        module.eval()
        try:
            yield
        finally:
            reshard(module)
            module.train()


@torch.no_grad()
def move(average: list[Tensor], weights: list[Tensor], decay: float, skip: Tensor) -> None:
    """Move `average` a step towards `weights`, in place; not at all where `skip` is 1.0."""
    share = (1.0 - decay) * (1.0 - skip)
    if not share.is_cuda:  # in one pass, which for a share on the device there is no kernel for
        torch._foreach_lerp_(average, in_dtypes_of(average, weights), [share] * len(weights))
        return
    difference = torch._foreach_sub(weights, average)
    torch._foreach_mul_(difference, share)
    torch._foreach_add_(average, difference)


@torch.no_grad()
def follow(average: list[Tensor], weights: list[Tensor], share: float) -> None:
    """Move `average` by `share` of the way to `weights`, in place; 1: become them."""
    torch._foreach_lerp_(average, in_dtypes_of(average, weights), share)


def in_dtypes_of(average: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The weights themselves where they are of the average's dtype: of another, there is no kernel."""
    return [w.to(a.dtype) for w, a in zip(weights, average, strict=True)]


class HostUpdate:
    """Updates of averages in host memory. The device copies its weights on a stream of its own while it goes on, a thread
    takes the step when they have arrived; the host waits for neither until the next update. On CPU there is no stream."""

    def __init__(self, weights: list[Tensor]) -> None:
        on_gpu = any(w.is_cuda for w in weights)
        # Pinned: from pageable memory's side no copy runs beside the host. Of the averages the device needs nothing.
        self._weights = [torch.empty_like(w, device="cpu", pin_memory=on_gpu) for w in weights]
        self._skip = torch.zeros((), pin_memory=on_gpu)
        self._thread = Background[None]("average")
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._copied = torch.cuda.Event(blocking=True) if on_gpu else None

    @torch.no_grad()
    def start(self, weights: list[Tensor], skip: Tensor, take_step: Callable[[list[Tensor], Tensor], None]) -> None:
        """`take_step`: given the weights and `skip` in host memory; called in the thread."""
        self.finish()  # the one before has read what is overwritten now
        if self._stream is None:
            self._copy(weights, skip)
        else:
            assert self._copied is not None
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy(weights, skip)
                self._copied.record()
            skip.record_stream(self._stream)  # the step drops it before it has been read
        self._thread.start(lambda: self._take_step(take_step))

    def _copy(self, weights: list[Tensor], skip: Tensor) -> None:
        for ours, theirs in zip([*self._weights, self._skip], [*weights, skip], strict=True):
            ours.copy_(theirs, non_blocking=True)

    def _take_step(self, take_step: Callable[[list[Tensor], Tensor], None]) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        take_step(self._weights, self._skip)

    def finish(self) -> None:
        self._thread.collect()

    def wait_for_copy(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def in_host_memory(tensor: Tensor) -> Tensor:
    """A float32 copy in host memory, sharded alike, so that a checkpoint takes it as it takes the others."""
    shard = local(tensor.detach()).to("cpu", torch.float32, copy=True)
    if not isinstance(tensor, DTensor):
        return shard
    mesh = host_mesh(tensor.device_mesh)  # with the device's own mesh, `from_local` would move the shard back
    return DTensor.from_local(
        shard, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks and process groups, for tensors in host memory: the groups carry gloo beside NCCL."""
    groups = mesh.get_all_groups()
    return DeviceMesh.from_group(
        groups if len(groups) > 1 else groups[0], "cpu", mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names
    )
