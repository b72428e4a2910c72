"""Reading frozen text encoders: every layout that their authors publish, remote ones, and what is refused."""

import json
import shutil

import fsspec
import pytest
import safetensors.torch
import torch
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

from tests.text_models import WRITERS, write_clip, write_gemma
from trainer.config import replace
from trainer.errors import UserError
from trainer.models.frozen_encoder import load_encoder
from trainer.models.text_files import encoder_files

FIELD = "task.text.encoders.0"
CAPTIONS = ("A red Fox, on the beach!", "", "zebra")


@torch.no_grad()
def states_of(config):
    encoder = load_encoder(config, FIELD, torch.float32)
    tokens = encoder.tokenize(CAPTIONS)
    return encoder(tokens.ids_BL, tokens.mask_BL)[0]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture
def clip(originals, tmp_path):
    """A copy of a CLIP's folder, to be damaged."""
    return copy_of(originals["clip"], tmp_path)


def copy_of(config, folder):
    shutil.copytree(config.url, folder / "copy")
    return replace(config, url=str(folder / "copy"))


def weights_of(config):
    return safetensors.torch.load_file(f"{config.url}/text_encoder/model.safetensors")


def write_weights(config, weights):
    safetensors.torch.save_file(weights, f"{config.url}/text_encoder/model.safetensors")


def edit_json(config, name, **changes):
    path = f"{config.url}/{name}"
    with open(path) as file:
        value = json.load(file) | changes
    with open(path, "w") as file:
        json.dump(value, file)


def shard(folder):
    """The same weights in two files with an index."""
    weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
    names = sorted(weights)
    index: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.torch.save_file({name: weights[name] for name in part}, f"{folder}/{file}")
        index |= dict.fromkeys(part, file)
    with open(f"{folder}/model.safetensors.index.json", "w") as out:
        json.dump({"metadata": {}, "weight_map": index}, out)
    (folder / "model.safetensors").unlink()


# --------------------------------------------------------------------------------------------------------------- layouts


def test_weights_in_shards(clip, tmp_path) -> None:
    whole = states_of(clip)
    shard(tmp_path / "copy" / "text_encoder")
    assert torch.equal(states_of(clip), whole)


def test_all_in_one_folder(originals, tmp_path) -> None:
    config = originals["t5"]
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(f"{config.url}/{part}", tmp_path / "flat", dirs_exist_ok=True)
    flat = replace(config, url=str(tmp_path / "flat"), weights_folder="", tokenizer_folder="")
    assert torch.equal(states_of(flat), states_of(config))


def test_clip_by_vocabulary_and_merges(originals, tmp_path) -> None:
    assert torch.equal(states_of(write_clip(tmp_path, as_json=False)), states_of(originals["clip"]))


def test_clip_as_stable_diffusion_1_names_its_weights(clip) -> None:
    whole, weights = states_of(clip), weights_of(clip)
    named = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    write_weights(clip, named | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert torch.equal(states_of(clip), whole)


def test_the_text_half_of_a_whole_clip(clip, tmp_path) -> None:
    text = json.loads((tmp_path / "copy/text_encoder/config.json").read_text())
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 32,
    }
    torch.manual_seed(1)
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    whole.save_pretrained(tmp_path / "copy" / "text_encoder")
    encoder = load_encoder(clip, FIELD, torch.float32)
    tokens = encoder.tokenize(CAPTIONS)
    pooled = encoder(tokens.ids_BL, tokens.mask_BL)[1]
    expected = whole.get_text_features(tokens.ids_BL).pooler_output
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


def test_the_encoder_of_a_whole_t5(originals, tmp_path) -> None:
    config = copy_of(originals["t5"], tmp_path)
    folder = tmp_path / "copy" / "text_encoder"
    torch.manual_seed(1)
    whole = T5ForConditionalGeneration(T5Config.from_pretrained(folder)).eval()
    whole.save_pretrained(folder)
    states = states_of(config)
    tokens = load_encoder(config, FIELD, torch.float32).tokenize(CAPTIONS)
    expected = whole.encoder(tokens.ids_BL, attention_mask=tokens.mask_BL).last_hidden_state
    torch.testing.assert_close(states[tokens.mask_BL], expected[tokens.mask_BL], atol=1e-5, rtol=1e-5)


def test_t5_embedding_under_either_of_its_names(originals, tmp_path) -> None:
    config = copy_of(originals["t5"], tmp_path)
    weights = weights_of(config)
    write_weights(config, {"encoder.embed_tokens.weight": weights.pop("shared.weight"), **weights})
    assert torch.equal(states_of(config), states_of(originals["t5"]))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_gemma_3_with_images(tmp_path, prefix) -> None:
    config = write_gemma(tmp_path / "copy", model_type="gemma3_text")
    alone, weights = states_of(config), weights_of(config)
    named = {f"{prefix}{name.removeprefix('model.')}": weight for name, weight in weights.items()}
    write_weights(config, named | {"vision_tower.patch.weight": torch.zeros(2, 2)})
    path = tmp_path / "copy/text_encoder/config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": json.loads(path.read_text())}))
    assert torch.equal(states_of(config), alone)


