"""Text and class conditions: what is prepared, what is masked, what null means."""

import math

import pytest
import torch

from trainer.config import ByteTextConfig, ClassLabelConfig
from trainer.errors import UserError
from trainer.models.text_encoders import ClassEncoder, build_text_encoder
from trainer.recipes import text_presets


def byte_encoder():
    torch.manual_seed(0)
    encoder = build_text_encoder(ByteTextConfig(max_bytes=8, width=16, num_blocks=1, num_heads=2))
    encoder.init_weights()
    return encoder


def test_bytes_are_kept_cut_and_counted() -> None:
    text = byte_encoder().prepare(["dog", "é" * 5, None, ""])
    assert text.ids_BL[0].tolist() == [256, *b"dog", *[257] * 5]
    assert text.num_cut == 1  # ten bytes of five characters
    assert text.mask_BL.sum(1).tolist() == [4, 9, 1, 1]
    assert torch.equal(text.ids_BL[2], text.ids_BL[3])


@torch.no_grad()
def test_a_caption_is_encoded_the_same_beside_any_other_and_order_matters() -> None:
    encoder = byte_encoder()
    alone, pair = encoder(encoder.prepare(["ab"])), encoder(encoder.prepare(["ab", "abcdefgh"]))
    torch.testing.assert_close(alone.tokens_BLT[0, :3], pair.tokens_BLT[0, :3])
    torch.testing.assert_close(alone.pooled_BP[0], pair.pooled_BP[0])
    swapped = encoder(encoder.prepare(["ba"]))
    assert (swapped.pooled_BP - alone.pooled_BP).abs().max() > 1e-4


@torch.no_grad()
def test_trimmed_text_loses_nothing_but_padding() -> None:
    encoder = byte_encoder()
    full = encoder.prepare(["ab", "abcd", None])
    trimmed = full.trimmed()
    assert trimmed.ids_BL.shape == (3, 5)
    assert full.ids_BL.shape == (3, 9), "the one it was made of stays"
    whole, cut = encoder(full), encoder(trimmed)
    torch.testing.assert_close(cut.tokens_BLT, whole.tokens_BLT[:, :5])
    torch.testing.assert_close(cut.pooled_BP, whole.pooled_BP)
    assert encoder.prepare([None]).trimmed().ids_BL.shape == (1, 1)
    longest = encoder.prepare(["abcdefghi", "a"]).trimmed()
    assert longest.ids_BL.shape == (2, 9)
    assert longest.num_cut == 1


def test_classes() -> None:
    encoder = build_text_encoder(ClassLabelConfig(num_classes=3, width=16))
    assert isinstance(encoder, ClassEncoder)
    encoder.init_weights()
    text = encoder.prepare(["a cat", None], labels=[2, 1])
    assert text.ids_BL.tolist() == [[2], [3]]
    condition = encoder(text)
    assert condition.tokens_BLT.shape == (2, 1, 16)
    assert torch.equal(condition.pooled_BP, condition.tokens_BLT[:, 0])
    assert encoder.prepare(["0", None]).ids_BL.tolist() == [[0], [3]]  # prompts
    with pytest.raises(UserError, match=r"num_classes: label -1 is no class of 0\.\.2"):
        encoder.prepare(["x"], labels=[-1])
    with pytest.raises(UserError, match="prompt 'cat' is no class"):
        encoder.prepare(["cat"])


def test_trainable_encoders_are_not_dropped_alone() -> None:
    encoder = byte_encoder()
    assert (encoder.frozen, encoder.dropouts) == (False, ())
    assert encoder.prepare(["dog"], dropped=()).ids_BL[0, 0] == 256


def test_presets_join_to_the_published_widths() -> None:
    sd3, sdxl = text_presets.sd3_text("s3://bucket/sd3"), text_presets.sdxl_text("s3://bucket/sdxl")
    assert (sd3.width, sd3.pooled_width) == (4096, 2048)
    assert [len(group) for group in sd3.groups] == [2, 1]
    assert sum(group[0].max_tokens for group in sd3.groups) == 77 + 256
    assert [e.weights_folder for e in sd3.encoders] == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert [e.tokenizer_folder for e in sd3.encoders] == ["tokenizer", "tokenizer_2", "tokenizer_3"]
    assert [e.hidden_state for e in sd3.encoders] == [-2, -2, -1]
    share_without_text = math.prod(e.dropout for e in sd3.encoders)
    assert share_without_text == pytest.approx(0.1, abs=1e-3)
    assert text_presets.sd3_text("x", t5_tokens=77).encoders[2].max_tokens == 77
    assert (sdxl.width, sdxl.pooled_width) == (2048, 1280)
    assert (text_presets.clip_l_text("x").width, text_presets.clip_l_text("x").pooled_width) == (768, 768)
    assert (text_presets.t5_text("x", 4096).width, text_presets.t5_text("x", 4096).pooled_width) == (4096, 4096)
