"""The page of a run as headless Chromium shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.pages import HOSTILE, make_page, make_rounds, make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
)

# The page stands in a frame of a width, since a window has a least one; an outer script does what a reader would.
FRAME = """<!doctype html>
<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{page}"></iframe>
<pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument;
  const found = (() => {{ {code} }})();
  document.querySelector("pre").textContent = JSON.stringify(found);
}});
</script>
"""


def browse(folder: Path, page: str, code: str, width: int = 1280) -> Any:
    """What JavaScript finds on a page, `page` in it; its errors are ours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH: no browser to look at a page with")
    path = folder / "frame.html"
    path.write_text(FRAME.format(width=width, page=escape(page), code=code), encoding="utf-8")
    command = [browser, *OPTIONS, f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    said = re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert said is not None
    assert said[1], done.stderr
    return json.loads(unescape(said[1]))


def test_errors_of_a_page_are_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CONSOLE"):
        browse(tmp_path, "<!doctype html><script>nonsense()</script>", "return 1")


def test_a_client_and_a_series_can_be_picked_and_clients_sorted(tmp_path: Path) -> None:
    code = """
      const rows = () => [...page.querySelectorAll("#clients tbody tr")].map((row) => row.cells[0].textContent);
      const heads = [...page.querySelectorAll("#clients thead th")];
      const press = (name) => heads.find((head) => head.textContent === name).querySelector("button").click();
      const chosen = () => page.querySelector("#clients .chosen").cells[0].textContent;
      const [rounds, clients] = page.querySelectorAll("figure");
      const found = { first: rows(), chosen: [chosen()], said: [rounds.querySelector("output").textContent] };
      press("client"); found.client = rows();
      press("client"); found.down = rows();
      found.sorted = heads[0].getAttribute("aria-sort");
      press("before, %"); found.before = rows();
      press("cluster"); found.cluster = rows();
      page.querySelector("#clients tbody tr:nth-child(3)").click(); found.chosen.push(chosen());
      const slider = rounds.querySelector("input[type=range]");
      slider.value = 1; slider.dispatchEvent(new Event("input"));
      found.said.push(rounds.querySelector("output").textContent);
      const box = rounds.querySelector(".plot").getBoundingClientRect();
      rounds.querySelector(".plot").dispatchEvent(new MouseEvent("pointermove", { clientX: box.left + 1 }));
      found.said.push(rounds.querySelector("output").textContent);
      rounds.querySelector(".legend input[value=tail]").click();
      found.tail = getComputedStyle(rounds.querySelector("path.tail")).display;
      found.mean = getComputedStyle(rounds.querySelector("path.mean")).display;
      return found;
    """
    summary = make_run(seen=11, late=1)
    summary["per_client_by_tier"]["root"][4] = None
    found = browse(tmp_path, make_page(summary), code)
    numbers = list(map(str, range(12)))
    assert found["first"] == ["10", "9", "8", "7", "6", "5", "3", "2", "1", "0", "4", "11"]
    assert found["client"] == numbers  # as numbers: "10" stands after "9"
    assert found["down"] == numbers[::-1]
    assert found["sorted"] == "descending"
    assert found["before"][0] == "11"
    assert found["before"][-1] == "4"  # what is missing stands last
    assert set(found["cluster"][:7]) == {"0", "2", "4", "6", "8", "10", "11"}
    assert found["chosen"] == ["10", found["cluster"][2]]
    assert [text.split(":")[0] for text in found["said"]] == ["round 6, leaf", "round 2, root", "round 1, root"]
    assert (found["tail"], found["mean"]) == ("none", "inline")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_its_window(tmp_path: Path, width: int) -> None:
    """With names that are hostile or long, and many clients, clusters and stages; and nothing of them runs."""
    summary = make_run(seen=300, late=60, k=40, strategy=HOSTILE, data="a" * 200)
    records = [{**record, "stage": f"a stage {record['round']} of its own"} for record in make_rounds(12)]
    page = make_page(summary, records, (HOSTILE, "a rather long name of a group " * 4), target_modules=["q" * 300])
    code = """
      page.querySelectorAll("details").forEach((one) => (one.open = true));
      const root = page.documentElement;
      return { wide: root.scrollWidth, tall: root.scrollHeight, plots: [...page.querySelectorAll(".plot")].map(
        (plot) => plot.getBoundingClientRect().width), title: page.querySelector("h1").textContent };
    """
    found = browse(tmp_path, page, code, width)
    assert found["wide"] <= width
    assert found["tall"] > 2000
    assert all(0.7 * width < plot < width or plot > 900 for plot in found["plots"])
    assert HOSTILE in found["title"]
