"""What a run says of itself that an export may tell others: no credentials, no paths of this machine."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from data.reader import open_dataset, readable
from data.schema import DatasetInfo
from trainer.config import RunConfig, resolve_url
from trainer.errors import UserError, one_line, storage_errors
from trainer.run_folder import EVALUATIONS, SUMMARY, RunFolder
from trainer.secret_names import SECRET_NAMES, SECRET_VALUES
from trainer.urls import public_url

HIDDEN = "withheld"
_MOST_EVALUATIONS = 8
_OF_STEP = re.compile(r"step-(\d{8,15})-")
_OF_A_MACHINE = ("file", "local", "sftp", "ssh")
"""Schemes whose paths are some machine's own."""
_ABSOLUTE = re.compile(r"/|~|(?:file|local):/")
_IN_A_HOME = re.compile(r"(?<![\w/.:])(?:/(?:home|Users|root)/|~\w*/)[^\s'\",;:)]+")
"""Within a text: of URLs the path stays."""


@dataclass(frozen=True)
class Facts:
    config: RunConfig
    commit: str
    """Of the code that trained; empty where no start has said it."""
    losses: dict[str, float]
    """Of the last record of metrics up to the exported step."""
    losses_step: int
    """Of that record."""
    summary: dict[str, Any]
    """Empty where the run has not ended, or ended later."""
    evaluation: dict[str, Any]
    """The last up to the exported step, which it names; empty where there is none."""
    measured: tuple[dict[str, Any], ...]
    """What `loupe evaluate run` has recorded of the exported step, or of the last before it."""
    datasets: dict[str, DatasetInfo | str]
    """By name; a text where one cannot be read now, which says why."""


def facts_of(run: RunFolder, step: int) -> Facts:
    """
    Args:
        step: of what is exported: figures of later ones are not its own.

    Raises:
        UserError: the config, or a record, cannot be read.
    """
    try:
        return _facts_of(run, step)
    except storage_errors(ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{run.url}: a record of the run cannot be read ({one_line(e)}); mend it, or move it away"
        ) from None


def _facts_of(run: RunFolder, step: int) -> Facts:
    config, attempts = run.config(), run.names("attempts")
    code = _record(run, f"attempts/{attempts[-1]}").get("code") if attempts else None
    metrics, evaluation = _last(run.metrics(), step), _last(run.evaluations(), step)
    losses, summary = metrics.get("loss", {}), _record(run, SUMMARY) if run.exists(SUMMARY) else {}
    return Facts(
        config=config,
        commit=str(code.get("commit") or "") if isinstance(code, dict) else "",
        losses={name: float(value) for name, value in losses.items() if isinstance(value, int | float)},
        losses_step=metrics.get("step", 0),
        summary=summary if summary.get("steps") == step else {},
        evaluation=evaluation,
        measured=_measured(run, step),
        datasets={name: _dataset(name, config) for name in config.data.datasets},
    )


def _last(records: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Of records in order of steps, the last up to `step`."""
    return next((record for record in reversed(records) if record["step"] <= step), {})


def _measured(run: RunFolder, step: int) -> tuple[dict[str, Any], ...]:
    names = [name for name in run.names(EVALUATIONS) if (of := _OF_STEP.match(name)) and int(of[1]) <= step]
    last = [name for name in names if name.split("-")[1] == names[-1].split("-")[1]]
    return tuple(_record(run, f"{EVALUATIONS}/{name}") for name in last[-_MOST_EVALUATIONS:])


def _record(run: RunFolder, name: str) -> dict[str, Any]:
    tree = run.read_json(name)
    if not isinstance(tree, dict):
        raise UserError(f"{run.url}/{name}: not a JSON object; move it away")
    return tree


def _dataset(name: str, config: RunConfig) -> DatasetInfo | str:
    d = config.data.datasets[name]
    try:
        return open_dataset(
            resolve_url(d.url), name=name, max_samples=d.max_samples, cache_dir=config.data.cache_dir
        ).info
    except storage_errors(ValueError) as e:
        # its message may quote the URL
        return "not readable when this was exported" if not isinstance(e, FileNotFoundError) else "no longer there"


def captions_of(config: RunConfig, count: int) -> list[str]:
    """Prompts of the run's sample grids; else captions, or classes, spread over its first dataset.

    Raises:
        UserError: the dataset cannot be read.
    """
    if config.samples and config.samples.prompts:
        return list(config.samples.prompts)[:count]
    assert config.task.kind == "latent_diffusion"
    name, d = next(iter(config.data.datasets.items()))
    try:
        dataset = open_dataset(
            resolve_url(d.url), name=name, max_samples=d.max_samples, cache_dir=config.data.cache_dir
        )
        count = min(count, dataset.num_samples)
        samples = [readable(dataset, i * dataset.num_samples // count) for i in range(count)]
    except storage_errors(ValueError) as e:
        raise UserError(f"data.datasets.{name}: no captions can be read of it ({one_line(e)}); give --prompt") from None
    if config.task.text.kind == "classes":
        return [str(sample.label) for sample in samples]
    return [sample.texts[0] if sample.texts else "" for sample in samples]


def public(tree: Any, name: str = "") -> Any:
    """A config as others may see it: of this machine's paths the last part, of URLs no user and no query, of secrets nothing.

    Args:
        name: of the field; what lies below one that is called like a secret is withheld, numbers aside, which are counts.
    """
    if isinstance(tree, Mapping):
        return {key: public(value, name if SECRET_NAMES.search(name) else str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [public(value, name) for value in tree]
    return public_text(tree, name) if isinstance(tree, str) else tree


def public_text(text: str, name: str = "") -> str:
    if text and SECRET_NAMES.search(name):
        return HIDDEN
    if "://" in text:
        try:
            text = "::".join(_public_link(link) for link in public_url(text).split("::"))
        except UserError:
            return HIDDEN
    elif _ABSOLUTE.match(text):
        return os.path.basename(text.rstrip("/"))
    text = _IN_A_HOME.sub(lambda found: os.path.basename(found[0].rstrip("/")), text)
    return HIDDEN if SECRET_VALUES.search(text) else text


def _public_link(link: str) -> str:
    """Of fsspec's chains, of which each may be a path or have a user."""
    parts = urlsplit(link)
    if parts.scheme in _OF_A_MACHINE or _ABSOLUTE.match(link):
        return os.path.basename(parts.path.rstrip("/"))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if "://" in link else link
