"""`loupe evaluate images`: a set of generated images against a set of real ones."""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError, one_line
from trainer.evaluate import codec_report
from trainer.evaluate.features.networks import LoadedNetwork
from trainer.evaluate.features.preprocess import RESIZES, Resize
from trainer.evaluate.image_measures import (
    CLIP_S,
    DEFAULT,
    METRICS,
    OF_CLIP,
    OF_NETWORKS,
    OF_SPECTRUM,
    Comparison,
    Figure,
)
from trainer.evaluate.image_pictures import nearest_rows, neighbours_grid, spectrum_plot
from trainer.evaluate.image_sets import ImageSet, Selection
from trainer.evaluate.judged_sets import DECODERS, Judged, Judging, described
from trainer.evaluate.judges import Judge, NetworkJudge, PixelJudge, PromptJudge
from trainer.evaluate.metrics import log_power
from trainer.models.text_files import cache_folder

FORMAT = 1
NUMBERS, SPECTRUM, NEAREST = "evaluation.json", "spectrum.png", "nearest.png"
FILES = (NUMBERS, SPECTRUM, NEAREST)
_LIMIT = 64 << 20
"""Largest evaluation.json that is read."""
ROWS_FOLDER = "rows"
"""Of the generated images, below --out: other metrics of the same images do not need the networks again."""


@dataclass(frozen=True)
class Settings:
    """They go into the report, so the same settings repeat it."""

    size: int
    """Side at which all images are compared, in pixels."""
    resize: Resize = "training"
    metrics: tuple[str, ...] = ()
    """Absent: all that can be had."""
    count: int | None = None
    """Generated images; absent: all. The commands write how many are taken."""
    reference_count: int | None = None
    """Real images, in the same way."""
    seed: int = 0
    """Chooses images where not all are taken, and draws resamples."""
    batch_size: int = 32
    resamples: int = 1000
    allow_few: bool = False

    def chosen(self, networks: Sequence[str], *, has_prompts: bool) -> tuple[str, ...]:
        """The metrics that are computed.

        Raises:
            UserError: one cannot be had.
        """
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(f"--metrics: {unknown[0]} is none; take {', '.join(METRICS)}")
        lacking: dict[str, str] = {}
        if not networks:
            lacking |= dict.fromkeys(OF_NETWORKS, "a --network")
        if "clip" not in networks:
            lacking |= dict.fromkeys(OF_CLIP, "--network clip=FOLDER")
        elif not has_prompts:
            lacking["clip_score"] = "prompts, as a folder of `loupe sample` has them"
        for name in self.metrics:
            if name in lacking:
                raise UserError(f"--metrics: {name} needs {lacking[name]}")
        return self.metrics or tuple(name for name in DEFAULT if name not in lacking)


@dataclass
class Evaluation:
    numbers: dict[str, Any]
    draw: Callable[[], dict[str, bytes]]

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """File name to PNG."""
        return self.draw()

    @property
    def figures(self) -> dict[str, Figure]:
        found: dict[str, Figure] = self.numbers["figures"]
        return found


def evaluate_images(
    generated: ImageSet,
    real: ImageSet,
    settings: Settings,
    networks: Sequence[LoadedNetwork],
    judging: Judging,
    *,
    out: Path,
    cache: Path,
    more: Mapping[str, Any] | None = None,
) -> Evaluation | None:
    """On rank 0; None on others, which only share the images.

    Args:
        cache: of the rows of real images, for all evaluations.
        more: into the numbers.

    Raises:
        UserError: too few images for a metric, features that are not finite, or images that cannot be read.
        Stopped: on all ranks.
    """
    names = [network.name for network in networks]
    metrics = settings.chosen(names, has_prompts=generated.prompt(0) is not None)
    started = time.monotonic()
    selections = (
        selection(generated, settings, settings.count),
        selection(real, settings, settings.reference_count),
    )
    of_real = judging.judged(selections[1], judges_of_real(networks), cache, "real")
    of_generated = judging.judged(selections[0], judges_of_generated(networks, metrics), out / ROWS_FOLDER, "generated")
    judged_s = time.monotonic() - started

    if judging.ranks.rank:  # the figures are of one rank alone: the others leave, and wait for nothing
        return None
    done = itertools.count()

    def advance(what: str) -> None:
        number = next(done)
        judging.progress(f"computing {what}", number, number + 1)

    numbers = {
        **numbers_of(of_generated, of_real, (generated.about(), real.about()), settings, networks, metrics, advance),
        "seconds": {"judging": round(judged_s, 1), "in_all": round(time.monotonic() - started, 1)},
        "ranks": judging.ranks.world_size,
        **provenance_of(judging.device),
        **(more or {}),
    }
    return Evaluation(finite(numbers), lambda: pictures_of(of_generated, of_real, selections, names))


