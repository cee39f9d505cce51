"""The page of `sample --serve` as a person uses it: in a browser, which asks no other host for anything.

Skipped without playwright or a browser; with REQUIRE_BROWSER=1 in the environment that is a failure.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from drawn_bundles import write_drawn_bundle
from PIL import Image
from tiny_bundles import write_tiny_bundle

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.evaluate.norm_overlay import norm_overlay
from dsr_scale.evaluate.sampling_norms import sample_with_norms
from dsr_scale.export.pipeline import Pipeline, load

WAIT_MS = 120_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOST = "127.0.0.1"
PROMPT = "a <b>red</b> apple & ein Schlüssel"
SAMPLING = SamplingConfig(steps=6, solver="heun", guidance=2.5, guidance_interval=(0.2, 0.9))


def unavailable(reason: str) -> None:
    """Skips, or fails where a browser is required."""
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        unavailable("no package playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        unavailable(f"none of {', '.join(BROWSERS)} in PATH")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"], timeout=WAIT_MS
        )
        yield opened
        opened.close()


@pytest.fixture
def asked() -> Iterator[set[str]]:
    """Hosts that this process, which serves the page, connected to or looked up meanwhile."""
    hosts: set[str] = set()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def recorded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            hosts.add(address[0])
        connect(self, address)

    def recorded_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        hosts.add(str(host))
        return look_up(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded_connect)
        patch.setattr(socket, "getaddrinfo", recorded_look_up)
        yield hosts


class Visit:
    """The page at an address, and the hosts that it sent requests to."""

    def __init__(self, browser: Any, address: str) -> None:
        self.hosts: set[str | None] = set()
        context = browser.new_context(accept_downloads=True)
        context.set_default_timeout(WAIT_MS)
        context.on("request", self._sent)
        self.page = context.new_page()
        self.page.goto(address)

    def _sent(self, request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob"):
            self.hosts.add(address.hostname)

    def fill(self, name: str, value: object) -> None:
        """Fills a field in and leaves it."""
        field = self.page.locator(f"#{name} textarea, #{name} input[type=number]").first
        field.fill(str(value))
        field.blur()

    def draw(self) -> None:
        """Presses the button."""
        self.page.locator("#draw").click()

    def picture(self, name: str) -> Image.Image:
        """What the download button of a picture gives."""
        with self.page.expect_download() as download:
            self.page.locator(f"#{name} a[download]").click()
        return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))

    def shown_after(self, name: str, before: str | None) -> str:
        """Waits for another picture than `before` in its place; returns its address."""
        self.page.wait_for_function(
            "([name, before]) => {const shown = document.querySelector(`#${name} img`);"
            " return shown && shown.src && shown.src !== before && shown.complete}",
            arg=[name, before],
        )
        return self.page.locator(f"#{name} img").get_attribute("src")

    def words(self) -> str:
        """The text about the norms."""
        return self.page.locator("#words").inner_text()

    def message(self) -> str:
        """What an error says, once it does."""
        return self.page.locator(".toast-body").inner_text()


def pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def serve(pipeline: Pipeline) -> Any:
    try:
        from dsr_scale.evaluate.demo import Demo, serving
    except ModuleNotFoundError:
        unavailable("no package gradio")
    return serving(Demo(pipeline, pipeline.sampling, "a drawn network"))


def test_a_person_draws_and_looks_through_the_norms(
    tmp_path: Path, browser: Any, asked: set[str]
) -> None:
    pipeline = load(write_drawn_bundle(tmp_path / "bundle"), device="cpu")
    with serve(pipeline) as address:
        visit = Visit(browser, address)
        visit.fill("prompt", PROMPT)
        visit.fill("seed", 12345)
        visit.fill("steps", SAMPLING.steps)
        visit.page.locator("#solver").get_by_text(SAMPLING.solver, exact=True).click()
        visit.fill("guidance", SAMPLING.guidance)
        visit.fill("guided-from", SAMPLING.guidance_interval[0])
        visit.fill("guided-to", SAMPLING.guidance_interval[1])
        visit.draw()
        overlay = visit.shown_after("norms", None)
        wanted = pipeline.sample([PROMPT], seed=12345, sampling=SAMPLING)[0]
        saved = visit.picture("sample")
        assert np.array_equal(np.asarray(saved), pixels(wanted))
        assert saved.info["prompts"] == PROMPT and saved.info["seed"] == "12345"
        assert SamplingConfig.model_validate_json(saved.info["sampling"]) == SAMPLING

        norms = sample_with_norms(pipeline, PROMPT, seed=12345, sampling=SAMPLING)
        shown = []
        for block, step, registers in ((1, 2, False), (3, 6, True)):
            visit.fill("block", block)
            visit.fill("step", step)
            place = f"block {block} of the body, at step {step} of 6"
            visit.page.locator("#words").get_by_text(place).wait_for()
            overlay = visit.shown_after("norms", overlay)
            at = norms.steps[step - 1].blocks[block]
            drawn = norm_overlay(norms.image, at.image_norms[0].unflatten(0, (4, 4)), opacity=0.6)
            shown.append(np.asarray(visit.picture("norms")))
            assert np.array_equal(shown[-1], np.asarray(drawn))
            words = visit.words()
            assert f"{at.max_over_median:.3g} × median" in words
            assert re.search(r"Outlier tokens \(framed\): \d+ of 16 \(", words)
            assert ("register: none in this block" in words) != registers
        assert not any(np.array_equal(a, b) for a, b in pairwise(shown))
        assert visit.hosts == {HOST}
    assert asked <= {HOST, "localhost"}, "the server asked other hosts"


def test_mistakes_are_told_and_a_class_is_drawn(tmp_path: Path, browser: Any) -> None:
    pipeline = load(write_tiny_bundle(tmp_path / "bundle", classes=True), device="cpu")
    with serve(pipeline) as address:
        visit = Visit(browser, address)
        assert "Class number, 0 to 6" in visit.page.locator("#prompt").inner_text()
        visit.fill("prompt", "<i>cat</i>")
        visit.draw()
        told = visit.message()
        assert "prompt '<i>cat</i>'" in told and "a class number from 0 to 6" in told
        assert visit.page.locator("#norms img").count() == 0
        visit.page.locator(".toast-close").click()
        visit.fill("prompt", "4")
        visit.fill("guided-from", 0.9)
        visit.fill("guided-to", 0.2)
        visit.draw()
        assert "from model time 0.9 to 0.2" in visit.message()
        visit.page.locator(".toast-close").click()
        visit.fill("guided-from", 0)
        visit.fill("guided-to", 1)
        visit.page.locator("#prompt textarea").press("Enter")
        visit.shown_after("norms", None)
        wanted = pipeline.sample(["4"], seed=0)[0]
        assert np.array_equal(np.asarray(visit.picture("sample")), pixels(wanted))
        assert visit.hosts == {HOST}
