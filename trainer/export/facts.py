"""What a run says of itself that an export may tell others: no credentials, no paths of this machine."""

import os
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

HIDDEN = "withheld"
_MOST_EVALUATIONS = 8


@dataclass(frozen=True)
class Facts:
    config: RunConfig
    commit: str
    """Of the code that trained; empty where no start has said it."""
    losses: dict[str, float]
    """Of the newest record of metrics."""
    summary: dict[str, Any]
    """Empty while it has not ended."""
    evaluations: tuple[dict[str, Any], ...]
    """The newest last."""
    measured: tuple[dict[str, Any], ...]
    """What `loupe evaluate run` has recorded, the newest step last."""
    datasets: dict[str, DatasetInfo | str]
    """By name; a text where one cannot be read now, which says why."""


def facts_of(run: RunFolder) -> Facts:
    """
    Raises:
        UserError: the config cannot be read.
    """
    try:
        return _facts_of(run)
    except storage_errors(ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{run.url}: a record of the run cannot be read ({one_line(e)}); mend it, or move it away"
        ) from None


def _facts_of(run: RunFolder) -> Facts:
    config = run.config()
    attempts, metrics = run.names("attempts"), run.metrics()
    code = _record(run, f"attempts/{attempts[-1]}").get("code") if attempts else None
    losses = metrics[-1].get("loss", {}) if metrics else {}
    return Facts(
        config=config,
        commit=str(code.get("commit") or "") if isinstance(code, dict) else "",
        losses={name: float(value) for name, value in losses.items() if isinstance(value, int | float)},
        summary=_record(run, SUMMARY) if run.exists(SUMMARY) else {},
        evaluations=tuple(run.evaluations()),
        measured=tuple(_record(run, f"{EVALUATIONS}/{name}") for name in run.names(EVALUATIONS)[-_MOST_EVALUATIONS:]),
        datasets={name: _dataset(name, config) for name in config.data.datasets},
    )


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
    """A config as others may see it: of absolute paths the last part, of URLs no user and no query, of secrets nothing."""
    if isinstance(tree, Mapping):
        return {key: public(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [public(value, name) for value in tree]
    return public_text(tree, name) if isinstance(tree, str) else tree


def public_text(text: str, name: str = "") -> str:
    if SECRET_NAMES.search(name):
        return HIDDEN
    if "://" in text and not text.startswith("repo://"):
        try:
            parts = urlsplit(text)
        except ValueError:
            return HIDDEN
        if parts.scheme == "file":
            return os.path.basename(parts.path.rstrip("/"))
        if SECRET_VALUES.search(text) or parts.query:
            text = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    elif text.startswith(("/", "~")):
        return os.path.basename(text.rstrip("/"))
    return text
