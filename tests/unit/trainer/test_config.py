"""Config: overrides and their errors, YAML round trip, the digest, layouts."""

import pytest
from pydantic import ValidationError

from tests.tiny import tiny
from trainer.config import (
    ByteTextConfig,
    DecodedRGBConfig,
    ImageSpaceConfig,
    LPIPSConfig,
    LPLConfig,
    ReweightingConfig,
    SelfPerceptualConfig,
    check_layout,
    config_digest,
    replace,
    resolve_url,
)
from trainer.config_text import from_yaml, to_yaml, with_overrides
from trainer.errors import UserError
from trainer.recipes import RECIPES, load


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_recipe_is_accepted_in_place_of_its_name(name, tmp_path) -> None:
    config = load(name)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(str(path)) == config


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("task.model.num_blocks=7", lambda c: c.task.model.num_blocks == 7),
        ("phases.1.batch_size=8", lambda c: c.phases[1].batch_size == 8),
        ("phases.perceptual.perceptual.weight=1e-1", lambda c: c.phases[2].perceptual.weight == 0.1),
        ("phases.0.perceptual={tau: 2}", lambda c: c.phases[0].perceptual.tau == 2.0),
        ("phases.perceptual.perceptual=null", lambda c: c.phases[2].perceptual is None),
        ("data.datasets.more={url: x}", lambda c: c.data.datasets["more"].url == "x"),
        ("task.text={kind: bytes, max_bytes: 9}", lambda c: c.task.text.max_bytes == 9),
    ],
)
def test_override(setting, read) -> None:
    config = with_overrides(load("demo"), [setting])
    assert read(config)
    assert config != load("demo")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("phases.0.batch_size=abc", r"phases\.0\.batch_size: .*integer.*'abc'"),
        (
            "phases.perceptual.perceptual.weigth=3",
            r"phases\.2\.perceptual\.weigth: no such field; did you mean 'weight'\?",
        ),
        ("task.model.num_block=3", r"task\.model\.num_block: no such field; did you mean 'num_blocks'\?"),
        ("task.modle.num_blocks=3", r"no field 'modle'; did you mean 'model'\?"),
        ("seeed=3", r"seeed: no such field; did you mean 'seed'\?"),
        ("data.datasets.emoji.max_samples=0", r"data\.datasets\.emoji\.max_samples: .*greater than 0"),
        ("phases.9.steps=1", r"no item '9'; have 0 to 2, or low_resolution"),
        ("task.text={kind: classes}", r"task\.text\.num_classes: Field required"),
        ("task.paradigm.kind=foo", r"task\.paradigm\.kind: .*'ddpm_eps', 'ddpm_v' or 'flow'.*'foo'"),
        ("samples.sampler=ddim", r"samples\.sampler: ddim does not go with flow"),
        ("phases.0.data_mix={nope: 1}", r"phases\.0\.data_mix: no dataset 'nope'; have emoji"),
        ("samples=null", r"prompt_accuracy: needs samples"),
        ("task.text={kind: classes, num_classes: 3}", r"prompt_accuracy: compares captions"),
        ("phases=[]", r"phases: .*at least 1"),
        ("optim.eps=.nan", r"optim\.eps: .*finite"),
        ("seed", r"write it as FIELD=VALUE"),
        ("seed={", r"--set seed: the value is not YAML"),
        ("seed.x=1", r"'seed' is below|no such field|below a plain value"),
    ],
)
def test_a_wrong_override_names_the_field_in_one_line(setting, message) -> None:
    with pytest.raises(UserError, match=message) as e:
        with_overrides(load("demo"), [setting])
    assert "\n" not in str(e.value)


