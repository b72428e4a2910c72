"""Averages of other widths from a training's snapshots, against ones that were kept while it went; and which snapshots stay."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor, nn

from launch.commands.ema import ema as command
from tests.tiny import tiny
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.manifests import read_manifest
from trainer.config import EMAConfig
from trainer.config.run import _numbers
from trainer.config_text import to_yaml, with_overrides
from trainer.ema import EMA
from trainer.ema_snapshots import Snapshots
from trainer.errors import UserError
from trainer.parallel.world import World
from trainer.posthoc_ema import StoredAverages, tensors
from trainer.power_profiles import exponent
from trainer.recipes import load as recipe

STEPS, EVERY = 480, 15
KEPT, THIRD = (0.05, 0.1), 0.075
CONFIG = EMAConfig(profiles=(*KEPT, THIRD), snapshot_steps=EVERY)


class Notes:
    """What a run's reports would be told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    print = note


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 30)
        self.register_buffer("seen", torch.tensor([3, 4]))


def walk(module: nn.Module, steps: int, seed: int = 0) -> Iterator[int]:
    """A training: weights that drift and shake, less and less. Yields the steps done."""
    generator = torch.Generator().manual_seed(seed)
    drift = {name: torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()}
    for step in range(steps):
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.add_((drift[name] + 3 * torch.randn(p.shape, generator=generator)) / (step + 20))
        yield step + 1


