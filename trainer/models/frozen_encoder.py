"""One frozen text encoder of transformers with its tokenizer: CLIP, T5, Gemma or SigLIP.

B captions, L tokens, T and P channels of token states and of the pooled output.

How padding is kept out of real tokens, which differs by how each family was trained:
    clip, gemma  causal: a real token sees none of the padding behind it. They run without an attention mask, as Stable
                 Diffusion runs CLIP. CLIP's pooled output is the state of the first end token.
    t5           sees all tokens both ways, so it is given the mask. (Stable Diffusion 3 runs it without.)
    siglip       sees all tokens both ways and was trained without a mask on captions padded to all its positions. It
                 always runs so, and pools by its own head at the last position; `max_tokens` cuts captions and states.
Every caption is padded to the same length, so its states do not depend on the captions beside it. States at padding are
kept for CLIP and SigLIP, whose denoisers have used them, and are zero for T5 and Gemma.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.gemma.modeling_gemma import GemmaModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel
from transformers.models.siglip.modeling_siglip import SiglipTextModel
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils.logging import disable_progress_bar

from trainer.config import EncoderConfig
from trainer.errors import UserError, one_line
from trainer.models.text_files import EncoderFiles, encoder_files

MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "clip": ("clip_text_model", "clip"),
    "t5": ("t5",),
    "gemma": ("gemma", "gemma2", "gemma3_text", "gemma3"),
    "siglip": ("siglip_text_model", "siglip"),
}
"""`model_type` in config.json, of the text model alone or of the whole model that holds it."""
CLASSES: dict[str, type[PreTrainedModel]] = {
    "clip_text_model": CLIPTextModel,
    "t5": T5EncoderModel,
    "gemma": GemmaModel,
    "gemma2": Gemma2Model,
    "gemma3_text": Gemma3TextModel,
    "siglip_text_model": SiglipTextModel,
}
PROJECTION = "text_projection.weight"
NOT_TEXT = re.compile(r"(decoder|lm_head|vision_|visual_|multi_modal_|(model\.)?(vision_|multi_modal_)|logit_)")
"""Starts of names, in checkpoints of whole models, that are no part of the text encoder."""
NOT_ARCHITECTURE = ("auto_map", "transformers_weights", "fusion_config", "distributed_config", "attn_implementation",
                    "_attn_implementation", "_attn_implementation_internal", "output_attentions", "output_hidden_states",
                    "return_dict", "use_return_dict", "torchscript")  # fmt: skip
"""Fields of config.json that say how to load or run a model, which is not the file's to decide."""
LEGACY_CLIP_EOS = 2
"""CLIP configs from before 2023 name a wrong end token; transformers then takes the highest id of a caption."""


@dataclass(frozen=True)
class Tokens:
    """Captions of one encoder, padded to its `max_tokens`."""

    ids_BL: Tensor
    mask_BL: Tensor
    """True at real tokens, special ones included."""
    cut: tuple[bool, ...]
    """Which captions were longer."""