def test_unknown_recipe_names_a_close_one_and_a_broken_file_its_path(tmp_path) -> None:
    with pytest.raises(UserError, match="no recipe 'dmo'; did you mean 'demo'"):
        load("dmo")
    with pytest.raises(UserError, match=r"nowhere\.yaml: the config cannot be read"):
        load(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "x.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"x\.yaml: not a run's config"):
        load(str(tmp_path / "x.yaml"))
    with pytest.raises(UserError, match=r"x: task\.kind|x: task"):
        from_yaml(to_yaml(load("demo")).replace("kind: latent_diffusion", "kind: other"), source="x")


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load("demo").seed = 3  # type: ignore[misc]


def test_digest_follows_the_numbers_and_not_the_reporting() -> None:
    demo = load("demo")
    same = with_overrides(
        demo,
        [
            "metrics.every_steps=3",
            "name=other",
            "data.num_workers=0",
            "checkpoint.every_steps=7",
            "data.max_bad_samples=5",
            "optim.max_skipped_in_a_row=2",
        ],
    )
    assert config_digest(same) == config_digest(demo)
    for setting in ("seed=1", "phases.0.learning_rate=0.1", "data.datasets.emoji.url=elsewhere"):
        assert config_digest(with_overrides(demo, [setting])) != config_digest(demo)


def test_digest_leaves_out_limits_and_memory_within_sections() -> None:
    encoder = "{family: t5, url: x, width: 8, pooled_width: 8}"
    text = f"task.text={{kind: frozen, encoders: [{encoder}]}}"
    run = with_overrides(load("demo"), [text, "optim.spikes={sigma: 6}"])
    for setting in ("task.text.cache_mib=64", "optim.spikes.max_roll_backs=1"):
        assert config_digest(with_overrides(run, [setting])) == config_digest(run)
    for setting in ("task.text.encoders.0.null_text=zeros", "optim.spikes.sigma=7", "optim.spikes=null"):
        assert config_digest(with_overrides(run, [setting])) != config_digest(run)


def test_layout_that_does_not_divide_is_refused() -> None:
    demo = load("demo")
    check_layout(demo, 4)
    with pytest.raises(
        UserError, match=r"low_resolution\.batch_size: 64 images do not divide over 3 ranks; take 63 or 66"
    ):
        check_layout(demo, 3)
    micro = with_overrides(demo, ["parallel.micro_batch_size=5"])
    with pytest.raises(UserError, match=r"parallel\.micro_batch_size: 5 does not divide"):
        check_layout(micro, 2)


def test_repo_urls_stay_within_the_code() -> None:
    assert resolve_url("s3://bucket/x") == "s3://bucket/x"
    assert resolve_url("repo://data/assets").endswith("/data/assets")
    with pytest.raises(UserError, match="leads out of"):
        resolve_url("repo://../../etc/passwd")


def test_replace_validates() -> None:
    with pytest.raises(ValidationError, match="names must differ"):
        replace(load("demo"), phases=load("demo").phases[:1] * 2)


def test_a_field_of_an_absent_section_says_how_to_set_it() -> None:
    with pytest.raises(UserError, match=r"optim\.spikes is absent; set it whole, .*'optim\.spikes=\{sigma: \.\.\.\}'"):
        with_overrides(load("demo"), ["optim.spikes.sigma=4"])


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        (
            ["task.perceptual.kind=self_perceptual"],
            lambda c: c.task.perceptual == SelfPerceptualConfig(tau_reference_px=64),
        ),
        (
            ["task.perceptual.kind=image_space", "task.perceptual.input_weight=1", "task.perceptual.lpips.url=x"],
            lambda c: (
                c.task.perceptual == ImageSpaceConfig(tau_reference_px=64, input_weight=1, lpips=LPIPSConfig(url="x"))
            ),
        ),
        (
            ["task.perceptual.kind=reweighting", "task.perceptual.of.num_maps=2"],
            lambda c: c.task.perceptual == ReweightingConfig(tau_reference_px=64, of=LPLConfig(num_maps=2)),
        ),
        (
            ["task.text.kind=classes", "task.text.num_classes=3", "prompt_accuracy=null"],
            lambda c: c.task.text.width == 128,
        ),
        (
            ["task.text.kind=classes", "task.text={kind: bytes, max_bytes: 9}"],
            lambda c: c.task.text == ByteTextConfig(max_bytes=9),
        ),
        # what both inherit means the same in both
        (
            ["task.perceptual.tau_reference_px=96", "task.perceptual.chunk_size=2", "task.perceptual.kind=decoded_rgb"],
            lambda c: c.task.perceptual == DecodedRGBConfig(tau_reference_px=96, chunk_size=2),
        ),
        (
            ["task.perceptual.tau_reference_px=96", "task.perceptual.kind=reweighting"],
            lambda c: c.task.perceptual == ReweightingConfig(tau_reference_px=96),
        ),
        # one section, of which kind is a field: the others stay
        (["optim.weight_decay=0.02", "optim.kind=muon"], lambda c: c.optim.weight_decay == 0.02),
        (["phases.perceptual.rate_schedule.kind=cosine"], lambda c: c.phases[2].rate_schedule.kind == "cosine"),
        (
            ["task.perceptual.num_maps=2", "task.perceptual.kind=lpl"],
            lambda c: c.task.perceptual == LPLConfig(tau_reference_px=64, num_maps=2),
        ),
    ],
)
def test_another_kind_begins_with_its_own_defaults(settings, read) -> None:
    config = with_overrides(load("demo"), settings)
    assert read(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["task.text.kind=classes", "prompt_accuracy=null"],
            r"--set task\.text\.kind=classes: classes has fields of its own, and needs num_classes; set it whole, for example "
            r"--set 'task\.text=\{kind: classes, num_classes: \.\.\.\}'",
        ),
        (["task.model.kind=dit"], r"task: model\.kind: dit knows classes alone"),
        (["task.model.kind=dit", "task.model.kind=mmdit"], r"mmdit has .* needs num_blocks, num_heads; set it whole"),
        (["task.kind=autoencoder"], r"--set task\.kind=autoencoder: .*needs model; set it whole"),
        (["task.perceptual.kind=lpsl"], r"task\.perceptual: no kind 'lpsl'; did you mean 'lpl'"),
        (["task.perceptual.kind=[lpl]"], r"task\.perceptual: .*"),
        (
            ["task.perceptual.kind=self_perceptual", "task.perceptual.blok=3"],
            r"blok: no such field; did you mean 'block'\?",
        ),
        (
            ["task.perceptual.kind=self_perceptual", "task.perceptual.num_maps=3"],
            r"task\.perceptual\.num_maps: no such field; have tau_reference_px, kind, block",
        ),
        (
            ["phases.2.perceptual.variance_share=0.1", "phases.2.denoising_weight=0"],
            r"phases\.2: perceptual\.variance_share: .*denoising_weight is 0",
        ),
        (["phases.2.perceptual.variance_share=0.1", "phases.2.batch_size=1"], r"one image has no variance"),
    ],
)
def test_a_kind_that_lacks_something_says_what(settings, message) -> None:
    with pytest.raises(UserError, match=message) as e:
        with_overrides(load("demo"), settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("url", ["s3://AKIA:hunter2@minio:9000/photos", "https://token@host/x", "s3://k:hun/ter2@host/b",
                                 "https://host/x?X-Amz-Signature=1"])  # fmt: skip
def test_a_url_with_a_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="url") as e:
        tiny(f"data.datasets.emoji.url={url}")
    assert "environment" in str(e.value)
    assert "hunter2" not in str(e.value)
    assert "ter2@" not in str(e.value)