def writer(
    folder: Path, world: World, ema: EMA, module: nn.Module, config: EMAConfig = CONFIG, total: int = STEPS
) -> Snapshots:
    keep = config.keep_snapshots or 10**9
    manager = CheckpointManager(
        f"{folder}/ema", keep_last=keep, config_digest="x", code_version="", process_group=world.host_group
    )
    return Snapshots(manager, world, config, total, ema, module, Notes())  # type: ignore[arg-type]


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    mine, theirs = (torch.cat([of[name].double().flatten() for name in expected]) for of in (found, expected))
    return float((mine - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, alone: World
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A folder of snapshots; the average of the third width as it was at the end, and half-way."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    module = Small()
    ema = EMA(module, profiles=CONFIG.profiles)
    snapshots, half = writer(folder, alone, ema, module), {}
    for done in walk(module, STEPS):
        ema.update(0.99, torch.tensor(0.0), done)
        if done == STEPS // 2:
            half = {name: a.clone() for name, a in ema.profiles[THIRD].items()}
        if snapshots.due(done):
            snapshots.save(done, done)
    snapshots.finish()
    # by which commands know a run folder
    (folder / "config.yaml").write_text(to_yaml(tiny()))
    return folder, dict(ema.profiles[THIRD]), half


def only(stored: StoredAverages, widths: tuple[float, ...]) -> StoredAverages:
    """As if these alone had been kept."""
    for snapshot in stored.stored:
        assert set(widths) <= set(snapshot.widths)
        object.__setattr__(snapshot, "widths", widths)
    return stored


def test_a_third_width_from_snapshots_of_two(trained: Any) -> None:
    folder, end, half = trained
    stored = only(StoredAverages(str(folder)), KEPT)
    plan = stored.plan(THIRD)
    assert plan.step == STEPS
    assert 16 < plan.num_snapshots < STEPS // EVERY, "the earliest weigh next to nothing"
    assert plan.error < 1.5e-3
    off = relative(dict(stored.read(plan)), end)
    assert off < 4e-4, "about the rounding of float16, and what snapshots leave open"
    nearest = min(relative(dict(stored.read(stored.plan(kept))), end) for kept in KEPT)
    assert nearest > 20 * off, "so that the bound says something"
    earlier = dict(stored.read(stored.plan(THIRD, STEPS // 2)))
    assert relative(earlier, half) < 6e-4
    assert relative(earlier, end) > 1e-2


def test_what_was_kept_is_what_is_stored(trained: Any) -> None:
    folder, end, _ = trained
    found = tensors(str(folder), THIRD)
    for name, tensor in end.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.half().float())
    assert torch.equal(found["seen"], torch.tensor([3, 4])), "buffers as the model had them"


def test_in_parts_it_is_the_same(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = trained
    stored = StoredAverages(str(folder))
    plan = stored.plan(0.08)
    told: list[int] = []
    whole = dict(stored.read(plan))
    monkeypatch.setattr("trainer.posthoc_ema.PART_BYTES", 200)
    again = dict(stored.read(plan, on_read=told.append))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(told) == 2 * len(plan.parts)
    assert [name for name, _ in stored.read(plan, ["layer.bias"])] == ["layer.bias"]


def test_a_skipped_step_is_one_in_which_the_weights_stand() -> None:
    module = nn.Linear(3, 2, bias=False)
    history: list[Tensor] = []
    ema = EMA(module, profiles=(0.1,))
    for done in walk(module, 20):
        if done in (7, 8, 15):  # refused: the optimizer has left the weights as they were
            with torch.no_grad():
                module.weight.copy_(history[-1])
        history.append(module.weight.detach().clone())
        ema.update(0.9, torch.tensor(float(done in (7, 8, 15))), done)
    gamma = exponent(0.1)
    edges = torch.arange(21, dtype=torch.float64).div(20) ** (gamma + 1)
    expected = sum(w.double() * part for w, part in zip(history, edges.diff(), strict=True))
    torch.testing.assert_close(ema.profiles[0.1]["weight"].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(ema.average["weight"], module.weight)


def test_in_host_memory_profiles_are_the_same() -> None:
    torch.manual_seed(0)
    module = nn.Linear(300, 300)
    plain, offloaded = (EMA(module, offload=offload, profiles=KEPT) for offload in (False, True))
    for done in walk(module, 6):
        for ema in (plain, offloaded):
            ema.update(0.9, torch.tensor(float(done == 3)), done)
            ema.wait_for_copy()
    for width in KEPT:
        for name, average in plain.profiles[width].items():
            assert torch.equal(average, offloaded.profiles[width][name])
            assert not torch.equal(average, plain.average[name])


@pytest.mark.parametrize("offload", [False, True])
def test_averages_of_weights_in_another_precision_are_float32(offload: bool) -> None:
    averages = []
    for dtype in (torch.float32, torch.float64):
        module = nn.Linear(30, 30, bias=False, dtype=dtype)
        nn.init.zeros_(module.weight)
        ema = EMA(module, offload=offload, profiles=KEPT)
        nn.init.ones_(module.weight)
        ema.update(0.9, torch.tensor(0.0), 3)
        averages.append([of["weight"].clone() for of in (ema.average, *ema.profiles.values())])
    for of_single, of_double in zip(*averages, strict=True):
        assert of_double.dtype is torch.float32
        assert of_single.min() > 0
        assert torch.equal(of_single, of_double)


# ------------------------------------------------------------------------------------------------ which snapshots there are


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("ema/*/COMMIT"))


def test_a_run_that_goes_on_from_earlier_makes_later_snapshots_again(alone: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Small()
    config = EMAConfig(profiles=KEPT, snapshot_steps=10)
    ema = EMA(module, profiles=KEPT)
    snapshots = writer(tmp_path, alone, ema, module, config, total=45)
    snapshots.go_on_from(0, 0)
    assert steps_in(tmp_path) == []
    for done in walk(module, 34):
        ema.update(0.9, torch.tensor(0.0), done)
        if done == 20:
            at_20 = {w: {n: a.clone() for n, a in of.items()} for w, of in ema.profiles.items()}
        if snapshots.due(done):
            snapshots.save(done, done)
    snapshots.finish()
    assert steps_in(tmp_path) == [10, 20, 30]
    undone = tensors(str(tmp_path), 0.05, 30)
    shutil.rmtree(next(tmp_path.glob("ema/step-00000020-*")))  # as if it had not been written yet when the run died
    for width, of_profile in at_20.items():  # what a restore from a checkpoint does
        for name, average in of_profile.items():
            ema.profiles[width][name].copy_(average)
    again = writer(tmp_path, alone, ema, module, config, total=45)
    again.go_on_from(20, 20)
    again.finish()
    assert steps_in(tmp_path) == [10, 20]
    assert torch.equal(tensors(str(tmp_path), 0.05, 20)["layer.weight"], at_20[0.05]["layer.weight"].half().float())
    again.go_on_from(20, 20)
    again.finish()
    assert len(list(tmp_path.glob("ema/step-*"))) == 2, "none twice"
    for done in walk(module, 45, seed=1):
        if done > 20:
            ema.update(0.9, torch.tensor(0.0), done)
            if again.due(done):
                again.save(done, done)
    again.finish()
    assert steps_in(tmp_path) == [10, 20, 30, 40, 45]
    assert not torch.equal(tensors(str(tmp_path), 0.05, 30)["layer.weight"], undone["layer.weight"])


def test_a_snapshot_that_someone_reads_outlasts_a_roll_back(alone: World, tmp_path: Path) -> None:
    """Nobody else takes it any more, and it goes once it is no longer held."""
    module = Small()
    config = EMAConfig(profiles=KEPT, snapshot_steps=10)
    ema = EMA(module, profiles=KEPT)
    snapshots = writer(tmp_path, alone, ema, module, config, total=45)
    for done in walk(module, 30):
        ema.update(0.9, torch.tensor(0.0), done)
        if snapshots.due(done):
            snapshots.save(done, done)
    snapshots.finish()
    [held] = tmp_path.glob("ema/step-00000030-*")
    (held / "HOLD-posthoc-ema-1").touch()
    there = {path.name for path in held.iterdir()}
    for _ in range(2):
        writer(tmp_path, alone, ema, module, config, total=45).go_on_from(10, 10)
        assert {path.name for path in held.iterdir()} == {*there, "SET-ASIDE.json"}
        assert len(list(tmp_path.glob("ema/step-*"))) == 2, "that of step 20 is gone"
        assert [stored.step for stored in StoredAverages(str(tmp_path)).stored] == [10]
    (held / "HOLD-posthoc-ema-1").unlink()
    later = writer(tmp_path, alone, ema, module, config, total=45)
    later.go_on_from(30, 30)
    later.finish()
    assert not held.exists()
    assert steps_in(tmp_path) == [10, 30]


def test_records_are_read_at_once_and_told_in_order(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    damaged = sorted((tmp_path / "run").glob("ema/step-*/manifest.json"))[3:6]
    for manifest in damaged:
        manifest.write_text(manifest.read_text().replace("shard", "shart", 1))
    together = threading.Barrier(2)  # each waits until another is being read, too; they are 32

    def read(*arguments: Any) -> Any:
        together.wait(timeout=120)
        return read_manifest(*arguments)

    monkeypatch.setattr("trainer.posthoc_ema.read_manifest", read)
    stored = StoredAverages(str(tmp_path / "run"))
    assert [s.step for s in stored.stored] == [s for s in range(EVERY, STEPS + 1, EVERY) if s not in (60, 75, 90)]
    assert [line.partition("/manifest.json")[0] for line in stored.damaged] == [str(m.parent) for m in damaged]


def test_keep_snapshots_leaves_the_newest(alone: World, tmp_path: Path) -> None:
    module = Small()
    config = EMAConfig(profiles=KEPT, snapshot_steps=2, keep_snapshots=3)
    ema = EMA(module, profiles=KEPT)
    snapshots = writer(tmp_path, alone, ema, module, config, total=10)
    for done in walk(module, 10):
        ema.update(0.9, torch.tensor(0.0), done)
        if snapshots.due(done):
            snapshots.save(done, done)
    snapshots.finish()
    assert steps_in(tmp_path) == [6, 8, 10]


def test_values_that_float16_cannot_hold(alone: World, tmp_path: Path) -> None:
    module = Small()
    with torch.no_grad():
        module.layer.bias[0] = 1e5
    ema = EMA(module, profiles=KEPT)
    snapshots = writer(tmp_path, alone, ema, module, total=1)
    ema.update(0.9, torch.tensor(0.0), 1)
    snapshots.save(1, 1)
    snapshots.finish()
    assert "float16 cannot hold" in snapshots._reports.lines[0]  # type: ignore[attr-defined]
    assert tensors(str(tmp_path), 0.05)["layer.bias"][0] == 1e5


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("width", "step", "message"),
    [
        (0.3, None, "sigma_rel: 0.3 is not between 0 and 0.2887"),
        (0.004, None, r"the nearest of 32 snapshots is off by \d+%"),
        (0.08, 481, "step 481: snapshots of .* are of steps 15 to 480"),
        (0.08, 14, "step 14: snapshots of .* are of steps 15 to 480"),
    ],
)
def test_averages_that_are_not_to_be_had(trained: Any, width: float, step: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        tensors(str(trained[0]), width, step)
    assert "\n" not in str(e.value)


def test_no_snapshots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no snapshots of averages; .* ema\.profiles and ema\.snapshot_steps"):
        tensors(str(tmp_path), 0.1)


def test_damage_is_found(trained: Any, tmp_path: Path) -> None:
    folder, end, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    [manifest] = (tmp_path / "run").glob("ema/step-00000465-*/manifest.json")
    manifest.write_text(manifest.read_text().replace("shard", "shart", 1))
    stored = StoredAverages(str(tmp_path / "run"))
    assert len(stored.stored) == STEPS // EVERY - 1
    assert "manifest" in stored.damaged[0]
    assert relative(dict(stored.read(stored.plan(THIRD))), end) < 4e-4, "the others take its place"
    [shard] = (tmp_path / "run").glob("ema/step-00000480-*/shard-00000.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"a snapshot is damaged .*checksum does not match.*remove its folder"):
        dict(stored.read(stored.plan(0.08)))
    assert not list((tmp_path / "run").glob("ema/*/HOLD-*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profiles": (0.1,), "snapshot_steps": 5}, "two or more profiles"),
        ({"profiles": (0.1, 0.1)}, "each width once"),
        ({"profiles": (0.3,)}, "less than or equal to 0.25"),
    ],
)
def test_configs_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAConfig(**fields)


# --------------------------------------------------------------------------------------------------------------- command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, arguments)


def test_command(trained: Any, tmp_path: Path) -> None:
    folder, end, _ = trained
    listed = run(str(folder))
    assert listed.output.startswith("32 snapshots of steps 15 to 480, of widths 0.05, 0.1, 0.075")
    swept = run(str(folder), "--sweep", "0.004, 0.08")
    assert swept.exit_code == 0
    first, second = swept.output.splitlines()
    assert first.startswith("not to be had: sigma_rel 0.004 at step 480: ")
    assert second.startswith("sigma_rel 0.08 at step 480: ")
    out = tmp_path / "new" / "weights.safetensors"
    assert run(str(folder), "--sigma-rel", str(THIRD), "--out", str(out)).exit_code == 0
    found = load_file(out)
    assert relative(found, end) < 4e-4
    assert found["seen"].tolist() == [3, 4]
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert (about["step"], about["sigma_rel"]) == ("480", "0.075")
    assert sum(weight for _, _, weight in json.loads(about["averages"])) == pytest.approx(1.0)
    again = run(str(folder), "--sigma-rel", "0.08", "--out", str(out))
    assert isinstance(again.exception, UserError)
    assert "--overwrite" in str(again.exception)
    assert (
        run(str(folder), "--sigma-rel", "0.08", "--out", str(out), "--overwrite", "--dtype", "bfloat16").exit_code == 0
    )
    assert load_file(out)["layer.weight"].dtype == torch.bfloat16
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("earlier", [b"", b"an earlier one"], ids=["new", "overwritten"])
def test_command_that_fails_leaves_no_part_of_a_file(trained: Any, tmp_path: Path, earlier: bytes) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    [shard] = (tmp_path / "run").glob("ema/step-00000480-*/shard-00000.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    out = tmp_path / "out" / "w.safetensors"
    out.parent.mkdir()
    if earlier:
        out.write_bytes(earlier)
    words = [str(tmp_path / "run"), "--sigma-rel", "0.08", "--out"]
    assert "is damaged" in str(run(*words, str(out), "--overwrite").exception)
    assert {p.name: p.read_bytes() for p in out.parent.iterdir()} == ({out.name: earlier} if earlier else {})
    store = fsspec.filesystem("memory")
    assert "is damaged" in str(run(*words, "memory://partial/w.safetensors").exception)
    assert not store.exists("/partial/w.safetensors")


def test_command_on_an_object_store(trained: Any) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(trained[0]), "/posthoc/run", recursive=True)
    try:
        done = run("memory://posthoc/run", "--sigma-rel", str(THIRD), "--out", "memory://posthoc/out/w.safetensors")
        assert done.exit_code == 0, done.output
        assert relative(load(store.cat_file("/posthoc/out/w.safetensors")), trained[1]) < 4e-4
        assert not [name for name in store.find("/posthoc/run/ema") if "HOLD" in name]
    finally:
        store.rm("/posthoc", recursive=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sigma-rel", "0.08"), "--out: name the file"),
        (("--sigma-rel", "0.3", "--out", "x.safetensors"), "--sigma-rel: 0.3 is not between 0 and"),
        (("--sigma-rel", "0.004", "--out", "x.safetensors"), "--sigma-rel 0.004 at step 480: the nearest of 32"),
        (("--sigma-rel", "0.08", "--at", "481", "--out", "x.safetensors"), "--at 481: snapshots of"),
        (("--sigma-rel", "0.08", "--out", "x/y.pt"), "ends in .safetensors"),
        (("--sweep", "0.1,wide"), "'wide' is no number"),
        (("--sweep", ","), "names no width"),
        (("--sweep", "0.1", "--out", "x.safetensors"), "writes nothing"),
    ],
)
def test_command_with_bad_options(trained: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(str(trained[0]), *arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_a_run_without_profiles_has_the_digest_that_it_had_before_there_were_any() -> None:
    found = _numbers(recipe("demo"))
    assert found["ema"] == {"start_step": 50}
    assert "validation" not in found
    assert _numbers(with_overrides(recipe("demo"), ["ema.profiles=[0.05,0.1]"]))["ema"]["profiles"] == [0.05, 0.1]
