"""The page in a real headless Chromium: what it shows, fetches and refuses is the API's."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from benchmarks.local import Service
from neumeta import checkpoint
from service import page
from service.app import create_app
from service.settings import Settings
from tests.conftest import lenet

pytestmark = pytest.mark.filterwarnings("default:::selenium.*")

TOOLS = ("chromium", "chromedriver", "curl")
MODELS = Path(__file__).parents[2] / "models"
PICTURE = os.environ.get("NEUMETA_PAGE_PICTURE")
"""Where to write the README's screenshot; it shows the default port, which must be free then."""


class Browser:
    """One Chromium for all tests of this module."""

    def __init__(self, folder: Path) -> None:
        webdriver = pytest.importorskip("selenium.webdriver")
        paths = {name: shutil.which(name) for name in TOOLS}
        if missing := [name for name, path in paths.items() if not path]:
            pytest.skip(f"{' and '.join(missing)} not installed: the page is not looked at")
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        options = webdriver.ChromeOptions()
        options.binary_location = paths["chromium"]
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1100,800",
            f"--user-data-dir={folder / 'profile'}",
        ):
            options.add_argument(flag)
        options.add_experimental_option(
            "prefs", {"download.default_directory": str(self.downloads)}
        )
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(paths["chromedriver"])
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, url: str) -> None:
        """Load a page; what the last one logged is not this one's."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(url)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def until(self, told: Callable[[], Any], seconds: float = 10) -> Any:
        """The first true answer of `told`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := told():
                return found
            time.sleep(0.03)
        raise AssertionError("it did not come to be; the page reads: " + self.text("body"))

    def settled(self) -> dict[str, int]:
        """The numbers shown, once they are those of the controls."""
        self.until(lambda: not self.driver.find_elements("css selector", "#plan.stale"))
        names = ("parameters", "macs", "bytes")
        return {name: int(self.text(f"#{name}").replace(",", "")) for name in names}

    def slide(self, selector: str, value: float) -> None:
        """Set a range input as a drag of its thumb does."""
        self.set(selector, value, "input")

    def set(self, selector: str, value: object, event: str = "change") -> None:
        script = "const [node, value, event] = arguments; node.value = value;"
        script += "node.dispatchEvent(new Event(event))"
        self.driver.execute_script(script, self.find(selector), value, event)

    def downloaded(self, name: str) -> bytes:
        path = self.downloads / name
        self.until(path.is_file)
        return path.read_bytes()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Service(MODELS, "--port", "8000" if PICTURE else "0") as service:
        yield service.url


def runtimes(url: str) -> list[str]:
    """The axes of the times that were measured."""
    table = httpx.get(f"{url}/models/resnet20").raise_for_status().json()["latency"]
    return [f"ms, {name}" for name in table["runtimes"]]


def plan(url: str, **asked: object) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{url}/plan", json=asked).raise_for_status().json()
    return answer


def shown(of: dict[str, Any]) -> dict[str, int]:
    return {name: of[name] for name in ("parameters", "macs", "bytes")}


