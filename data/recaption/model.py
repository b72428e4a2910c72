"""Florence-2's files: a local folder or, where that is allowed, a model hub's; loaded without running any code of theirs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError, one_line

_FILES = ("*.safetensors", "*.json", "*.txt")
"""What is fetched from a hub. Pickled weights are never loaded."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


NEW_TOKENS = 256
"""Of a caption, unless told otherwise."""


@dataclass(frozen=True)
class ModelFiles:
    folder: Path
    name: str
    """The hub's id, or the folder's name."""
    revision: str
    """SHA-256 over names and contents of all files that decide what the model says."""


def find_model(model: str, *, hub_revision: str | None = None, allow_download: bool = False) -> ModelFiles:
    """
    Args:
        model: a folder, or a model hub's id.
        hub_revision: of an id; absent: the hub's newest.
        allow_download: an id that is not in the local cache may be fetched.

    Raises:
        UserError: it is not there, or is no Florence-2 in safetensors.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if hub_revision:
            raise UserError(f"--revision {hub_revision}: {model} is a folder; a revision is of a model hub's id")
        return ModelFiles(folder.resolve(), folder.resolve().name, _revision(folder))
    if folder.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise UserError(f"--model {model}: no such folder; give one, or a model hub's id such as owner/name")
    folder = _from_hub(model, hub_revision, allow_download)
    return ModelFiles(folder, model, _revision(folder))


def _from_hub(model: str, hub_revision: str | None, allow_download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=hub_revision, allow_patterns=list(_FILES), local_files_only=not allow_download
            )
        )
    except LocalEntryNotFoundError:
        if allow_download:
            raise UserError(f"--model {model}: the model hub does not answer; give a local folder") from None
        raise UserError(
            f"--model {model}: no such folder, and not in the local cache; add --allow-download to fetch it"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(f"--model {model}: cannot be fetched ({one_line(e)})") from None


def _revision(folder: Path) -> str:
    files = sorted({path for pattern in _FILES for path in folder.glob(pattern)}, key=lambda path: path.name)
    if not any(path.suffix == ".safetensors" for path in files) or not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: has no config.json or no *.safetensors; save the model with save_pretrained"
        )
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def choose_device(device: str) -> str:
    """`auto` as what there is.

    Raises:
        UserError: CUDA is asked for, and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible; use --device cpu, or ask the cluster for one")
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """`auto`: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slower."""
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    return dtype


def choose_new_tokens(asked: int | None, folder: Path) -> int:
    """The longest caption, in tokens; absent: `NEW_TOKENS`, or what the model has positions for where those are fewer.

    Raises:
        UserError: more than the model has positions for, or it is no Florence-2.
    """
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.Florence2Config.from_pretrained(folder, local_files_only=True)
        limit = max_new_tokens(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise _no_florence(folder, e) from e
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    check_new_tokens(asked or 0, limit)
    return min(NEW_TOKENS, limit) if asked is None else asked


def max_new_tokens(config: Any) -> int:
    """Of a Florence2Config: tokens behind the first, which the model is given."""
    return int(config.text_config.max_position_embeddings) - 1


def check_new_tokens(asked: int, limit: int) -> None:
    if asked > limit:
        raise UserError(f"--max-new-tokens {asked}: the model has positions for {limit}; ask for as many at most")


def _no_florence(folder: Path, e: Exception) -> UserError:
    return UserError(
        f"--model {folder}: not a Florence-2 of transformers' own format ({one_line(e)}); convert it, or take "
        "florence-community's"
    )


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """`Florence2ForConditionalGeneration` and its processor, from a local folder.

    Raises:
        UserError: the folder holds another model, or weights are missing.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    kind: Any = Florence2ForConditionalGeneration
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it tells at each loading that torchvision is not there
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=_DTYPES[dtype], output_loading_info=True
        )
        processor = Florence2Processor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as e:
        raise _no_florence(folder, e) from e
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    missing: Sequence[str] = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"--model {folder}: {len(missing)} weights are missing, such as {missing[0]}; it is not whole")
    return model.to(device).eval().requires_grad_(False), processor
