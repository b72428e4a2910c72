"""Who may import whom (docs/architecture.md). Imports inside functions count too, except in composition roots."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("trainer", "launch", "data", "ops")
ROOTS = ("launch.cli", "launch.commands", "data.cli", "data.commands", "ops.bench")
"""Composition roots: may import anything, lazily, and nothing imports them."""
LEAVES = (
    "trainer.background", "trainer.checkpoint.errors", "trainer.config", "trainer.config_text", "trainer.discovery",
    "trainer.errors", "trainer.exporter", "trainer.garbage", "trainer.goodput", "trainer.metric_names",
    "trainer.metrics_server", "trainer.phases", "trainer.recipes", "trainer.restarts", "trainer.run_folder",
    "trainer.run_names", "trainer.secret_names", "trainer.slurm_environment", "trainer.urls",
)  # fmt: skip
LIBRARIES_OF_LEAVES = {"pydantic", "yaml", "fsspec", "prometheus_client"}

ALLOWED = {
    "data": (
        "data", "trainer.metric_names", "trainer.errors", "trainer.exporter", "trainer.discovery", "trainer.garbage",
        "trainer.urls",
    ),
    "launch": (
        "launch", "trainer.checkpoint.folder", "trainer.checkpoint.manifests",
        "trainer.checkpoint.records", "data.deadlines", "data.demands", "data.schema", "data.storage", "data.wds", *LEAVES,
    ),
    "ops": ("ops", *LEAVES),
    "trainer.diffusion": ("trainer.diffusion", *LEAVES),
    "trainer.models": ("trainer.models", *LEAVES),
    "trainer.losses": ("trainer.losses", "trainer.diffusion", "trainer.models", "trainer.readback", *LEAVES),
    "trainer.parallel": ("trainer.parallel", *LEAVES),
    "trainer.checkpoint": ("trainer.checkpoint", *LEAVES),
    "trainer": (
        "trainer",
        "data.schema",
        "data.demands",
        "data.encode.columns",
        "data.encode.stored",
        "data.draws",
        "data.plan",
        "data.epochs",
        "data.buckets",
        "data.batches",
        "data.forkserver",
        "data.loader",
        "data.reader",
        "data.images",
        "data.transforms",
    ),
}  # fmt: skip
"""By the longest matching prefix of the importer. trainer never imports the ingest side of data, nor launch."""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of what is imported: of `from a import b`, a.b where that is a module of ours, else a."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return frozenset(names)


@pytest.mark.parametrize("module", [m for m in MODULES if not within(m, ROOTS) and m not in PACKAGES])
def test_arrows(module: str) -> None:
    ours = {name for name in imports(MODULES[module]) if name.split(".")[0] in PACKAGES}
    assert not {name for name in ours if within(name, ROOTS)}, "nothing imports a composition root"
    if within(module, LEAVES):
        assert not {name for name in ours if not within(name, LEAVES)}
        libraries = (
            {name.split(".")[0] for name in imports(MODULES[module])} - {"trainer"} - set(sys.stdlib_module_names)
        )
        assert libraries <= LIBRARIES_OF_LEAVES
        return
    owner = max((p for p in ALLOWED if within(module, (p,))), key=len)
    wrong = {name for name in ours if not within(name, ALLOWED[owner])}
    assert not wrong, f"{module} may import {', '.join(ALLOWED[owner])}"


def test_every_room_is_watched() -> None:
    assert len(MODULES) > 30
    assert imports(MODULES["trainer.run"]) >= {"trainer.errors", "data.loader", "torch"}


def test_no_module_hides_a_package_we_import() -> None:
    """`python launch/slurm.py` puts `launch/` first on the path: a `launch/submitit.py` would be found before submitit."""
    third_party = {name.split(".")[0] for path in MODULES.values() for name in imports(path)} - set(PACKAGES)
    stems = {path.stem for package in PACKAGES for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert not stems & third_party


IMPORTING = f"""
import importlib, sys
for name in sys.argv[1:]:
    for ours in [m for m in sys.modules if m.partition(".")[0] in {PACKAGES}]:
        del sys.modules[ours]
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{{name}} imports torch")
"""
"""Each module as the first of ours, in one process."""


def test_submitting_never_imports_torch() -> None:
    modules = [*LEAVES, "launch.cli", "launch.slurm", "trainer.train"]
    result = subprocess.run(
        [sys.executable, "-c", IMPORTING, *modules], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", sorted(m for m in MODULES if not within(m, ("ops.bench",))))
def test_importing_does_nothing(module: str) -> None:
    """No module calls at its top level what reads the environment, makes folders or talks to a device."""
    banned = {"makedirs", "mkdir", "getenv", "is_available", "init_process_group", "set_num_threads", "urlopen"}
    body = parsed(MODULES[module]).body
    top = [n for n in body if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.If)]
    called = {
        n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
        for statement in top
        for n in ast.walk(statement)
        if isinstance(n, ast.Call)
    }
    assert not called & banned