# ---------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote(originals, tmp_path, monkeypatch):
    """A CLIP in shards on a remote file system, and an empty cache folder here."""
    config = copy_of(originals["clip"], tmp_path)
    shard(tmp_path / "copy" / "text_encoder")
    (tmp_path / "copy" / "text_encoder" / "model.fp16.safetensors").write_bytes(b"x")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/copy/", "/bucket/clip/", recursive=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield replace(config, url="memory://bucket/clip"), tmp_path / "cache" / "loupe" / "text_encoders"
    memory.rm("/bucket", recursive=True)


def test_remote_files_are_fetched_once_and_no_others(originals, remote) -> None:
    config, cache = remote
    assert torch.equal(states_of(config), states_of(originals["clip"]))
    files = {path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert {path.name for path in files} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in files}
    states_of(config)
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_a_file_that_changed_is_fetched_anew(remote) -> None:
    config, _ = remote
    before = states_of(config)
    memory = fsspec.filesystem("memory")
    name = "/bucket/clip/text_encoder/model-00001-of-00002.safetensors"
    weights = safetensors.torch.load(memory.cat_file(name))
    memory.pipe_file(name, safetensors.torch.save({key: value * 1.5 for key, value in weights.items()}))
    assert not torch.equal(states_of(config), before)


