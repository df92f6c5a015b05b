"""The page of a run: what it says, of every kind of run, and that nothing in it can do harm."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest

from hilora.reporting.run_page.charts import MOST, axis, numbered, spaced
from tests.reporting.pages import HOSTILE, make_page, make_rounds, make_run
from tests.reporting.test_comparison import FEDIT, GROUPS, make_summary

MISSING = {"mean": None, "tail": None, "std": None}


class Reader(HTMLParser):
    """The elements of a page, their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def said(self, tag: str) -> list[str]:
        return [text for one, text in self.texts if one == tag]


def data(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.split('id="data">')[1].split("</script>")[0])
    return found


def test_it_says_what_was_run_and_what_came_of_it() -> None:
    text = make_page(rounds={"root": 2, "leaf": 1}, target_modules=["q", "v"], seed=0)
    page = Reader(text)
    assert page.said("h1") == ["hilora on cifar100, sc-dir, seed 0"]
    assert page.said("h2") == [
        *("What was run", "Final figures", "Accuracy over the rounds", "Clients", "Clusters", "Traffic", "Time")
    ]
    described = dict(zip(page.said("dt"), page.said("dd"), strict=True))
    assert described["accuracy, mean of clients"] == "93.4 %"
    assert described["clients"] == "8, and 2 unseen"
    assert described["parameters that a client trains"] == "12,345"
    assert described["rounds"] == "root 2, leaf 1"  # of the settings, which stand last
    assert described["target modules"] == "q, v"
    assert page.said("dt").count("seed") == 1
    assert {"80.0", "93.4", "81.1", "85.9"} <= set(page.said("td"))


def test_the_rounds_are_drawn_with_the_borders_of_their_stages() -> None:
    text = make_page()
    assert text.count("class=border") == 2 + 1  # and one between seen and unseen clients
    assert [name for name in ("root", "cluster", "leaf") if f'text-anchor="middle">{name}</text>' in text] == [
        *("root", "cluster", "leaf")
    ]
    mean = re.search('<path class=mean data-series=mean d="M(.*?)"/>', text)
    assert mean is not None
    places = [float(number) for number in mean[1].split()]
    assert places[::2] == pytest.approx([1000 * (n + 0.5) / 6 for n in range(6)], abs=0.1)
    assert places[1::2] == sorted(places[1::2], reverse=True)  # accuracy rises, and y falls
    points = data(text)["rounds"]
    assert points[-1]["text"].startswith("round 6, leaf: mean of the clients 90.0 %, worst tenth of them 25.0 %")


def test_clients_stand_by_gain_the_unseen_ones_apart() -> None:
    text = make_page()
    page, points = Reader(text), data(text)["clients"]
    assert [point["row"] for point in points] == ["7", "6", "5", "4", "3", "2", "1", "0", "8", "9"]
    assert points[0]["text"] == "client 7, seen, trees, cluster 1: 57.0 % (before 50.0 %, gain +7.0)"
    assert points[-1]["text"] == "client 9, unseen, trees, cluster 0: 37.5 % (before 25.0 %, gain +12.5)"
    bars = [shown["class"] for tag, shown in page.elements if tag == "rect"]
    assert bars == ["seen"] * 8 + ["unseen"] * 2
    assert page.said("title")[1:] == [point["text"] for point in points]  # the first is the window's
    assert "Gain of each client, leaf less root, in points" in page.said("figcaption")


def test_clusters_traffic_and_time() -> None:
    page = Reader(make_page())
    shares = [shown["style"] for tag, shown in page.elements if shown.get("class") == "heat"]
    assert shares == ["--share:1.000", "--share:1.000"]  # four fish in cluster 0, four trees in cluster 1
    assert any("adjusted Rand index" in text and "0.50" in text for text in page.said("p"))
    cells = page.said("td")
    start = cells.index("2.0 MB")
    moved = ["2.0 MB", "4.0 MB"] * 3 + ["6.0 MB", "12.0 MB"] * 2  # three stages, all of them, an unseen client
    assert cells[start : start + 10] == moved
    assert [cell for cell in cells if cell.endswith(" s")] == ["8.0 s", "4.0 s", "0.5 s", "0.2 s"]
    assert "Training took in 4,321 images a second." in page.said("p")


def odd_runs() -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    nothing: dict[str, Any] = {
        "tiers": {},
        "final": MISSING,
        "unseen": {"zero_leaf": None, "leaf": None},
        "clusters": None,
    }
    unmeasured = [{**record, "test": MISSING, "val": None, "loss": None} for record in make_rounds()]
    whole = make_run()
    nan = {**whole["per_client"], "test": [float("nan"), None, *whole["per_client"]["test"][2:]]}
    untold = [{key: value for key, value in record.items() if key not in ("up", "down")} for record in make_rounds()]
    return {
        "nothing trained": (make_run(0, 0, 0, interrupted=True, per_client={}, per_client_by_tier={}, **nothing), []),
        "an earlier version": (make_summary(), untold),
        "one tier": (FEDIT, make_rounds(1)),
        "one tier, with clients": ({**make_run(), "per_client_by_tier": {"root": [0.5] * 8}}, make_rounds()),
        "none unseen": (make_run(late=0), make_rounds()),
        "no clusters": (make_run(clusters=None), make_rounds()),
        "one client": (make_run(1, 0, 1, 1), make_rounds(1)),
        "nothing measured": (make_run(), unmeasured),
        "NaN": (make_run(per_client=nan), make_rounds()),
        "nobody has test images": (
            make_run(per_client={"ids": [0, 1], "test": [None, None]}, per_client_by_tier={"root": [None, None]}),
            unmeasured,
        ),
        "no time at all": (make_run(seconds_by_phase=dict.fromkeys(("train", "evaluate", "group", "write"), 0.0)), []),
        "no traffic": (
            make_run(communication={"up": 0, "down": 0, "per_client": {"up": [0] * 10, "down": [0] * 10}}),
            [],
        ),
    }


