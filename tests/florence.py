"""A tiny Florence-2 that writes captions of all lengths. That of ../shared, as it is, ends each before its first word."""

import json
import shutil
from pathlib import Path

import torch

ENDS_EVERY = 25
"""Of that many tokens one ends a caption, so captions have about as many."""
SPREAD = 8.0
"""Of the weights, in their own: with less, captions hardly depend on the image."""


def write_chatty_model(shared_dir: Path, folder: Path) -> Path:
    """`florence2_tiny_scratch` with wilder weights. What it writes is nonsense, but differs from image to image."""
    from transformers import Florence2ForConditionalGeneration

    shutil.copytree(shared_dir / "data/florence2_tiny_scratch", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    model = Florence2ForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std() * SPREAD)
    model.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    config |= {"no_repeat_ngram_size": 2, "eos_token_id": [2, *range(9, vocabulary, ENDS_EVERY)]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder
