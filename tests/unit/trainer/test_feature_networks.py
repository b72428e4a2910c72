"""Feature networks and their pinned preprocessing, against the code that defined them or other ways to compute the same."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import feature_networks
from trainer.errors import UserError
from trainer.evaluate.features import networks, preprocess
from trainer.evaluate.features.networks import build_network, exactly, parse_networks
from trainer.evaluate.features.transformers_networks import ClipFeatures
from trainer.evaluate.features.weights import sha256_of
from trainer.models.efficientnet import EfficientNetLite0

TORCH_FIDELITY = {
    40: [
        [0, 0.05861519, 14.70547, 2.566393, 2.397614, 5.88795, 0.2355986, 13.40684, 9.836475],
        [0, 0.06904717, 14.38013, 2.464892, 2.61084, 5.559775, 0.2182425, 14.09422, 10.80599],
    ],
    320: [
        [0.01698495, 0.07992969, 15.18878, 2.988081, 3.046698, 5.939943, 0.2448926, 15.57856, 10.28371],
        [0.02304601, 0.0744382, 15.46796, 2.952088, 3.382104, 6.121149, 0.2137724, 15.29473, 11.78676],
    ],
}  # fmt: skip
"""Every 255th from the 7th, to the last, of the 2,048 features that torch-fidelity 0.4.0's own FeatureExtractorInceptionV3
gives `pixels(2, side)` with `inception_state`."""


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(feature_networks.inception_state(), path)
    return path


def test_inception_is_that_of_torch_fidelity(inception_file: Path) -> None:
    loaded = build_network("inception", str(inception_file), sha256_of(inception_file))
    for side, expected in TORCH_FIDELITY.items():
        features = loaded.features(feature_networks.pixels(2, side))
        assert features.shape == (2, 2048)
        np.testing.assert_allclose(features[:, 7::255].numpy(), expected, rtol=2e-5, atol=1e-4)
    assert loaded.numbers()["sha256"] == sha256_of(inception_file)


def test_clean_inception_resizes_as_clean_fid(inception_file: Path) -> None:
    loaded = build_network("inception_clean", str(inception_file), sha256_of(inception_file))
    pixels = feature_networks.pixels(1, 40)
    # clean-fid's make_resizer("PIL", False, "bicubic", (299, 299)), a channel at a time
    channels = [
        np.asarray(Image.fromarray(c.numpy().astype(np.float32), mode="F").resize((299, 299), Image.Resampling.BICUBIC))
        for c in pixels[0]
    ]
    resized = torch.from_numpy(np.stack(channels).clip(0, 255))[None]
    network: Any = loaded.network
    with torch.no_grad():
        assert torch.equal(loaded.features(pixels), network.network(resized))
    plain = build_network("inception", str(inception_file), sha256_of(inception_file))
    assert (loaded.features(pixels) - plain.features(pixels)).abs().max() > 0.05


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 11), (40, 31, 13), (9, 9, 9), (1, 1, 4)])
def test_tensorflow_1_bilinear(height: int, width: int, side: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width))
    expected = np.empty((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[below, left] + (image[below, right] - image[below, left]) * (x - left)
            expected[i, j] = upper + (lower - upper) * (y - top)
    pixels = torch.from_numpy(image.astype(np.uint8)).expand(1, 3, height, width)
    found = preprocess.tf1_bilinear(pixels, side)
    assert found.shape == (1, 3, side, side)
    np.testing.assert_allclose(found[0, 1].numpy(), expected, atol=1e-3)


def test_inception_takes_the_published_file_alone(inception_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"sha256 {sha256_of(inception_file)}, and FID is of pt_inception-2015-12-05"):
        build_network("inception", str(inception_file))
    with pytest.raises(UserError, match=r"--network-sha256: .* not 00.*another file, or damaged"):
        build_network("inception", str(inception_file), "0" * 64)
    state = feature_networks.inception_state()

    def refused(name: str, message: str, **changes: Any) -> None:
        path = tmp_path / name
        torch.save({key: changes.get(key.replace(".", "_"), value) for key, value in state.items()}, path)
        with pytest.raises(UserError, match=message):
            build_network("inception", str(path), sha256_of(path))

    refused("shape", r"fc.weight is of \(3,\)", fc_weight=torch.zeros(3))
    refused("nan", "fc.bias holds values that are not finite", fc_bias=torch.full((1008,), torch.nan))
    del state["Mixed_7c.branch_pool.conv.weight"]
    refused("lacks", "Mixed_7c.branch_pool.conv.weight is not there")
    (tmp_path / "no").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="not a file of tensors alone"):
        build_network("inception", str(tmp_path / "no"), sha256_of(tmp_path / "no"))
    with pytest.raises(UserError, match="no such file"):
        build_network("inception", str(tmp_path / "absent"))


def test_clip_is_that_of_transformers(tmp_path: Path) -> None:
    model = feature_networks.write_clip(tmp_path)
    loaded = build_network("clip", str(tmp_path))
    assert isinstance(loaded.network, ClipFeatures)
    assert (loaded.network.dimensions, loaded.network.side) == (16, 32)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    for side in (32, 57):
        pixels = feature_networks.pixels(3, side)
        images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        with torch.no_grad():
            expected = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
        torch.testing.assert_close(loaded.features(pixels), expected, rtol=1e-4, atol=1e-5)

    prompts = ["a photo of a red fox", "two dogs " * 60]
    features, cut = loaded.network.text_features(prompts)
    assert cut == [False, True]
    # alone, unpadded: neighbours and padding change nothing
    tokens = loaded.network._tokenizer(prompts[0], return_tensors="pt")
    with torch.no_grad():
        alone = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(features[:1], alone, rtol=1e-4, atol=1e-5)
    assert set(loaded.numbers()["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_dinov2_is_that_of_transformers(tmp_path: Path) -> None:
    model = feature_networks.write_dinov2(tmp_path)
    loaded = build_network("dinov2", str(tmp_path))
    pixels = feature_networks.pixels(2, 100)
    processor = BitImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, image_mean=preprocess.IMAGENET_MEAN,
        image_std=preprocess.IMAGENET_STD, resample=Image.Resampling.BICUBIC,
    )  # fmt: skip
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    with torch.no_grad():
        states = model(**processor(images=images, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(loaded.features(pixels), states[:, 0], rtol=1e-4, atol=1e-5)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="has model_type 'dinov2'; give one of 'clip'"):
        build_network("clip", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        build_network("dinov2", str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which is never read"):
        build_network("dinov2", str(tmp_path))


def test_features_are_computed_in_full_precision() -> None:
    """TF32 and autocast would give the same images two distances; what was set is put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exactly(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.deterministic
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_network_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = build_network(feature_networks.OURS, None)
    about = loaded.numbers()
    assert about["code"] == {feature_networks.OURS: sha256_of(Path(feature_networks.__file__))}
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pixels[1] = 255
    assert loaded.features(pixels).tolist() == [[0.0] * 48, [1.0] * 48]
    monkeypatch.setattr(feature_networks.Blocks, "dimensions", 47)
    with pytest.raises(UserError, match=r"blocks gave features of \(2, 48\), and it is to give \(2, 47\)"):
        build_network(feature_networks.OURS, None).features(pixels)
    monkeypatch.setattr(feature_networks.Blocks, "name", "inception")
    with pytest.raises(UserError, match="its name 'inception'; take a-z, 0-9 and _, and none of ours"):
        build_network(feature_networks.OURS, None)
    with pytest.raises(UserError, match="cannot be imported"):
        build_network("tests.feature_networks:nothing", None)


def test_weights_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    feature_networks.write_clip(tmp_path / "clip")
    remote = fsspec.filesystem("memory")
    remote.put(f"{tmp_path}/clip/", "/weights/clip/", recursive=True)
    local, fetched = build_network("clip", str(tmp_path / "clip")), build_network("clip", "memory://weights/clip")
    assert fetched.numbers() == local.numbers()
    pixels = feature_networks.pixels(1, 32)
    assert torch.equal(fetched.features(pixels), local.features(pixels))
    torch.save(EfficientNetLite0().state_dict(), tmp_path / "lite0.pth")
    remote.put(str(tmp_path / "lite0.pth"), "/weights/lite0.pth")
    lite0 = build_network("efficientnet_lite0", "memory://weights/lite0.pth", sha256_of(tmp_path / "lite0.pth").upper())
    assert lite0.numbers()["sha256"] == sha256_of(tmp_path / "lite0.pth")
    with pytest.raises(UserError, match=r"--network: memory://weights/none\.pth: no such file"):
        build_network("efficientnet_lite0", "memory://weights/none.pth")


def test_networks_on_a_command_line() -> None:
    words = ["inception=a=b.pth", "clip=s3://b/clip", feature_networks.OURS]
    sums = [f"inception={'A' * 64}"]
    assert parse_networks(words, sums) == [
        ("inception", "a=b.pth", "A" * 64), ("clip", "s3://b/clip", None), (feature_networks.OURS, None, None),
    ]  # fmt: skip
    for bad_words, bad_sums, message in (
        (["vgg=a"], [], "vgg: no such network; take inception, inception_clean, dinov2, clip"),
        (["clip=a", "clip=b"], [], "given twice"),
        (["clip=a"], ["clip=12"], "give NAME=64 hexadecimal digits"),
        (["clip=a"], [f"dinov2={'0' * 64}"], "of a network that is named"),
    ):
        with pytest.raises(UserError, match=message):
            parse_networks(bad_words, bad_sums)
    with pytest.raises(UserError, match="dinov2 needs its weights; give dinov2=FILE"):
        build_network("dinov2", None)


def test_evaluation_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    square = image[:, 10:60]
    expected = np.array(Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(preprocess.evaluation_image(image, 32, "bicubic"), expected)
    assert np.array_equal(preprocess.evaluation_image(image, 50, "bicubic"), square)
    assert np.array_equal(preprocess.evaluation_image(image, 50, "training"), square)
    assert preprocess.evaluation_image(image, 64, "bicubic").shape == (64, 64, 3)
    # by whole blocks: area averages
    blocks = square.reshape(25, 2, 25, 2, 3).mean((1, 3))
    assert np.abs(preprocess.evaluation_image(image, 25, "training") - blocks).max() <= 1.0
    assert set(networks.NETWORKS) == {"inception", "inception_clean", "dinov2", "clip", "efficientnet_lite0"}