class FrozenEncoder(nn.Module):
    """An encoder and its tokenizer, as `load_encoder` makes it."""

    def __init__(self, config: EncoderConfig, model: PreTrainedModel, tokenizer: TokenizersBackend) -> None:
        super().__init__()
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.zero_padding = config.family in ("t5", "gemma") and config.padding == "masked"
        positions = model.config.max_position_embeddings if config.family == "siglip" else config.max_tokens
        self._padding = (0, positions - config.max_tokens)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions longer than `max_tokens` lose their end, and keep the end token where the tokenizer writes one."""
        batch = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.config.max_tokens,
            padding_side="right", return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        cut = tuple(bool(encoding.overflowing) for encoding in batch.encodings)
        return Tokens(batch["input_ids"], batch["attention_mask"].bool(), cut)

    @torch.no_grad()
    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """States (B, L, T) and, where it is used, the pooled output (B, P), in the model's dtype."""
        config = self.config
        # As 4-D, for with a 2-D mask transformers asks the device whether it masks anything, and waits.
        is_masked = config.family == "t5" and config.padding == "masked"
        attention = mask_BL[:, None, None, :] if is_masked else None
        wanted = [config.hidden_state] if config.hidden_state < -1 else False
        with torch.autocast(ids_BL.device.type, enabled=False):
            out: Any = self.model(
                input_ids=pad(ids_BL, self._padding, value=self.tokenizer.pad_token_id),
                attention_mask=attention,
                output_hidden_states=wanted,
            )
        states_BLT: Tensor = out.hidden_states[config.hidden_state] if wanted else out.last_hidden_state
        states_BLT = states_BLT[:, : ids_BL.shape[1]]
        real_BLT = states_BLT * mask_BL[..., None]
        if self.zero_padding:
            states_BLT = real_BLT
        if config.pooled_width is None:
            return states_BLT, None
        if config.family in ("clip", "siglip"):
            return states_BLT, out.text_embeds if "text_embeds" in out else out.pooler_output
        mean_BT = real_BLT.float().sum(1) / mask_BL.sum(1, keepdim=True)
        return states_BLT, mean_BT.to(states_BLT.dtype)


# -------------------------------------------------------------------------------------------------------------- loading


def load_encoder(config: EncoderConfig, field: str, dtype: torch.dtype) -> FrozenEncoder:
    """Read an encoder from its folder, onto the CPU, without gradients and in eval mode.

    Args:
        field: name of the encoder's section, such as `task.text.encoders.0`.

    Raises:
        UserError: files are missing or damaged, of another family, or not what the config declares.
    """
    files = encoder_files(config, field)
    architecture = _architecture(config, field, files)
    weights = _read_weights(config, field, files)
    cls = _check_declared(config, field, files, architecture, weights)
    tokenizer = _load_tokenizer(field, files, architecture)
    disable_progress_bar()  # one a process and encoder, in logs
    try:
        # From tensors, not from the folder: transformers then reads no other file, neither adapters nor pickles.
        loaded: Any = cls.from_pretrained(
            None, config=architecture, state_dict=weights, dtype=dtype, local_files_only=True,
            trust_remote_code=False, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{field}.url: {files.where}: the weights do not fit config.json ({one_line(e)})") from None
    model, info = loaded
    # Of both, transformers would leave the parameters at random values.
    for name, has, wants in info["mismatched_keys"]:
        raise UserError(f"{field}.url: {files.where}: {name} has shape {tuple(has)}, config.json says {tuple(wants)}; not "
                        "the weights of the config beside them")  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{field}.url: {files.where}: the weights lack {missing[0]} ({len(missing)} such); not those of "
                        "the config.json beside them")  # fmt: skip
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{field}.url: {files.where}: {name} holds values that are not finite; copy or convert the "
                            "weights again")  # fmt: skip
    return FrozenEncoder(config, model.requires_grad_(False).eval(), tokenizer)


def _architecture(config: EncoderConfig, field: str, files: EncoderFiles) -> PreTrainedConfig:
    """The text model's config, where the file is of the family that is declared."""
    raw = {key: value for key, value in files.config.items() if key not in NOT_ARCHITECTURE}
    model_type, allowed = raw.pop("model_type", None), MODEL_TYPES[config.family]
    if model_type not in allowed:
        raise UserError(f"{field}.family: {config.family}, but the encoder at {files.where} has model_type "
                        f"{model_type!r}; {config.family} takes {' or '.join(allowed)}")  # fmt: skip
    if raw.get("quantization_config") is not None:
        raise UserError(f"{field}.url: {files.where}: its weights are quantised; give the encoder in bf16 or float32")
    try:
        whole = CONFIG_MAPPING[model_type].from_dict(raw)
        text: PreTrainedConfig = whole.get_text_config() if model_type != "t5" else whole
    except Exception as e:  # transformers raises whatever a foreign value runs into
        raise UserError(f"{field}.url: {files.where}: not a valid {model_type} config ({one_line(e)})") from None
    if getattr(text, "use_bidirectional_attention", False):
        raise UserError(f"{field}.url: {files.where}: use_bidirectional_attention: such a Gemma would see its padding; "
                        "give a causal one")  # fmt: skip
    text.use_cache = False
    return text


