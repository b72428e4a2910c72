"""Begin with the weights of another run or of an export, instead of fresh ones (`init_from`).

A source names its tensors as the model does (a run's checkpoint), or in the names of the library that wrote it; what fits by
name and shape is taken, the rest is reported.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.checkpoint.folder import NAME
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.checkpoint.retention import unique_hold
from trainer.config import InitFromConfig, MMDiTConfig, resolve_url
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.models.codec_files import CLASSES as AUTOENCODERS
from trainer.models.codec_files import current_name
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import sd3_state_to_mmdit
from trainer.parallel.world import World
from trainer.run_folder import CHECKPOINTS
from trainer.safetensors_source import SafetensorsSource
from trainer.tensors import locals_of, put

PREFIXES = ("", "denoiser.", "denoiser.net.", "autoencoder.")
"""Where a library's own module stands in ours: its names follow one of these."""
SD3, DIT = "SD3Transformer2DModel", "DiTTransformer2DModel"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Mismatch:
    name: str
    there: tuple[int, ...]
    here: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    source: str
    """URL of what was read: of a run, the checkpoint."""
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Of the model's, wanted and not in the source: they keep their fresh values."""
    mismatched: tuple[Mismatch, ...]
    """In both, and of another shape: they keep their fresh values."""
    unused: tuple[str, ...]
    """Of the source's, without a place in the model or not to be taken."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what was taken, and the first few of what was not."""
        fresh = f", {len(self.missing) + len(self.mismatched)} keep fresh values, {len(self.unused)} there are not used"
        out = [f"begins with {len(self.loaded)} tensors of {self.source}{fresh}"]
        out += [f"  not in the source: {_some(self.missing)}"] if self.missing else []
        shapes = tuple(f"{m.name} {list(m.there)} there, {list(m.here)} here" for m in self.mismatched)
        out += [f"  of another shape: {_some(shapes)}"] if shapes else []
        out += [f"  not used: {_some(self.unused)}"] if self.unused else []
        return out


def warm_start(module: nn.Module, ema: EMA, config: InitFromConfig, world: World) -> Report:
    """Fill the module's tensors, sharded or not, in place; the average starts as the weights. A collective.

    Raises, on every rank:
        UserError: nothing there, or nothing that fits; with `strict`, also where a wanted tensor has no match.
        CheckpointError: storage failed.
    """
    ranks, targets = Ranks(world.host_group), module.state_dict()
    url = resolve_url(config.url).rstrip("/")
    if ranks.on_rank_0(lambda: SafetensorsSource.is_one(url)):
        report = _from_safetensors(targets, module, config, url, ranks, world)
    else:
        report = _from_run(targets, config, url, ranks)
    with torch.no_grad():
        average = ema.average
        weights = dict(module.named_parameters())
        for of_it in (average, *ema.profiles.values()):
            for mine, weight in zip(locals_of(of_it.values()), locals_of(weights[name] for name in of_it), strict=True):
                mine.copy_(weight)
    return report


# ---------------------------------------------------------------------------------------------------------- which tensors


def match(url: str, stored: Shapes, wanted: Shapes, config: InitFromConfig) -> Report:
    """What is taken of `stored`, both in the model's names.

    Raises:
        UserError: one line that names both sides.
    """
    asked = [n for n in wanted if _matches(n, config.include) and not _matches(n, config.exclude)]
    if not asked:
        raise UserError(
            f"init_from.include, exclude: of the model's {len(wanted)} tensors (first: {next(iter(wanted), 'none')}) none is "
            "left to take; mend the patterns"
        )
    found = [name for name in asked if name in stored]
    loaded = tuple(name for name in found if stored[name] == wanted[name])
    report = Report(
        url,
        loaded,
        tuple(name for name in asked if name not in stored),
        tuple(Mismatch(name, stored[name], wanted[name]) for name in found if stored[name] != wanted[name]),
        tuple(name for name in stored if name not in set(found)),
    )
    if not loaded or (config.strict and (report.missing or report.mismatched)):
        raise UserError(f"init_from.url: {url} {_clash(report, len(asked))}")
    return report


def _clash(report: Report, asked: int) -> str:
    mend = (
        "set init_from.strict=false to keep fresh values there, take fewer with init_from.include, or mend task.model"
        if report.loaded
        else "give weights of this model's layout, or this run their task.model"
    )
    if report.mismatched:
        first = report.mismatched[0]
        return (
            f"has {first.name} of shape {list(first.there)}, this model's is {list(first.here)} "
            f"({len(report.mismatched)} such, {len(report.missing)} missing); {mend}"
        )
    there = f"has {len(report.unused)} tensors of another layout (first: {report.unused[0]})" if report.unused else (
        f"has {len(report.loaded)} of this model's {asked} tensors"
    )  # fmt: skip
    return f"{there}, this model wants {report.missing[0]} and {len(report.missing) - 1} more that it lacks; {mend}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------- from another run