def test_sliders_move_the_numbers_and_the_numbers_are_the_plans(browser: Browser, url: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(url)
    browser.until(lambda: browser.driver.find_elements("css selector", "#width"))
    half = plan(url, arch="resnet20", width=0.5)
    assert browser.settled() == shown(half)
    assert browser.text("#score") == f"{half['score']:.2f} %"
    assert browser.text("#score-of") == "measured"
    left = float(browser.find("#here").get_attribute("cx"))

    browser.find("#width").send_keys(Keys.ARROW_RIGHT)
    assert browser.text("label[for=width] output") == "0.51"
    browser.slide("#width", 0.68)
    between = plan(url, arch="resnet20", width=0.68)
    assert between["parameters"] != half["parameters"] and not between["score_measured"]
    assert browser.settled() == shown(between)
    assert browser.text("#score") == f"{between['score']:.2f} %"
    assert browser.text("#score-of") == "interpolated"
    assert float(browser.find("#here").get_attribute("cx")) > left

    # The same score over what it costs: what was measured, and where.
    model = httpx.get(f"{url}/models/resnet20").json()
    table, row = model["latency"], next(row for row in model["evaluation"] if row["width"] == 0.5)
    (times,) = (each["ms"] for each in table["rows"]
                if (each["depth"], each["channels"]) == (row["depth"], row["channels"]))  # fmt: skip
    browser.slide("#width", 0.5)
    browser.settled()
    for axis, caption, told in (
        ("bytes", "Float32 safetensors", f"{row['score']:.2f} %"),
        (runtimes(url)[0], table["hardware"], f"%, {times[0]:g} ms"),
        (runtimes(url)[1], table["hardware"], f"%, {times[1]:g} ms"),
    ):
        browser.set("#axis", axis)
        assert caption in browser.text("#caption")
        assert browser.text("#chart .told").endswith(told)
        assert len(browser.driver.find_elements("css selector", "circle.dot")) == len(
            model["evaluation"]
        )
    browser.slide("#width", 0.68)  # between what was measured
    browser.settled()
    browser.until(lambda: re.search(r"%, about [\d.]+ ms$", browser.text("#chart .told")))
    browser.slide("#width", 0.1)  # kept at 0.25 by the slider, and then deeper than was measured
    browser.slide("#blocks-1", 5)
    browser.settled()
    browser.until(lambda: not browser.driver.find_elements("css selector", "#here"))
    browser.slide("#blocks-1", 3)
    browser.set("#axis", "width")
    browser.slide("#width", 0.68)

    browser.find("#groups").click()
    browser.slide("#width-3", 0.3)
    browser.set("#dtype", "int8")
    staged = plan(url, arch="resnet20", width=[0.68, 0.68, 0.3], dtype="int8")
    assert browser.settled() == shown(staged)

    browser.find("#groups").click()
    browser.find("#extrapolate").click()
    browser.slide("#width", 1.5)
    beyond = plan(url, arch="resnet20", width=1.5, dtype="int8", extrapolate=True)
    assert browser.settled() == shown(beyond)
    assert browser.text("#score-of") == "not measured"
    assert browser.complaints() == []


def test_the_table_over_depth_frames_the_current_network(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.until(lambda: browser.driver.find_elements("css selector", "#width"))
    browser.set("#arch", "resnet-mnist")
    assert browser.settled() == shown(plan(url, arch="resnet-mnist", depth=[2, 2]))
    assert not browser.driver.find_elements("css selector", "#width")
    browser.slide("#blocks-2", 3)
    current = plan(url, arch="resnet-mnist", depth=[2, 3])
    assert browser.settled() == shown(current)
    framed = browser.driver.find_elements("css selector", "td.here")
    assert [cell.text for cell in framed] == [f"{current['score']:.2f}"]
    outside = browser.find("tr:nth-child(8) td:nth-child(8)")
    outside.click()
    deep = plan(url, arch="resnet-mnist", depth=[7, 7], extrapolate=True)
    assert browser.settled() == shown(deep)
    assert browser.find("#extrapolate").is_selected()
    assert browser.text("label[for=blocks-1] output") == "7"
    assert browser.complaints() == []


def test_the_curl_line_and_the_download_give_the_apis_bytes(
    browser: Browser, url: str, tmp_path: Path
) -> None:
    browser.open(url)
    browser.until(lambda: browser.driver.find_elements("css selector", "#width"))
    browser.slide("#width", 0.4)
    bytes_shown = browser.settled()["bytes"]
    expected = httpx.get(f"{url}/weights/resnet20?width=0.4").raise_for_status().content
    assert len(expected) == bytes_shown
    browser.find("#download").click()
    assert browser.downloaded("resnet20-w0.4.safetensors") == expected
    subprocess.run(shlex.split(browser.text("#curl")), cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "resnet20-w0.4.safetensors").read_bytes() == expected
    browser.set("#dtype", "int8")
    browser.set("#format", "onnx")
    asked = "width=0.4&dtype=int8&format=onnx"
    expected = httpx.get(f"{url}/weights/resnet20?{asked}").raise_for_status().content
    assert browser.settled()["bytes"] == len(expected)
    browser.find("#download").click()
    assert browser.downloaded("resnet20-w0.4-int8.onnx") == expected
    assert shlex.split(browser.text("#curl"))[2:] == [
        f"{url}/weights/resnet20?{asked}",
        "-o",
        "resnet20-w0.4-int8.onnx",
    ]
    browser.find("#copy").click()
    browser.until(lambda: browser.text("#copy") in ("Copied", "Selected"))
    assert browser.complaints() == []
    if PICTURE:
        size = {"width": 1100, "height": 870, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.open(url)
        browser.until(lambda: browser.driver.find_elements("css selector", "#here"))
        browser.settled()
        browser.set("#axis", next(name for name in runtimes(url) if "ONNX" in name))
        browser.driver.save_screenshot(PICTURE)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """A service that asks for a token, and makes no large files."""
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    app = create_app(Settings(models=str(path), max_file_bytes=200_000, tokens_file=str(tokens)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def test_a_token_is_asked_for_and_a_refusal_is_told(browser: Browser, guarded: str) -> None:
    browser.open(guarded)
    browser.until(lambda: browser.find("#bearer").is_displayed())
    assert browser.text("#problem") == "a valid bearer token is needed"
    assert not browser.find("#controls").is_displayed()
    browser.find("#bearer").send_keys("secret\n")
    browser.until(lambda: browser.find("#controls").is_displayed())
    assert not browser.find("#bearer").is_displayed()
    options = browser.driver.find_elements("css selector", "#axis option")
    names = [each.get_attribute("value") for each in options]
    assert names == ["width", "bytes"]  # nobody measured times of this one
    browser.slide("#width", 1.0)
    browser.until(lambda: browser.find("#problem").is_displayed())
    assert re.fullmatch(r"width: '22\d+ bytes' is not allowed; .*", browser.text("#problem"))
    browser.slide("#width", 0.25)
    small = browser.settled()
    assert not browser.find("#problem").is_displayed()
    headers = {"authorization": "Bearer secret"}
    expected = httpx.get(f"{guarded}/weights/lenet?width=0.25", headers=headers).content
    assert len(expected) == small["bytes"]
    assert "$NEUMETA_TOKEN" in browser.text("#curl") and "secret" not in browser.text("#curl")
    browser.find("#download").click()
    assert browser.downloaded("lenet-w0.25.safetensors") == expected


def test_the_page_is_small_and_lets_nothing_else_run(url: str) -> None:
    got, head = httpx.get(url), httpx.head(url)
    assert got.status_code == head.status_code == 200 and head.content == b""
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert len(got.content) < 24_000
    assert not re.search(rb"(src|href)=\"?(https?:)?//", got.content)
    policy = got.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert (
        head.headers["content-security-policy"] == policy == page.HEADERS["Content-Security-Policy"]
    )
