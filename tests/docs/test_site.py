"""The site builds without a warning, needs nothing from elsewhere, and can be read by all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

import hilora
from hilora.cli.main import COMMANDS
from hilora.federated.strategies import STRATEGIES, own_fields
from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow

ASSETS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page loads, its headings and pictures, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.alts: list[str | None] = []
        self.titles = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ASSETS:
            self.assets.append(found.get(ASSETS[tag]) or "")
        if tag == "img":
            self.alts.append(found.get("alt"))
        self.titles += tag == "h1"


def build(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link, or a page that nobody finds, is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_has_one_title_and_every_picture_a_description(site: Path) -> None:
    found = pages(site)
    assert len(found) > 30
    assert {name: page.titles for name, page in found.items() if page.titles != 1} == {}
    assert [name for name, page in found.items() if not all(page.alts)] == []
    assert sum(len(page.alts) for page in found.values()) > 30


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for name, page in pages(site).items():
        assert page.assets, name
        assert [asset for asset in page.assets if re.match(r"(https?:)?//", asset)] == [], name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_help_stands_as_the_commands_print_it(site: Path) -> None:
    text = (site / "reference/command-line/index.html").read_text(encoding="utf-8")
    assert "<!-- run:" not in text
    text = re.sub(r"<[^>]+>", "", text)
    assert "--images-per-client" in text
    for command in COMMANDS:
        assert f"usage: hilora {command}" in text


def test_settings_of_methods_are_listed(site: Path) -> None:
    text = (site / "reference/strategies/index.html").read_text(encoding="utf-8")
    for kind in STRATEGIES.values():
        for name in own_fields(kind):
            assert f"<code>{name}</code>" in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/tutorials/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_a_page_with_its_outputs(site: Path, path: Path) -> None:
    folder = site / "tutorials" / path.stem
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    text = unescape(re.sub(r"<[^>]+>", "", (folder / "index.html").read_text(encoding="utf-8")))
    for output in outputs:
        if output.output_type == "stream":
            assert output.text.rstrip() in text
    pictures = [output for output in outputs if output.output_type == "display_data"]
    assert len(list(folder.parent.glob(f"{path.stem}-*.png"))) == len(pictures) > 0
    assert (folder.parent / path.name).read_bytes() == path.read_bytes()


def test_everything_public_has_its_place_in_the_reference(site: Path) -> None:
    public = {f"hilora.{name}" for name in dir(hilora) if not name.startswith("_")} | {
        f"hilora.kernels.{name}" for name in hilora.kernels.__all__
    }
    public -= {"hilora.aggregation", "hilora.clustering", "hilora.kernels"}  # modules, whose functions are there
    for short in (hilora.aggregation, hilora.clustering):
        public |= {f"{getattr(short, name).__module__}.{name}" for name in short.__all__}
    ids = re.compile(r'id="([\w.]+)"')
    found = {
        name for path in site.glob("reference/*/index.html") for name in ids.findall(path.read_text(encoding="utf-8"))
    }
    assert public - found == set()


def test_files_of_the_repository_that_pages_link_are_there(site: Path) -> None:
    for name in (
        "examples/drop_in_layers.py",
        "benchmarks/experiments/methods.toml",
        "benchmarks/results/figures.jsonl",
    ):
        assert (site / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A site of one page with our hook and checks."""
    (tmp_path / "docs").mkdir()
    kept = re.sub(r"^nav:.*", "", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE | re.DOTALL)
    hooks = ROOT / "docs" / "hooks.py"
    (tmp_path / "mkdocs.yml").write_text(kept.replace("docs/hooks.py", str(hooks)))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](../gone.md)", "gone.md"),
        ("[no such heading](#nowhere)", "#nowhere"),
        ("<!-- run: python -c 'raise SystemExit(3)' -->", "ended with 3"),
        ("::: hilora.nothing", "hilora.nothing"),
    ],
)
def test_a_page_that_is_wrong_ends_the_build(small: Path, text: str, said: str) -> None:
    (small / "docs" / "index.md").write_text(f"# A page\n\n{text}\n")
    done = build(small / "site", small)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