def _from_run(targets: Mapping[str, Tensor], config: InitFromConfig, url: str, ranks: Ranks) -> Report:
    """From the newest checkpoint of a run folder, or the one at `url`. Each rank reads and verifies what it needs."""
    folder, _, last = url.rpartition("/")
    one = NAME.fullmatch(last) is not None
    manager = CheckpointManager(
        folder if one else f"{url}/{CHECKPOINTS}",
        keep_last=2, config_digest=None, code_version="", process_group=ranks.group,
    )  # fmt: skip
    reports: list[Report] = []

    def choose(index: Index, where: str) -> dict[str, Tensor]:
        names = _names_in_checkpoint(index, config.weights)
        report = match(where, {n: index.tensors[names[n]].size for n in names}, _shapes(targets), config)
        reports.append(report)  # of a checkpoint that turns out to be damaged there may be one before
        return {names[name]: targets[name] for name in report.loaded}

    hold = ranks.on_rank_0(lambda: unique_hold("warm-start"))
    try:
        restored = manager.read(choose, path=url if one else None, hold=hold)
    except CorruptCheckpoint as e:  # the one that was asked for
        raise UserError(f"init_from.url: the checkpoint is damaged ({e}); give another") from e
    if restored is None:
        raise UserError(
            f"init_from.url: {config.url} holds neither checkpoints of a run nor safetensors; give a run folder, one of its "
            "checkpoints, a .safetensors file, or a folder that diffusers wrote"
        )
    return reports[-1]


def _names_in_checkpoint(index: Index, weights: str) -> dict[str, str]:
    """The model's names to the checkpoint's. The average is of parameters alone: buffers are the model's either way."""
    names = {name.removeprefix("model."): name for name in index.tensors if name.startswith("model.")}
    if weights == "average":
        names |= {name.removeprefix("ema."): name for name in index.tensors if name.startswith("ema.")}
    return names


# ------------------------------------------------------------------------------------------------------- from safetensors


def _from_safetensors(
    targets: Mapping[str, Tensor], module: nn.Module, config: InitFromConfig, url: str, ranks: Ranks, world: World
) -> Report:
    """Rank 0 reads; each tensor is sent to all, who keep their shards: no more than one is whole on a device at a time."""
    state: dict[str, Tensor] = {}

    def read() -> Report:
        source = SafetensorsSource(url)
        state.update(_in_our_names(source, module, targets, strict=config.strict))
        return match(url, _shapes(state), _shapes(targets), config)

    report = ranks.on_rank_0(read)
    for name in report.loaded:
        _spread(state.pop(name, None), targets[name], world)
    return report


def _in_our_names(
    source: SafetensorsSource, module: nn.Module, targets: Mapping[str, Tensor], *, strict: bool
) -> dict[str, Tensor]:
    state, denoiser = source.read(), getattr(module, "denoiser", None)
    if source.class_name == SD3 and isinstance(denoiser, MMDiT):
        assert isinstance(denoiser.config, MMDiTConfig)
        ours = sd3_state_to_mmdit(state, denoiser.config, strict=strict)
        return {f"denoiser.{name}": tensor for name, tensor in ours.items()}
    if source.class_name == DIT:
        state = dict(_without_copies(state))
    if source.class_name in AUTOENCODERS:
        state = {current_name(name): tensor for name, tensor in state.items()}
    prefix = max(PREFIXES, key=lambda prefix: sum(prefix + name in targets for name in state))
    return {prefix + name: tensor for name, tensor in state.items()}


def _without_copies(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """diffusers' DiT has the embedders of time and class in every block, all alike; ours has them once, beside `net`."""
    for name, tensor in state.items():
        block, _, embedded = name.partition(".norm1.emb.")
        if not embedded:
            yield f"denoiser.net.{name}", tensor
        elif block == "transformer_blocks.0":
            yield f"denoiser.embedder.{embedded}", tensor


@torch.no_grad()
def _spread(tensor: Tensor | None, target: Tensor, world: World) -> None:
    """Rank 0's whole tensor into `target` on every rank."""
    whole = torch.empty(target.shape, dtype=target.dtype, device=world.device)
    if tensor is not None:
        whole.copy_(tensor)
    dist.broadcast(whole, src=0)
    put(whole, target)
