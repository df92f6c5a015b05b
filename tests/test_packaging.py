"""The source distribution and the wheel made from it have all of the library, and work without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hilora

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
USE = """
import torch, hilora, hilora.kernels
from hilora.models.backbone import load_backbone
from torch import nn
assert hilora.__file__.startswith({site!r}), hilora.__file__
assert hilora.kernels.__file__.startswith({site!r}), hilora.kernels.__file__
base = nn.Linear(16, 8)
layer = hilora.TieredLoRALinear(base, r=4, lora_alpha=8)
x = torch.randn(3, 16)
assert torch.equal(layer(x), base(x))
hilora.set_active_tier(layer, "leaf")
layer(x).sum().backward()
assert layer.lora_B["leaf"].shape == (8, 4)
assert load_backbone("glyph_vit").features == 96
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source distribution, and of the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):  # a copy, so that the build leaves nothing in the tree
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    python("build", "--no-isolation", "--outdir", str(folder), str(source))
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("hilora-*.whl"))


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_module_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hilora/")}
    modules = {f"hilora/{path.relative_to(ROOT / 'hilora')}" for path in (ROOT / "hilora").rglob("*.py")}
    modules |= {f"hilora/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    extra = {
        "hilora/__init__.pyi",
        "hilora/py.typed",
        "hilora/kernels/py.typed",
        "hilora/kernels/emulator/libcuda.c",
        "hilora/kernels/stacked_linear/devices.json",
        "hilora/models/assets/glyph_vit.safetensors",
    }
    extra |= {"hilora/experiments/defaults.json"}
    extra |= {"hilora/reporting/assets/report.css", "hilora/reporting/assets/report.js"}
    assert packed == modules | extra


def test_the_installed_wheel_runs_the_layer_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    python("pip", "install", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = USE.format(site=str(site))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = [sys.executable, "-m", "hilora", "--version"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"hilora {hilora.__version__}\n"


def test_an_index_of_packages_takes_both(built: Path) -> None:
    both = [str(path) for path in sorted(built.glob("hilora-*")) if path.is_file()]
    assert [Path(path).suffix for path in both] == [".whl", ".gz"]
    assert python("twine", "check", "--strict", *both).count("PASSED") == 2


def test_there_is_one_version() -> None:
    assert f"version: {hilora.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {hilora.__version__}" in (ROOT / "CHANGELOG.md").read_text() or hilora.__version__.endswith("dev")


def test_a_command_whose_package_is_missing_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['tqdm'] = None; from hilora.cli.main import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "hilora env needs tqdm: pip install 'hilora[federated]'\n"