def test_half_a_download_leaves_nothing(remote, monkeypatch) -> None:
    config, cache = remote
    memory, fetched = fsspec.filesystem("memory"), []
    whole = memory.open

    def broken(path, *args, **kwargs):
        fetched.append(path)
        if "00002-of" in path:
            raise OSError("the line is dead")
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "open", lambda self, path, *a, **k: broken(path, *a, **k))
    with pytest.raises(UserError, match=r"encoders\.0\.url: .*text_encoder: cannot be fetched into .*the line is dead"):
        encoder_files(config, FIELD)
    assert [p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == [
        "model-00001-of-00002.safetensors"
    ]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert len(encoder_files(config, FIELD).weights) == 2


# --------------------------------------------------------------------------------------------------------------- refused


def refused(config, match, **changes):
    with pytest.raises(UserError, match=match) as caught:
        load_encoder(replace(config, **changes), FIELD, torch.float32)
    assert "\n" not in str(caught.value)


def test_what_is_declared_is_compared_and_both_sides_named(originals) -> None:
    clip, t5, siglip = originals["clip"], originals["t5"], originals["siglip"]
    refused(clip, r"^task\.text\.encoders\.0\.width: 768, but the encoder at .*text_encoder has 32; declare", width=768)
    refused(clip, r"pooled_width: 64, but the encoder at .* has 32;", pooled_width=64)
    refused(clip, r"max_tokens: 78, but the encoder at .* has 77 positions", max_tokens=78)
    refused(clip, r"hidden_state: -5, but the encoder at .* has 3 layers", hidden_state=-5)
    refused(
        clip,
        r"0\.width: 8, but .* has 32; .*0\.max_tokens: 99, but .* has 77 positions; declare",
        width=8,
        max_tokens=99,
    )
    refused(t5, r"pooled_width: 8, but the encoder at .* has 32", pooled_width=8)
    refused(siglip, r"pooled_width: 32, but the encoder at .* has 24", pooled_width=32)
    load_encoder(replace(t5, max_tokens=500), FIELD, torch.float32)  # relative positions: any number


def test_a_projection_that_the_weights_lack_is_not_declared_away(clip) -> None:
    edit_json(clip, "text_encoder/config.json", projection_dim=20)
    refused(clip, r"pooled_width: 20, but the encoder at .* has 32", pooled_width=20)


def test_another_family(originals, clip) -> None:
    refused(
        originals["clip"],
        r"0\.family: t5, but the encoder at .* has model_type 'clip_text_model'; t5 takes t5",
        family="t5",
    )
    edit_json(clip, "text_encoder/config.json", model_type="bert")
    refused(clip, r"family: clip, but .* model_type 'bert'; clip takes clip_text_model or clip")


def test_files_that_are_missing(clip, tmp_path) -> None:
    copy = tmp_path / "copy"
    refused(
        clip, r"encoders\.0\.url: .*nowhere.*config\.json: no such file; give the folder", url=str(tmp_path / "nowhere")
    )
    refused(
        clip, r"tokenizer_folder: .*has no tokenizer\.json, or vocab\.json and merges\.txt; give", tokenizer_folder=""
    )
    refused(clip, r"url: nosuchprotocol://x cannot be opened", url="nosuchprotocol://x")
    (copy / "tokenizer/tokenizer.json").rename(copy / "tokenizer/spiece.model")
    refused(clip, r"tokenizer_folder: .*; convert spiece\.model")
    (copy / "text_encoder/model.safetensors").rename(copy / "text_encoder/pytorch_model.bin")
    refused(clip, r"model\.safetensors: no such file, pytorch_model\.bin is a pickle, which is never read; convert")
    (copy / "text_encoder/pytorch_model.bin").unlink()
    refused(clip, r"model\.safetensors: no such file, there are no weights; convert")


def test_folders_and_shards_stay_within_the_encoder(clip, tmp_path) -> None:
    for folder in ("../other", "/etc", "text_encoder/../.."):
        refused(clip, r"weights_folder: .* leads out of the encoder's folder", weights_folder=folder)
        refused(clip, r"tokenizer_folder: .* leads out of the encoder's folder", tokenizer_folder=folder)
    folder = tmp_path / "copy" / "text_encoder"
    shard(folder)
    edit_json(clip, "text_encoder/model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})
    refused(clip, r"index\.json: names '\.\./\.\./secret\.safetensors', which is no safetensors file beside it")
    edit_json(clip, "text_encoder/model.safetensors.index.json", weight_map={"a": "pytorch_model.bin"})
    refused(clip, r"names 'pytorch_model\.bin', which is no safetensors file")
    edit_json(clip, "text_encoder/model.safetensors.index.json", weight_map={"a": "model-3.safetensors"})
    refused(clip, r"model-3\.safetensors: no such file; copy the encoder's folder again")
    edit_json(clip, "text_encoder/model.safetensors.index.json", weight_map=None)
    refused(clip, r"has no weight_map")


def test_weights_that_are_missing_misshapen_or_not_finite(clip) -> None:
    weights = weights_of(clip)
    name = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    write_weights(clip, {key: value for key, value in weights.items() if key != name})
    refused(clip, r"url: .*: the weights lack encoder\.layers\.1\.mlp\.fc1\.weight \(1 such\)")
    write_weights(clip, weights | {name: weights[name][:-1].clone()})
    refused(clip, r"layers\.1\.mlp\.fc1\.weight has shape \(63, 32\), config\.json says \(64, 32\)")
    broken = weights[name].clone()
    broken[3, 5] = torch.nan
    write_weights(clip, weights | {name: broken})
    refused(clip, r"layers\.1\.mlp\.fc1\.weight holds values that are not finite")


def test_damaged_files(clip, tmp_path) -> None:
    folder = tmp_path / "copy"
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    refused(clip, r"tokenizer_folder: .*the tokenizer cannot be read")
    (folder / "text_encoder/model.safetensors").write_bytes(b"no tensors")
    refused(clip, r"model\.safetensors: not a whole safetensors file")
    edit_json(clip, "text_encoder/config.json", hidden_size="wide")
    refused(clip, r"not a valid clip_text_model config")
    (folder / "text_encoder/config.json").write_text("[1]")
    refused(clip, r"config\.json: holds a list, not an object")
    (folder / "text_encoder/config.json").write_text("{")
    refused(clip, r"config\.json: not JSON")
    (folder / "text_encoder/config.json").write_text(" " * (1 << 20) + "{}")
    refused(clip, r"config\.json: 1048578 bytes, more than 1048576")


def test_a_config_does_not_decide_how_it_is_loaded(clip) -> None:
    plain = states_of(clip)
    edit_json(clip, "text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}, _attn_implementation="someone/kernel",
              attn_implementation="someone/kernel", transformers_weights="pytorch_model.bin", output_hidden_states=True,
              fusion_config={"patch_embeddings": True})  # fmt: skip
    assert torch.equal(states_of(clip), plain)
    edit_json(
        clip, "text_encoder/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    )
    refused(clip, r"its weights are quantised; give the encoder in bf16 or float32")


def test_a_tokenizer_of_another_encoder(originals, clip, tmp_path) -> None:
    tokenizer = tmp_path / "copy" / "tokenizer"
    edit_json(clip, "text_encoder/config.json", eos_token_id=7)
    refused(clip, r"tokenizer_folder: .* ends captions with \d+, but the encoder at .* pools at eos_token_id 7")
    t5 = copy_of(originals["t5"], tmp_path / "t5")
    shutil.copytree(tokenizer, f"{t5.url}/tokenizer", dirs_exist_ok=True)
    refused(t5, r"tokenizer_folder: .* has \d+ tokens, but the encoder at .* \d+; give the encoder's own")
    (tokenizer / "tokenizer_config.json").unlink()
    refused(clip, r"tokenizer_folder: .* names no pad_token")


def test_a_gemma_that_sees_its_padding(originals, tmp_path) -> None:
    config = write_gemma(tmp_path, model_type="gemma3_text")
    edit_json(config, "text_encoder/config.json", use_bidirectional_attention=True)
    refused(config, r"use_bidirectional_attention: such a Gemma would see its padding")
