"""Tiny text encoders with random weights and real tokenizers, written to a folder as their authors publish them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaModel
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel
from transformers.models.siglip.configuration_siglip import SiglipTextConfig
from transformers.models.siglip.modeling_siglip import SiglipTextModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from trainer.config import EncoderConfig, FrozenTextConfig

CAPTIONS = (
    "a photo of a red fox on fresh snow",
    "two dogs run along the beach at sunset",
    "An old lighthouse, painted in oil",
    "a bowl of ramen with a soft egg, seen from above",
    "portrait of a woman who laughs under a yellow umbrella",
)
"""What the tokenizers learn from."""
LAYERS = 3
POSITIONS = {"clip": 77, "siglip": 64, "gemma": 128}
GEMMAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gemma": (GemmaConfig, GemmaModel),
    "gemma2": (Gemma2Config, Gemma2Model),
    "gemma3_text": (Gemma3TextConfig, Gemma3TextModel),
}


def write_clip(
    folder: Path, *, width: int = 32, projection: int | None = None, as_json: bool = True, pad: str = "<|endoftext|>"
) -> EncoderConfig:
    """CLIP's text model, with its projection where `projection` gives the width; the tokenizer as `tokenizer.json`, or
    as `vocab.json` and `merges.txt` alone."""
    tokenizer = _clip_tokenizer(pad)
    _save_clip(tokenizer, folder / "tokenizer", as_json)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=POSITIONS["clip"], projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    _save(CLIPTextModelWithProjection if projection else CLIPTextModel, config, folder / "text_encoder")
    return _declared("clip", folder, width=width, pooled_width=projection or width)


def write_t5(folder: Path, *, width: int = 32, max_tokens: int = 24) -> EncoderConfig:
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"], end="</s>", pad="<pad>", lowercase=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = T5Config(
        vocab_size=len(tokenizer) + 3, d_model=width, d_kv=8, d_ff=2 * width, num_layers=LAYERS, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    _save(T5EncoderModel, config, folder / "text_encoder")
    return _declared("t5", folder, width=width, pooled_width=width, max_tokens=max_tokens)


def write_gemma(folder: Path, *, width: int = 32, model_type: str = "gemma2", max_tokens: int = 24) -> EncoderConfig:
    """Gemma, Gemma 2 or the text model of Gemma 3."""
    tokenizer = _gemma_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "head_dim": 16,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 2,
        "max_position_embeddings": POSITIONS["gemma"], "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if model_type != "gemma":
        sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 16}
    config, model = GEMMAS[model_type]
    _save(model, config(**sizes), folder / "text_encoder")
    return _declared("gemma", folder, width=width, pooled_width=width, max_tokens=max_tokens)


def write_siglip(folder: Path, *, width: int = 32, pooled_width: int = 24) -> EncoderConfig:
    tokenizer = _unigram(["</s>", "<unk>"], end="</s>", pad="</s>", lowercase=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = SiglipTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=POSITIONS["siglip"], projection_size=pooled_width,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    _save(SiglipTextModel, config, folder / "text_encoder")
    return _declared("siglip", folder, width=width, pooled_width=pooled_width, max_tokens=POSITIONS["siglip"])


def write_sd3(
    root: Path, *, clip_l: int = 16, clip_g: int = 32, t5: int = 64, t5_tokens: int = 24, cache_mib: int = 0
) -> FrozenTextConfig:
    """Three encoders in the layout of Stable Diffusion 3's diffusers pipeline, and how SD3 joins them."""
    for number, width, pad in (("", clip_l, "<|endoftext|>"), ("_2", clip_g, "!")):
        write_clip(root / "new", width=width, projection=width, pad=pad, as_json=False)
        _move(root, number)
    write_t5(root / "new", width=t5)
    _move(root, "_3")

    def part(number: str, family: str, width: int, **more: Any) -> EncoderConfig:
        return EncoderConfig(
            family=family, url=str(root), width=width, weights_folder=f"text_encoder{number}",
            tokenizer_folder=f"tokenizer{number}", null_text="zeros", dropout=0.464, **more,
        )  # fmt: skip

    return FrozenTextConfig(
        encoders=(
            part("", "clip", clip_l, pooled_width=clip_l, hidden_state=-2),
            part("_2", "clip", clip_g, pooled_width=clip_g, hidden_state=-2, join="channels"),
            part("_3", "t5", t5, max_tokens=t5_tokens),
        ),
        cache_mib=cache_mib,
    )


WRITERS: dict[str, Callable[[Path], EncoderConfig]] = {
    "clip": write_clip, "t5": write_t5, "gemma": write_gemma, "siglip": write_siglip,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- helpers


def _declared(family: Any, folder: Path, **fields: Any) -> EncoderConfig:
    return EncoderConfig(
        family=family, url=str(folder), weights_folder="text_encoder", tokenizer_folder="tokenizer", **fields
    )


def _move(root: Path, number: str) -> None:
    for name in ("text_encoder", "tokenizer"):
        (root / "new" / name).rename(root / f"{name}{number}")
    (root / "new").rmdir()


def _save(model: Callable[..., Any], config: Any, folder: Path) -> None:
    """Weights of the size that trained ones have: at the usual 0.02 the layers would hardly matter."""
    torch.manual_seed(config.hidden_size)
    module = model(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    module.save_pretrained(folder)


def _clip_tokenizer(pad: str) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's special tokens, which have the highest numbers."""
    blank = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    letters = [letter for byte in pre_tokenizers.ByteLevel.alphabet() for letter in (byte, byte + "</w>")]
    learner.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=sorted(letters), show_progress=False,
        ),
    )  # fmt: skip
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = dict(learned["vocab"])
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    merges: list[Any] = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad)


def _save_clip(tokenizer: CLIPTokenizer, folder: Path, as_json: bool) -> None:
    tokenizer.save_pretrained(folder)
    if as_json:
        return
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _unigram(special: list[str], *, end: str, pad: str, lowercase: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram with an end token, as T5's and SigLIP's; SigLIP drops case and punctuation."""
    tokenizer = Tokenizer(models.Unigram())
    if lowercase:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Strip()]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CAPTIONS,
        trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    ending = (end, tokenizer.token_to_id(end))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[ending])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, unk_token="<unk>")


def _gemma_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over text whose spaces are ▁, behind a begin token; padded on the left unless told otherwise, as Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
