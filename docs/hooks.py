"""What the site needs beyond Markdown: help texts by running the commands, notebooks, and files outside of docs/.

A page says `<!-- run: hilora --help -->` where the output of that command is to stand, and
`<!-- settings of methods -->` where a table of these is. A link to a file outside of docs/ works as it does in the
repository: the file is a page or a download of the site. A notebook is a page, with the outputs that are in it.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/experiments/*.md", "benchmarks/results/*.md")
"""Markdown outside of docs/ that is part of the site."""
RUN = re.compile(r"^<!-- run: (?P<command>.+?) -->$", re.MULTILINE)
SETTINGS = "<!-- settings of methods -->"
LINK = re.compile(r"(?P<before>\]\()(?P<path>[^)#\s:]+)(?P<after>#[^)\s]*)?(?=\))")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/, and those made of notebooks."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(_outside(path.relative_to(ROOT).as_posix(), config))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            for name, content in notebook(file).items():
                files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the output of commands into a page, and lets its links find files outside of docs/."""

    def link(match: re.Match[str]) -> str:
        path = _in_site(match["path"], page.file, config, files)
        return f"{match['before']}{path}{match['after'] or ''}"

    code = [(match.start(), match.end()) for match in CODE.finditer(markdown)]

    def outside_of_code(match: re.Match[str]) -> str:
        return match[0] if any(start <= match.start() < end for start, end in code) else link(match)

    markdown = LINK.sub(outside_of_code, markdown)
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, settings())
    with ThreadPoolExecutor() as pool:  # they take seconds each
        list(pool.map(output, RUN.findall(markdown)))
    return RUN.sub(lambda match: f"```console\n$ {match['command']}\n{output(match['command'])}\n```", markdown)


@cache
def output(command: str) -> str:
    """What a command prints: `hilora …` or `python …`, by this Python, in the root of the repository.

    Raises:
        PluginError: if it fails, which ends the build.
    """
    program, *arguments = shlex.split(command)
    start = {"python": [sys.executable], "hilora": [sys.executable, "-m", "hilora"]}[program]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PluginError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout.rstrip()


def notebook(file: File) -> dict[str, str | bytes]:
    """A notebook as Markdown, and the pictures in its outputs, by their paths in the site."""
    stem = file.src_uri.removesuffix(".ipynb")
    parts: list[str] = []
    pictures: dict[str, str | bytes] = {}
    about = ""  # the last heading, which says what a picture is of
    for cell in json.loads(file.content_string)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            about = (re.findall(r"^#+ (.+)$", text, re.MULTILINE) or [about])[-1]
            continue
        parts.append(f"```python\n{text}\n```")
        printed = "".join("".join(one["text"]) for one in cell["outputs"] if one["output_type"] == "stream")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        for data in (one["data"] for one in cell["outputs"] if "image/png" in one.get("data", {})):
            name = f"{stem}-{len(pictures)}.png"
            pictures[name] = base64.b64decode("".join(data["image/png"]))
            parts.append(f"![{about}: what the code above draws]({posixpath.basename(name)})")
    parts.insert(1, f"This page is a notebook: [download it]({posixpath.basename(file.src_uri)}).")
    return {f"{stem}.md": "\n\n".join(parts), **pictures}


def settings() -> str:
    """What each method can be told, as a table."""
    from hilora.cli.fields import described
    from hilora.federated.strategies import STRATEGIES, own_fields

    rows = [
        f"| {method} | `{name}` | {described(field)} |"
        for method, kind in STRATEGIES.items()
        for name, field in own_fields(kind).items()
    ]
    return "\n".join(["| method | setting | what it is (default) |", "| :-- | :-- | :-- |", *rows])


def _outside(path: str, config: MkDocsConfig) -> File:
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls)


def _in_site(link: str, file: File, config: MkDocsConfig, files: Files) -> str:
    """A link of a page as the site has it, where docs/ is the root; a file outside of docs/ is added to the site."""
    here = file.src_uri if file.src_dir == str(ROOT) else DOCS + file.src_uri
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    source = target.removeprefix(DOCS)
    if files.get_file_from_path(source) is None and source == target and (ROOT / target).is_file():
        if target.endswith(".md"):
            raise PluginError(f"{here} links {target}, which is no page: add it to PAGES in {DOCS}hooks.py and to nav")
        files.append(_outside(target, config))
    return posixpath.relpath(source, posixpath.dirname(file.src_uri) or ".")