def judges_of_real(networks: Sequence[LoadedNetwork]) -> list[Judge]:
    return [PixelJudge(), *map(NetworkJudge, networks)]


def judges_of_generated(networks: Sequence[LoadedNetwork], metrics: Sequence[str]) -> list[Judge]:
    prompts = [PromptJudge(network) for network in networks if network.name == "clip" and "clip_score" in metrics]
    return [*judges_of_real(networks), *prompts]


def numbers_of(
    generated: Mapping[str, Judged],
    real: Mapping[str, Judged],
    abouts: tuple[Mapping[str, Any], Mapping[str, Any]],
    settings: Settings,
    networks: Sequence[LoadedNetwork],
    metrics: Sequence[str],
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """All but who has measured it, and how long that took.

    Args:
        generated, real: as `Comparison` takes them.
        abouts: of both sets, as `ImageSet.about`.
        metrics: as `Settings.chosen`.

    Raises:
        UserError: as `Comparison.figures`.
    """
    comparison = Comparison(
        generated, real, [network.name for network in networks], settings.resamples, settings.seed, settings.allow_few, advance
    )  # fmt: skip
    figures = comparison.figures(metrics)
    sets = {
        name: described(about, settings.size, judged["pixels"])
        for name, about, judged in zip(("generated", "real"), abouts, (generated, real), strict=True)
    }
    return {
        "format": FORMAT,
        "kind": "images",
        "figures": figures,
        "log_power": {
            name: log_power(judged["pixels"].rows["power"]).tolist()
            for name, judged in (("generated", generated), ("real", real))
        },
        **sets,
        "networks": [
            {**network.numbers(), "weights": network.weights.url if network.weights else None} for network in networks
        ],
        "settings": asdict(settings),
        "definition": definition(sets, networks, metrics),
        "warnings": warnings_of(sets, settings, figures),
        "reference": {
            name: {"folder": str(j.folder), "was_there": j.was_there, "made": j.provenance["made"]}
            for name, j in real.items()
        },
        "meaning": meaning(figures, settings),
    }


def definition(sets: Mapping[str, Any], networks: Sequence[LoadedNetwork], metrics: Sequence[str]) -> str:
    """A digest of all that decides figures but the generated images: two models are compared by figures of one definition,
    and of as many images."""
    # of the real ones: their content, size and resize
    decides = {
        "real": sets["real"]["identity"],
        "count": sets["generated"]["used"],
        "networks": [network.numbers() for network in networks],
        "metrics": {name: METRICS[name] for name in sorted(metrics)},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def provenance_of(device: torch.device) -> dict[str, Any]:
    found = codec_report.provenance(device)
    names = (*DECODERS, "transformers", "safetensors", "scipy")
    return {**found, "versions": {**found["versions"], **{name: version(name) for name in names}}}


def warnings_of(sets: Mapping[str, Any], settings: Settings, figures: Mapping[str, Figure]) -> list[str]:
    """What makes figures doubtful."""
    found = []
    generated, real = sets["generated"], sets["real"]
    used = generated["used"]
    if lossy := generated["formats"]["jpeg"]:
        found.append(f"{lossy} of {used} generated images are JPEG, which moves FID by itself; write PNG")
    for name, one in sets.items():
        if one["num_sizes"] > 1:
            common = ", ".join(f"{size} ({n})" for size, n in list(one["sizes"].items())[:3])
            found.append(
                f"{name} images have {one['num_sizes']} sizes ({common}); all are compared at {settings.size} px"
            )
        if one["enlarged"]:
            found.append(f"{one['enlarged']} of {one['used']} {name} images were enlarged to {settings.size} px")
        if one["skipped"]["count"]:
            reasons = ", ".join(f"{reason} {n}" for reason, n in one["skipped"]["reasons"].items())
            lacking = one["identity"]["target"] - one["used"]
            instead = f"others took the place of {one['replaced']}, and " if one["replaced"] else ""
            ending = (
                f"{instead}{one['used']} of {one['identity']['target']} are left"
                if lacking
                else "others took their place"
            )
            found.append(f"{_count(one['skipped']['count'], f'{name} image')} cannot be read ({reasons}); {ending}")
        if one["flat"]:
            found.append(f"{one['flat']} of {one['used']} {name} images are of one colour")
    if generated["grey"] / used > real["grey"] / real["used"] + 0.02:
        found.append(
            f"{generated['grey']} of {used} generated images are grey, and {real['grey']} of {real['used']} real ones"
        )
    if any(generated["identity"].get(kind) == real["identity"].get(kind, "") for kind in ("files", "dataset")):
        found.append("both sets are the same images")
    cut = figures.get("clip_score", {}).get("prompts_cut", 0)
    if cut:
        found.append(f"{cut} of {used} prompts are longer than CLIP takes, and are cut")
    for name, figure in figures.items():
        if figure.get("bias", 0.0) > 0.1 * abs(figure["value"]):
            found.append(f"{name}: about {figure['bias']:.3g} of {figure['value']:.4g} is the bias of so few images; compare "
                         "equal counts alone")  # fmt: skip
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def more_than_there(option: str, asked: int | None, there: int, images: str) -> list[str]:
    """A line where more are asked for than there are.

    Args:
        images: their URL.
    """
    if asked is None or asked <= there:
        return []
    return [f"{option} {asked}: {images} has {_count(there, 'image')}, and all of them are taken"]


def meaning(figures: Mapping[str, Figure], settings: Settings) -> dict[str, str]:
    used = {figure["metric"] for figure in figures.values()}
    return {
        "figures": "by name; those of networks other than FID's Inception have its name behind: fd_dinov2, kd_dinov2, ...",
        **{name: text for name, text in {**METRICS, "clip_s": CLIP_S}.items() if name in used},
        **{name: text for name, text in OF_SPECTRUM.items() if name in figures},
        "log_power": "log10 power of luminance by radius, 1, 2, ... cycles an image",
        "interval": "over other draws of as many images; the bias of the count is not in it",
        "bias": "what the distance of as many images of one and the same distribution would be, to first order",
        "resize": RESIZES[settings.resize],
        "definition": "equal for figures that may be compared",
    }


def finite(value: Any) -> Any:
    """Fit for JSON, with all digits: null for what is not finite."""
    match value:
        case Mapping():
            return {str(key): finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case bool() | int() | str() | None:
            return value
    number = float(value)
    return number if math.isfinite(number) else None


def pictures_of(
    generated: Mapping[str, Judged], real: Mapping[str, Judged], selections: tuple[Selection, Selection],
    networks: Sequence[str],
) -> dict[str, bytes]:  # fmt: skip
    pictures = {
        SPECTRUM: spectrum_plot(generated["pixels"].rows["power"], real["pixels"].rows["power"], name="generated")
    }
    if networks:
        made, truth = generated[networks[0]], real[networks[0]]
        rows, nearest = nearest_rows(made.features, truth.features)

        def pixels(which: int, judged: Judged, row: int) -> Any:
            chosen = selections[which]
            return chosen.images.picture(int(judged.rows["index"][row]), chosen.size, chosen.resize).pixels_HWC

        shown = [
            (pixels(0, made, row), [pixels(1, truth, near) for near in nearest[i].tolist()])
            for i, row in enumerate(rows.tolist())
        ]
        pictures[NEAREST] = neighbours_grid(shown, network=networks[0])
    return pictures


def cache_of(given: str | None) -> Path:
    """Where rows of real images are kept.

    Raises:
        UserError: no local folder.
    """
    if given is None:
        return cache_folder("--cache") / "evaluations"
    if "://" in given:
        raise UserError(f"--cache: {given} is no local folder; all ranks have to see it")
    return Path(given)


def claim(out: str, *, overwrite: bool, dry_run: bool = False) -> Path:
    """`codec_report.claim` of an evaluation. One that was killed goes on, and `finished` looks at one that is there."""
    return codec_report.claim(out, (), overwrite=overwrite, dry_run=dry_run)


def finished(
    folder: Path, generated: ImageSet, real: ImageSet, settings: Settings, networks: Sequence[LoadedNetwork]
) -> Evaluation | None:
    """The evaluation that is there, where it is the one that is asked for; None: there is none.

    Raises:
        UserError: it is another one, or damaged.
    """
    path = folder / NUMBERS
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(_LIMIT))
        there = {
            "generated images": tree["generated"]["identity"],
            "real images": tree["real"]["identity"],
            "networks": [{key: one[key] for key in one if key != "weights"} for one in tree["networks"]],
            **tree["settings"],
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"--out: {path} cannot be read ({one_line(e)}); give another folder, or --overwrite") from None
    asked = {
        "generated images": selection(generated, settings, settings.count).identity,
        "real images": selection(real, settings, settings.reference_count).identity,
        "networks": [network.numbers() for network in networks],
        **asdict(settings),
    }
    asked = json.loads(json.dumps(asked))
    # how many are taken is in the images' identities
    free = {"batch_size", "count", "reference_count"}
    others = sorted(name for name in asked if name not in free and there.get(name) != asked[name])
    if others:
        raise UserError(f"--out: {folder} has an evaluation already, with other {', '.join(others)}; give another folder, or "
                        "--overwrite")  # fmt: skip
    return Evaluation(tree, lambda: {name: b"" for name in FILES if name != NUMBERS and (folder / name).exists()})


def selection(images: ImageSet, settings: Settings, count: int | None) -> Selection:
    return Selection(images, settings.size, settings.resize, count, settings.seed)


def write(folder: Path, found: Evaluation) -> None:
    """`codec_report.write` of an evaluation."""
    codec_report.write(folder, NUMBERS, found.numbers, found.pictures, FILES)