@pytest.mark.parametrize("kind", list(odd_runs()))
@pytest.mark.parametrize("names", [("fish", "trees"), ()], ids=["groups", "no groups"])
def test_every_kind_of_run_has_a_page(kind: str, names: tuple[str, ...]) -> None:
    summary, records = odd_runs()[kind]
    text = make_page(summary, records, names)
    page = Reader(text)
    assert len(page.said("h2")) == 7
    assert "nan" not in re.sub("<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL).lower()
    assert ("interrupted" in text) == (kind == "nothing trained")
    for svg in re.findall("<svg class=plot.*?</svg>(?=\n<output>)", text, re.DOTALL):
        ElementTree.fromstring(re.sub(r"(class|data-series)=(\w+)", r'\1="\2"', svg).replace(" hidden ", " "))


def test_names_are_text_whatever_they_say() -> None:
    summary = make_run(strategy=HOSTILE, data=HOSTILE, partition=HOSTILE, backbone=HOSTILE)
    records = [{**record, "stage": HOSTILE} for record in make_rounds()]
    settings: dict[str, Any] = {HOSTILE: {HOSTILE: [HOSTILE]}}
    text = make_page(summary, records, (HOSTILE, HOSTILE + "2"), **settings)
    page = Reader(text)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 2  # the data, and what reads them
    assert not [tag for tag, _ in page.elements if tag == "b"]
    assert not [name for _, shown in page.elements for name in shown if name.startswith("on")]
    assert HOSTILE in page.said("h1")[0]
    assert any(HOSTILE in point["text"] for point in data(text)["clients"])


def test_it_needs_nothing_from_elsewhere() -> None:
    page = Reader(make_page())
    assert not [shown for _, shown in page.elements if {"src", "href"} & set(shown)]
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "img")]


def test_what_is_drawn_and_tabled_has_a_name() -> None:
    page = Reader(make_page())
    assert all(shown.get("aria-label") for tag, shown in page.elements if shown.get("role") == "img")
    assert sum(shown.get("role") == "img" for _, shown in page.elements) == 2
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert sum(tag == "caption" for tag, _ in page.elements) == tables
    assert all(shown.get("scope") for tag, shown in page.elements if tag == "th")


@pytest.mark.parametrize("seen", [1000, 5000])
def test_a_page_of_many_clients_and_rounds_is_small(seen: int) -> None:
    text = make_page(make_run(seen, seen // 4, 3000, k=40), make_rounds(3000))
    assert len(text.encode()) < 3e6
    found = data(text)
    assert len(found["clients"]) == len(found["rounds"]) == MOST
    assert f"{MOST} of {seen + seen // 4} clients are shown" in text
    assert found["rounds"][0]["text"].startswith("round 1,")
    assert found["rounds"][-1]["text"].startswith("round 3000,")


def test_what_is_thinned_out_keeps_its_ends() -> None:
    assert spaced([1, 2]) == [1, 2]
    thin = spaced(range(3 * MOST))
    assert (thin[0], thin[-1], len(thin)) == (0, 3 * MOST - 1, MOST)
    assert thin == sorted(set(thin))


def test_axes_have_round_numbers_and_hold_what_they_show() -> None:
    assert axis([31.0, 89.0], 0, 100).ticks == (20.0, 40.0, 60.0, 80.0, 100.0)
    assert axis([99.5, 100.0], 0, 100).high == 100
    for values in ([], [0.0], [5.0, 5.0], [-3.0, 12.0]):
        found = axis(values)
        assert found.low < found.high
        assert all(found.low <= value <= found.high for value in values)
        assert 2 <= len(found.ticks) <= 8
    assert [text for _, text in numbered(1, 14)] == ["2", "4", "6", "8", "10", "12", "14"]
    assert numbered(1, 1) == [(0.5, "1")]
    assert len(numbered(1, 1000)) <= 7


def test_clients_of_each_budget_have_a_row_where_there_are_budgets() -> None:
    page = make_page(make_run(budgets=GROUPS))
    assert "<h2>Budgets</h2>" in page
    assert "<th scope=row class=left>2 ranks/6 layers</th>" in page
    for cell in ("90.0", "81.2 kB", "3.21", "12,345"):
        assert f"<td>{cell}</td>" in page
    assert "parameters that a client trains, at most" in page
    assert "Budgets" not in make_page()
    assert "at most" not in make_page()
