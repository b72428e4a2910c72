"""Which weights a model draws with, and where they are. No torch."""

import os
from dataclasses import dataclass

from trainer.checkpoint.folder import NAME
from trainer.config import RunConfig
from trainer.errors import KEYS_MEND, UserError, one_line, storage_errors
from trainer.run_folder import CHECKPOINTS, CONFIG, RunFolder

EMA, RAW, POST_HOC = "ema", "raw", "ema:"


@dataclass(frozen=True)
class OpenedRun:
    url: str
    """Of the run folder."""
    checkpoint: str | None
    """URL of the one that was asked for; None: the newest that verifies."""
    config: RunConfig


def opened(source: str) -> OpenedRun:
    """
    Raises:
        UserError: neither a run folder nor a checkpoint of one.
    """
    url = source.rstrip("/")
    above, _, last = url.rpartition("/")
    checkpoint = url if NAME.fullmatch(last) else None
    if checkpoint is not None:
        folder, _, name = above.rpartition("/")
        # "checkpoints/step-..." of a run in this very folder has nothing before its first slash
        url = folder or "." if name == CHECKPOINTS else above
    try:
        run = RunFolder(url)
        if not run.exists(CONFIG):
            raise UserError(f"{source}: no run folder, and no checkpoint in one ({url}/{CONFIG} is missing); give a folder "
                            "such as runs/demo, or runs/demo/checkpoints/step-...")  # fmt: skip
        return OpenedRun(run.url, checkpoint, run.config())
    except UserError:
        raise
    except storage_errors(ValueError, ImportError) as e:
        raise UserError(f"{source}: cannot be read ({one_line(e)})" + f"; {KEYS_MEND}" * ("://" in url)) from None


def check_weights(weights: str) -> None:
    """Whether `--weights` has one of its forms.

    Raises:
        UserError: it has none; or the file is not there, where that is this machine's.
    """
    if weights in (EMA, RAW):
        return
    if weights.startswith(POST_HOC):
        post_hoc_of(weights, None)
    elif not weights.endswith(".safetensors"):
        raise UserError(f"--weights: {weights!r} is none of ema, raw, ema:SIGMA and the URL of a .safetensors file")
    elif "://" not in weights and not os.path.exists(weights):
        raise UserError(f"--weights: {weights} is not there; give ema, raw, ema:SIGMA or a .safetensors file")


def post_hoc_of(weights: str, checkpoint: str | None) -> tuple[float, int | None]:
    """(width, step) of ema:SIGMA, ema:SIGMA@STEP, or ema:SIGMA of a checkpoint; no step: the newest snapshot's.

    Raises:
        UserError: it is none of them.
    """
    width, at, step = weights.removeprefix(POST_HOC).partition("@")
    try:
        sigma_rel, asked = float(width), int(step) if at else None
    except ValueError:
        raise UserError(
            f"--weights: {weights!r}; give a relative width, as ema:0.08, or with a step, ema:0.08@5000"
        ) from None
    if asked is None and checkpoint is not None:
        match = NAME.fullmatch(checkpoint.rpartition("/")[2])
        assert match is not None
        asked = int(match[1])
    return sigma_rel, asked
