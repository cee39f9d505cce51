"""The outlier report against findings made by hand: its numbers, its pixels, what it lets in and out."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_findings import BLOCKS, made_findings, two_targets
from PIL import Image

from dsr_scale.evaluate import outlier_figures as figures
from dsr_scale.evaluate.outlier_report import write_report
from dsr_scale.evaluate.outlier_statistics import MEASURES

HOSTILE = '<script>alert(1)</script>" onload="x" $a_1$ & \ud800'
FOREIGN = ("photo.png", "my_histograms.png", "norm_maps_t.png", "norm_maps_t0.1.jpg")
"""Files that lie among a report's figures and are not its own."""


class Page(HTMLParser):
    """Elements, and the text of every table cell, of one page; complains of what does not nest."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br" and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


DPI = 60
"""Instead of that of papers, which takes its time."""


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    assert figures.DPI == 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", DPI)
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, coarse: None) -> tuple[Path, Page]:
    """A report of two targets, and its page."""
    out = tmp_path_factory.mktemp("report")
    path = write_report(two_targets(), out)
    return out, Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory, report: tuple[Path, Page]
) -> tuple[Path, Page]:
    """A report of one encoder, all of whose texts would like to be markup, where another one was."""
    out = tmp_path_factory.mktemp("hostile")
    shutil.copytree(report[0] / "figures", out / "figures")
    for name in FOREIGN:
        (out / "figures" / name).write_bytes(b"mine")
    found = dataclasses.replace(
        made_findings("encoder", seed=3, registers=False, steps=0),
        name=HOSTILE,
        blocks=("<b>0</b>", *BLOCKS[1:]),
        settings={"data": HOSTILE, HOSTILE: [HOSTILE, 1]},
        captions=(HOSTILE, '<img src="https://example.org/x.png">'),
    )
    path = write_report([found], out)
    return out, Page(path.read_text(encoding="utf-8"))


def test_summary_has_the_numbers_of_the_findings(report: tuple[Path, Page]) -> None:
    rows = {row[0].splitlines()[0]: row[1:] for row in report[1].rows if "\n" in row[0]}
    assert set(rows) == set(MEASURES)
    for number, found in enumerate(two_targets()):
        places = [(block, step) for block in range(len(BLOCKS)) for step in range(2)]
        worst = max(places, key=lambda place: found.measures["outlier_ratio"][place])
        for measure, values in found.measures.items():
            largest, at_worst = rows[measure][2 * number : 2 * number + 2]
            finite = [place for place in places if not math.isnan(values[place])]
            error = " ± 0.012" if measure == "outlier_ratio" else ""
            if not finite:
                assert (largest, at_worst) == ("–\n", "–")
                continue
            block, step = max(finite, key=lambda place: values[place])
            model = found.timesteps[step].model
            value, place = largest.splitlines()
            assert value == f"{values[block, step]:.4g}{error}"
            assert place == f"{BLOCKS[block]}, model time {model} (pre-shift {model / 7:.3g})"
            expected = "–" if worst not in finite else f"{values[worst]:.4g}{error}"
            assert at_worst == expected


def test_tables_beside_heat_maps_have_every_number(report: tuple[Path, Page]) -> None:
    rows = [row for row in report[1].rows if row[0] == "head.0"]
    for measure in ("outlier_ratio", "max_over_median", "register_over_median_without_channels"):
        for found in two_targets():
            values = found.measures[measure][BLOCKS.index("head.0")]
            shown = ["–" if math.isnan(value) else f"{value:.4g}" for value in values]
            assert ["head.0", *shown] in rows


def test_page_is_one_file_that_asks_for_nothing(report: tuple[Path, Page]) -> None:
    out, page = report
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:image/png;base64,", "#"))
    source = (out / "report.html").read_text(encoding="utf-8")
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in source
    policy = next(m for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")
    assert {path.name for path in out.iterdir()} == {"report.html", "figures"}


def test_page_shows_the_very_figures_of_the_folder(report: tuple[Path, Page]) -> None:
    out, page = report
    shown = [base64.b64decode(str(picture["src"]).partition(",")[2]) for picture in page.of("img")]
    files = {path.name: path.read_bytes() for path in (out / "figures").iterdir()}
    assert sorted(shown) == sorted(files.values())
    for name in ("outlier_ratio", "norm_maps_t0.1", "norm_maps_log_t0.5", "components_t0.5"):
        assert f"{name}.png" in files
    for picture, content in zip(page.of("img"), shown, strict=True):
        file = next(name for name, kept in files.items() if kept == content)
        with Image.open(out / "figures" / file) as image:
            assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
            # Shown at its size on paper: 96 pixels of a page are one inch.
            assert int(str(picture["width"])) == pytest.approx(image.width * 96 / DPI, abs=2)


def test_page_can_be_used_without_eyes_mouse_or_script(report: tuple[Path, Page]) -> None:
    page = report[1]
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    targets = {str(link["href"]).removeprefix("#") for link in page.of("a")}
    assert targets == set(anchors)
    assert len(page.of("summary")) == len(page.of("details")) > 0
    for tag, attributes in page.elements:
        if tag == "div" and attributes["class"] == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    for picture in page.of("img"):
        assert any(character.isdigit() for character in str(picture["alt"]))
    alt = next(str(i["alt"]) for i in page.of("img") if str(i["alt"]).startswith("Outlier ratio."))
    for found in two_targets():
        assert f"{found.name} at most {found.measures['outlier_ratio'].max():.4g} at" in alt


def test_texts_of_others_are_never_markup(hostile: tuple[Path, Page]) -> None:
    page = hostile[1]
    assert not page.of("script") and not page.of("b")
    for tag, attributes in page.elements:
        assert "onload" not in attributes
        assert tag != "img" or str(attributes["src"]).startswith("data:")
    shown = HOSTILE.encode(errors="replace").decode()
    assert page.text.count(shown) >= 4
    assert '<img src="https://example.org/x.png">' in page.text
    assert "<b>0</b>" in page.text


def test_what_an_encoder_does_not_have_is_left_out(hostile: tuple[Path, Page]) -> None:
    files = {path.stem for path in (hostile[0] / "figures").iterdir()}
    assert {"outlier_ratio", "norm_maps", "norm_maps_log", "attention_received"} <= files
    assert {"norm_maps_without_channels", "norm_maps_without_channels_log"} <= files
    assert not {"register_over_median", "attention_of_registers"} & files
    assert "model time (pre-shift)" not in hostile[1].text


def test_figures_of_an_earlier_report_are_gone_and_other_files_are_not(
    report: tuple[Path, Page], hostile: tuple[Path, Page]
) -> None:
    out, page = hostile
    files = {path.name for path in (out / "figures").iterdir()}
    shown = set(re.findall(r"figures/(\S+\.png)", page.text))
    assert files == shown | set(FOREIGN)
    assert {path.name for path in (report[0] / "figures").iterdir()} - files  # of other timesteps
    for name in FOREIGN:
        assert (out / "figures" / name).read_bytes() == b"mine"
