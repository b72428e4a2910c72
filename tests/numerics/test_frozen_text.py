"""Frozen text encoders: against diffusers, against transformers without padding, and against themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.siglip.modeling_siglip import SiglipTextModel
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from tests.text_models import CAPTIONS, WRITERS, write_clip, write_gemma, write_sd3
from trainer.config import FrozenTextConfig, replace
from trainer.models.frozen_encoder import load_encoder
from trainer.models.frozen_text import FrozenText, StateCache
from trainer.models.text_encoders import build_text_encoder

FAMILIES = [*WRITERS, "gemma1", "gemma3_text"]
SHORT, LONG = "a red fox", "two dogs and " * 60


def load(config, **changes):
    return load_encoder(replace(config, **changes), "task.text.encoders.0", torch.float32)


def encode(encoder, *captions):
    tokens = encoder.tokenize(captions)
    return (*encoder(tokens.ids_BL, tokens.mask_BL), tokens)


def text_of(*encoders):
    return FrozenText(FrozenTextConfig(encoders=encoders))


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """One encoder of each family, and what is declared of it."""
    root = tmp_path_factory.mktemp("encoders")
    found = {name: write(root / name) for name, write in WRITERS.items()}
    found["gemma1"] = write_gemma(root / "gemma1", model_type="gemma")
    found["gemma3_text"] = write_gemma(root / "gemma3", model_type="gemma3_text")
    return found


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3"))


def pipeline(config):
    """diffusers' own, on the same files."""
    root = config.encoders[0].url
    clips = [CLIPTextModelWithProjection.from_pretrained(f"{root}/text_encoder{n}") for n in ("", "_2")]
    tokenizers = [CLIPTokenizer.from_pretrained(f"{root}/tokenizer{n}", model_max_length=77) for n in ("", "_2")]
    build: Callable[..., Any] = StableDiffusion3Pipeline  # its types do not know that all parts but text may be None
    return build(
        transformer=None, scheduler=None, vae=None, text_encoder=clips[0], tokenizer=tokenizers[0],
        text_encoder_2=clips[1], tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel.from_pretrained(f"{root}/text_encoder_3"),
        tokenizer_3=T5Tokenizer.from_pretrained(f"{root}/tokenizer_3", extra_ids=0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- diffusers


@torch.no_grad()
def test_three_encoders_join_as_in_diffusers_sd3(sd3) -> None:
    """Captions that fill T5, so that it has no padding: the pipeline runs it without a mask, we do not. Of CLIP, whose
    captions are padded here, all 77 positions agree."""
    captions = ["an old lighthouse on the beach", "portrait of a Woman"]
    num_tokens = 8
    *clips, t5 = sd3.encoders
    text = build_text_encoder(replace(sd3, encoders=(*clips, replace(t5, max_tokens=num_tokens))))
    prepared = text.prepare(captions)
    condition = text(prepared)
    assert prepared.num_cut == 2
    states, _, pooled, _ = pipeline(sd3).encode_prompt(
        captions, captions, captions, device="cpu", do_classifier_free_guidance=False, max_sequence_length=num_tokens
    )
    assert states.shape == (2, 77 + num_tokens, 64)
    assert condition.mask_BL[:, 77:].all()
    assert not condition.mask_BL[:, :77].all(1).any()
    torch.testing.assert_close(condition.tokens_BLT, states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(condition.pooled_BP, pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_clip_with_padding_as_in_diffusers_and_t5_with_its_mask(sd3) -> None:
    text, reference = FrozenText(sd3), pipeline(sd3)
    condition = text(text.prepare(["a Fox", ""]))
    states, _, pooled, _ = reference.encode_prompt(
        ["a Fox", ""], None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=24
    )
    torch.testing.assert_close(condition.tokens_BLT[:, :77], states[:, :77], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(condition.pooled_BP, pooled, atol=1e-5, rtol=1e-5)
    batch = reference.tokenizer_3(["a Fox", ""], padding="max_length", max_length=24, return_tensors="pt")
    masked = reference.text_encoder_3(batch.input_ids, attention_mask=batch.attention_mask)[0]
    real = batch.attention_mask.bool()
    assert torch.equal(condition.mask_BL[:, 77:], real)
    torch.testing.assert_close(condition.tokens_BLT[:, 77:][real], masked[real], atol=1e-5, rtol=1e-5)
    assert (condition.tokens_BLT[:, 77:] - states[:, 77:])[real].abs().max() > 1e-3  # what the mask is for


@torch.no_grad()
def test_padding_that_is_seen_is_as_in_diffusers_sd3(sd3) -> None:
    seen = replace(sd3, encoders=tuple(replace(encoder, padding="seen") for encoder in sd3.encoders))
    text = FrozenText(replace(seen, cache_mib=1))
    states, _, pooled, _ = pipeline(sd3).encode_prompt(
        ["a Fox", ""], None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=24
    )
    for _ in range(2):  # the second time from the cache
        condition = text(text.prepare(["a Fox", ""]))
        torch.testing.assert_close(condition.tokens_BLT, states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(condition.pooled_BP, pooled, atol=1e-5, rtol=1e-5)
        assert condition.mask_BL.all()
    assert text.cache is not None
    assert text.cache.hits == 6


@torch.no_grad()
def test_the_pooled_mean_is_over_real_tokens_also_where_padding_is_seen(declared) -> None:
    encoder = load(declared["t5"], padding="seen")
    states, pooled, tokens = encode(encoder, SHORT)
    real = tokens.mask_BL[0]
    assert not real.all()
    torch.testing.assert_close(pooled[0], states[0, real].mean(0), atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- padding


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "siglip"])
def test_real_tokens_are_as_if_there_were_no_padding(declared, family) -> None:
    encoder = load(declared[family])
    states, pooled, tokens = encode(encoder, SHORT)
    n = int(tokens.mask_BL.sum())
    assert 2 <= n < tokens.mask_BL.shape[1]
    assert tokens.mask_BL[0, :n].all()
    out = encoder.model(input_ids=tokens.ids_BL[:, :n])
    expected = out.pooler_output if family == "clip" else out.last_hidden_state.mean(1)
    torch.testing.assert_close(states[:, :n], out.last_hidden_state, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-5)
    other = tokens.ids_BL.clone()
    other[:, n:] = 7
    changed, changed_pooled = encoder(other, tokens.mask_BL)
    torch.testing.assert_close(changed[:, :n], states[:, :n], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(changed_pooled, pooled, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_siglip_is_padded_to_all_its_positions_however_many_tokens_are_asked_for(declared) -> None:
    config = declared["siglip"]
    full, short = load(config), load(config, max_tokens=16)
    states, pooled, tokens = encode(full, SHORT)
    model = SiglipTextModel.from_pretrained(f"{config.url}/text_encoder")
    out = model(input_ids=tokens.ids_BL)
    assert tokens.ids_BL.shape == (1, 64)
    torch.testing.assert_close(states, out.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, out.pooler_output, atol=1e-5, rtol=1e-5)
    of_short, pooled_short, short_tokens = encode(short, SHORT)
    assert torch.equal(short_tokens.mask_BL, tokens.mask_BL[:, :16])
    torch.testing.assert_close(of_short, states[:, :16], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled_short, pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_encoded_the_same_beside_any_other(declared, family) -> None:
    encoder = load(declared[family])
    states, pooled, _ = encode(encoder, SHORT)
    together, pooled_together, _ = encode(encoder, LONG, SHORT, "")
    torch.testing.assert_close(together[1], states[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled_together[1], pooled[0], atol=1e-5, rtol=1e-5)
    assert (pooled_together[0] - pooled_together[1]).abs().max() > 1e-2
    assert (pooled_together[2] - pooled_together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_caption_keeps_its_ends(declared, family) -> None:
    encoder = load(declared[family], max_tokens=12)
    tokens, whole = encoder.tokenize([LONG, SHORT]), encoder.tokenizer(LONG)["input_ids"]
    assert tokens.cut == (True, False)
    kept = tokens.ids_BL[0].tolist()
    assert kept[0] == whole[0]
    assert kept[-1] == whole[-1] or family.startswith("gemma")  # which has no end token
    assert kept[:11] == whole[:11]


# ---------------------------------------------------------------------------------------------------------------- layers


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_state_counts_from_the_last_layer(declared, family) -> None:
    """-2 is what an encoder without its last layer and final norm gives; -1 what the whole one gives."""
    encoder = load(declared[family], hidden_state=-2)
    states, pooled, tokens = encode(encoder, CAPTIONS[0])
    last, pooled_last, _ = encode(load(declared[family]), CAPTIONS[0])
    real = tokens.mask_BL
    shorter = copy.deepcopy(encoder.model)
    if family.startswith("gemma"):
        shorter.norm, shorter.layers = nn.Identity(), shorter.layers[:-1]
        shorter.config.num_hidden_layers -= 1
    elif family == "t5":
        shorter.encoder.final_layer_norm, shorter.encoder.block = nn.Identity(), shorter.encoder.block[:-1]
    else:
        shorter.final_layer_norm, shorter.encoder.layers = nn.Identity(), shorter.encoder.layers[:-1]
    mask = real[:, None, None, :] if family == "t5" else None
    expected = shorter(input_ids=tokens.ids_BL, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], atol=1e-5, rtol=1e-5)
    assert (last - states)[real].abs().max() > 1e-2
    if family in ("clip", "siglip"):  # pooled by the model's own end, whichever states are taken
        torch.testing.assert_close(pooled, pooled_last)


@torch.no_grad()
def test_clip_pools_through_its_projection_where_its_width_is_declared(tmp_path) -> None:
    config = write_clip(tmp_path, width=32, projection=20)
    projected, plain = load(config), load(config, pooled_width=32)
    pooled, end = encode(projected, SHORT)[1], encode(plain, SHORT)[1]
    reference = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder")
    assert (pooled.shape, end.shape) == ((1, 20), (1, 32))
    torch.testing.assert_close(pooled, reference.text_projection(end), atol=1e-5, rtol=1e-5)
    assert encode(load(config, pooled_width=None), SHORT)[1] is None


# ------------------------------------------------------------------------------------------------- dropping, null, joins


@torch.no_grad()
def test_a_dropped_encoder_gives_its_null_and_the_others_do_not_notice(declared) -> None:
    clip, t5 = declared["clip"], replace(declared["t5"], null_text="zeros")
    text = text_of(clip, t5)
    assert text.dropouts == (0.0, 0.0)
    whole = text(text.prepare(["a fox", "a dog", None, ""]))
    dropped = text(
        text.prepare(["a fox", "a dog", None, ""], dropped=[[True, False, False, False], [False, True, False, False]])
    )
    tokens, mask = dropped.tokens_BLT, dropped.mask_BL
    torch.testing.assert_close(tokens[0, :77], whole.tokens_BLT[3, :77])  # null: empty
    torch.testing.assert_close(tokens[0, 77:], whole.tokens_BLT[0, 77:])
    torch.testing.assert_close(tokens[1, :77], whole.tokens_BLT[1, :77])
    for b in (1, 2):  # null: zeros
        assert not tokens[b, 77:].any()
        assert not dropped.pooled_BP[b, 32:].any()
        assert mask[b, 77:].tolist() == [True] + [False] * 23
    assert tokens[0, 77:].any()
    torch.testing.assert_close(dropped.pooled_BP[2, :32], whole.pooled_BP[3, :32])
    assert whole.tokens_BLT[3, 77:].any()  # the empty caption is not the null one where null is zeros
    assert torch.equal(tokens[2], whole.tokens_BLT[2])


@torch.no_grad()
def test_all_null_still_has_a_token_to_attend_to(sd3) -> None:
    text = FrozenText(sd3)
    assert text.dropouts == (0.464,) * 3
    condition = text(text.prepare([None, None]))
    assert condition.tokens_BLT.shape == (2, 101, 64)
    assert not condition.tokens_BLT.any()
    assert not condition.pooled_BP.any()
    assert condition.mask_BL.sum(1).tolist() == [2, 2]


@torch.no_grad()
def test_encoders_beside_each_other_share_a_mask(sd3) -> None:
    """Where one of two CLIPs sees nothing, the other's tokens are still real."""
    text = FrozenText(sd3)
    whole, half = text(text.prepare([SHORT])), text(text.prepare([SHORT], dropped=[[True], [False], [False]]))
    assert torch.equal(whole.mask_BL, half.mask_BL)
    assert not half.tokens_BLT[:, :77, :16].any()
    assert torch.equal(whole.tokens_BLT[:, :77, 16:], half.tokens_BLT[:, :77, 16:])
    assert not whole.tokens_BLT[:, :77, 48:].any()  # 16 + 32 channels, padded to T5's 64


@torch.no_grad()
def test_trimmed_text_is_without_the_ends_that_nobody_sees(sd3) -> None:
    captions, lengths = [SHORT, "a fox", None], (77, 24)
    text = FrozenText(replace(sd3, cache_mib=1))
    prepared = text.prepare(captions)
    whole = text(prepared)
    parts = [mask_BL.any(0).nonzero().max() + 1 for mask_BL in whole.mask_BL.split(lengths, dim=1)]
    assert all(part < length for part, length in zip(parts, lengths, strict=True))

    def ends_cut(x_BL: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :part] for x, part in zip(x_BL.split(lengths, dim=1), parts, strict=True)], dim=1)

    for _ in range(2):  # the second time from the cache
        trimmed = text(text.prepare(captions).trimmed())
        assert torch.equal(trimmed.mask_BL, ends_cut(whole.mask_BL))
        assert torch.equal(trimmed.tokens_BLT, ends_cut(whole.tokens_BLT))
        assert torch.equal(trimmed.pooled_BP, whole.pooled_BP)
    seen = FrozenText(replace(sd3, encoders=tuple(replace(encoder, padding="seen") for encoder in sd3.encoders)))
    assert seen(seen.prepare(captions).trimmed()).mask_BL[0].all()
    assert seen(seen.prepare([SHORT]).trimmed()).tokens_BLT.shape == (1, sum(lengths), 64)


def test_a_caption_that_is_too_long_is_counted_once_and_only_where_it_is_seen(sd3) -> None:
    text = FrozenText(sd3)
    assert text.prepare([LONG, SHORT, None, LONG]).num_cut == 2
    only_t5 = "a photo of a red fox on fresh snow and two dogs"
    assert text.prepare([only_t5]).num_cut == 1
    assert text.prepare([only_t5], dropped=[[False], [False], [True]]).num_cut == 0


# ---------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_stays_asleep_and_in_its_own_precision(declared) -> None:
    text = text_of(declared["t5"]).train()
    assert text.frozen
    assert not any(module.training for module in text.modules())
    assert not any(parameter.requires_grad for parameter in text.parameters())
    first = text(text.prepare([SHORT]))
    assert not first.tokens_BLT.requires_grad
    assert first.tokens_BLT.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text(text.prepare([SHORT])).tokens_BLT, first.tokens_BLT)


# ----------------------------------------------------------------------------------------------------------------- cache


def cached_text(config) -> tuple[FrozenText, StateCache]:
    text = FrozenText(replace(config, cache_mib=1))
    assert text.cache is not None
    return text, text.cache


def calls_of(text):
    """Batch sizes with which each encoder ran."""
    calls: list[list[int]] = [[] for _ in text.encoders]
    for encoder, sizes in zip(text.encoders, calls, strict=True):
        encoder.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
    return calls


@torch.no_grad()
def test_known_captions_are_not_encoded_again_and_are_the_same(sd3) -> None:
    plain, (cached, cache) = FrozenText(sd3), cached_text(sd3)
    calls = calls_of(cached)
    captions = [CAPTIONS[0], SHORT, None, SHORT, LONG]
    for _ in range(2):
        a, b = plain(plain.prepare(captions)), cached(cached.prepare(captions))
        torch.testing.assert_close(b.tokens_BLT, a.tokens_BLT, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(b.pooled_BP, a.pooled_BP, atol=1e-6, rtol=1e-6)
        assert torch.equal(a.mask_BL, b.mask_BL)
    assert calls == [[3]] * 3  # repeated captions once, zeros never
    assert (cache.misses, cache.hits) == (9, 9)

    mixed = ["two dogs", LONG, CAPTIONS[0]]
    prepared = cached.prepare(mixed, dropped=[[False] * 3, [False] * 3, [False, True, False]])
    assert prepared.num_cut == 1
    a = plain(plain.prepare(mixed, dropped=[[False] * 3, [False] * 3, [False, True, False]]))
    b = cached(prepared)
    torch.testing.assert_close(b.tokens_BLT, a.tokens_BLT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.pooled_BP, a.pooled_BP, atol=1e-5, rtol=1e-5)
    assert calls == [[3, 1]] * 3


@torch.no_grad()
def test_the_cache_holds_what_fits_and_forgets_the_least_used(declared) -> None:
    text, cache = cached_text(FrozenTextConfig(encoders=(declared["clip"],)))
    row = (77 * 32 + 32) * 4
    cache.max_bytes = 2 * row + 100

    def missed(*captions):
        before = cache.misses
        text(text.prepare(captions))
        return cache.misses - before

    assert missed("a", "b") == 2
    assert missed("a") == 0  # now b is the least recently used
    assert missed("c") == 1
    assert missed("a", "c") == 0
    assert cache.num_bytes == 2 * row
    assert missed("b") == 1
    cache.max_bytes = row - 1
    assert missed("d") == missed("d") == 1  # larger than the whole: not kept


@torch.no_grad()
def test_the_cache_does_not_keep_padding_of_t5(declared) -> None:
    text, cache = cached_text(FrozenTextConfig(encoders=(declared["t5"],)))
    prepared = text.prepare([SHORT])
    text(prepared)
    text.prepare([])
    n = int(prepared.encoders[0].mask_BL.sum())
    assert cache.num_bytes == (n * 32 + 32) * 4


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_in_bf16_with_states_kept_on_the_host(sd3) -> None:
    device = torch.device("cuda", 0)
    text, reference = FrozenText(replace(sd3, cache_mib=1), device), FrozenText(sd3)
    assert next(text.parameters()).dtype == torch.bfloat16
    expected = reference(reference.prepare([SHORT, None]))
    for _ in range(2):
        condition = text(text.prepare([SHORT, None]).to(device))
        torch.cuda.synchronize()
        assert condition.tokens_BLT.dtype == torch.float32
        torch.testing.assert_close(condition.tokens_BLT.cpu(), expected.tokens_BLT, atol=0.15, rtol=0.05)
        assert torch.equal(condition.mask_BL.cpu(), expected.mask_BL)
    assert text.cache is not None
    assert (text.cache.misses, text.cache.hits) == (3, 3)