def _read_weights(config: EncoderConfig, field: str, files: EncoderFiles) -> dict[str, Tensor]:
    """Tensors of the text encoder, mapped from the files: only what the model takes comes into memory."""
    weights: dict[str, Tensor] = {}
    for path in files.weights:
        try:
            weights |= safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{field}.url: {path}: not a whole safetensors file ({one_line(e)}); copy it again"
            ) from None
    if config.family == "gemma":  # Gemma 3 with images holds its text model under this name, or under both
        weights = {re.sub(r"^(model\.)?language_model\.", "", name): weight for name, weight in weights.items()}
    return {
        name: weight
        for name, weight in weights.items()
        if not NOT_TEXT.match(name) and not name.endswith("position_ids")
    }


def _check_declared(
    config: EncoderConfig, field: str, files: EncoderFiles, architecture: PreTrainedConfig, weights: dict[str, Tensor]
) -> type[PreTrainedModel]:
    """Compare what is declared with the files; the class that gives it."""
    cls = CLASSES[architecture.model_type]
    wrong: list[str] = []

    def compare(name: str, given: object, fits: bool, has: str) -> None:
        if not fits:
            wrong.append(f"{field}.{name}: {given}, but the encoder at {files.where} has {has}")

    width, positions = architecture.hidden_size, getattr(architecture, "max_position_embeddings", None)
    compare("width", config.width, config.width == width, str(width))
    if config.pooled_width is not None:
        pooled = {width}
        if config.family == "clip" and PROJECTION in weights:
            pooled = {architecture.projection_dim, width}
            if config.pooled_width == architecture.projection_dim:
                cls = CLIPTextModelWithProjection
        elif config.family == "siglip":
            pooled = {architecture.projection_size}
        compare(
            "pooled_width", config.pooled_width, config.pooled_width in pooled, " or ".join(map(str, sorted(pooled)))
        )
    if cls is not CLIPTextModelWithProjection:
        weights.pop(PROJECTION, None)
    if positions is not None:
        compare("max_tokens", config.max_tokens, config.max_tokens <= positions, f"{positions} positions")
    layers = architecture.num_hidden_layers
    compare("hidden_state", config.hidden_state, -config.hidden_state <= layers + 1, f"{layers} layers")
    if wrong:
        raise UserError("; ".join(wrong) + "; declare what it has, or give another encoder's url")
    return cls


def _load_tokenizer(field: str, files: EncoderFiles, architecture: PreTrainedConfig) -> TokenizersBackend:
    """`tokenizer.json` as it is; transformers' class for CLIP where there are only its vocabulary and merges."""
    cls = TokenizersBackend if files.has_fast_tokenizer else CLIPTokenizer
    folder, name = str(files.tokenizer), f"{field}.tokenizer_folder"
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the tokenizers library raises plain Exception
        raise UserError(f"{name}: {folder}: the tokenizer cannot be read ({one_line(e)}); copy it again") from None
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{name}: {folder}: its tokenizer_config.json names no pad_token; name the one it was trained with"
        )
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(f"{name}: {folder} has {len(tokenizer)} tokens, but the encoder at {files.where} "
                        f"{architecture.vocab_size}; give the encoder's own tokenizer")  # fmt: skip
    of_nothing: list[int] = tokenizer("")["input_ids"]
    if not of_nothing:
        raise UserError(
            f"{name}: {folder}: gives the empty caption no token; give a tokenizer that adds special tokens"
        )
    end = architecture.eos_token_id
    if architecture.model_type == "clip_text_model" and end != LEGACY_CLIP_EOS and end not in of_nothing:
        raise UserError(f"{name}: {folder} ends captions with {of_nothing[-1]}, but the encoder at {files.where} pools at "
                        f"eos_token_id {end}; give the encoder's own tokenizer")  # fmt: skip
    return tokenizer
