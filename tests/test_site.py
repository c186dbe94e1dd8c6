"""The built site: links lead somewhere, search finds every name, a browser can click through it.

`.ci/docs` builds the site and runs these tests; without a site they are skipped.
"""

import contextlib
import functools
import html.parser
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from tests.test_docstrings import ENTRIES

SITE = pathlib.Path(
    os.environ.get("FLOWVI_SITE", pathlib.Path(__file__).parents[1] / "docs" / "_build" / "html")
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITE.joinpath("index.html").exists(), reason="no site; see `.ci/docs`"),
]


class Page(html.parser.HTMLParser):
    """The anchors of a page, and where its links and pictures lead."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")} - {None}
        self.links |= {values.get(name) for name in ("href", "src")} - {None}


def dead_links(pages):
    """Of pages by path: links inside of the site that lead to no file, or to no anchor of it."""
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = path.parent / urllib.parse.unquote(url.path) if url.path else path
            target = pathlib.Path(os.path.normpath(target))
            anchors = pages[target].anchors if target in pages else {url.fragment}
            if not target.exists() or (url.fragment and url.fragment not in anchors):
                dead.append(f"{path}: {link}")
    return dead


def test_links_lead_somewhere():
    paths = [path for path in SITE.rglob("*.html") if "_static" not in path.parts]
    pages = {path: Page(path.read_text()) for path in paths}
    assert len(pages) > 30
    assert not dead_links(pages)


def test_a_dead_link_is_seen(tmp_path):
    page = Page('<a id="here" href="#here"></a><a href="#there"></a><a href="gone.html"></a>')
    path = tmp_path / "index.html"
    path.touch()
    assert sorted(link.rpartition(" ")[2] for link in dead_links({path: page})) == [
        "#there",
        "gone.html",
    ]


def test_search_finds_every_name():
    text = SITE.joinpath("searchindex.js").read_text()
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)\s*", text, re.DOTALL)[1])
    objects = index["objects"]
    found = {
        f"{prefix}.{entry[-1]}" if prefix else entry[-1]: index["docnames"][entry[0]]
        for prefix, entries in objects.items()
        for entry in entries
    }
    missing = sorted(name for name in ENTRIES if name not in found)
    assert not missing, missing
    for name in ENTRIES:
        page = SITE / f"{found[name]}.html"
        assert f'id="{name}"' in page.read_text(), name


@contextlib.contextmanager
def serving(folder):
    """The address of a folder, served to this machine alone."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """A browser behind its driver, by the WebDriver protocol; no package is needed for it."""

    def __init__(self, address):
        self.address = address
        browser = next(filter(None, map(shutil.which, BROWSERS)))
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
        options = {"binary": browser, "args": arguments}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = self.send("POST", "/session", wanted)["sessionId"]
        self.address += f"/session/{session}"

    def send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.send("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector):
        [element] = self.send(
            "POST", "/element", {"using": "css selector", "value": selector}
        ).values()
        self.send("POST", f"/element/{element}/click", {})

    def wait(self, script, seconds=20):
        """What a script says, once it says something."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} stays {value!r}"
            time.sleep(0.1)
        return value


@pytest.fixture
def browser():
    driver = shutil.which("chromedriver")
    if driver is None or not any(map(shutil.which, BROWSERS)):
        pytest.skip("no chromedriver, or no Chromium, on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{address}/status", timeout=5).close()
                break
            time.sleep(0.1)
        browser = Browser(address)
        yield browser
        browser.send("DELETE", "")
    finally:
        process.terminate()
        process.wait()


def test_a_browser_clicks_to_the_reference_and_searches(browser):
    with serving(SITE) as address:
        browser.send("POST", "/url", {"url": f"{address}/index.html"})
        browser.click("article a[href='reference/index.html']")
        browser.click("article a[href='flowvi.densities.html']")
        assert browser.run("return document.title").startswith("flowvi.densities")
        assert browser.run("return !!document.getElementById('flowvi.fit_density')")
        before = browser.run("return document.documentElement.dataset.theme")
        browser.send("POST", "/url", {"url": f"{address}/search.html?q=fit_posterior"})
        found = browser.wait(
            "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
        )
        assert any(link.endswith("flowvi.posteriors.html#flowvi.fit_posterior") for link in found)
        browser.click(".theme-switch-button")
        modes = "return document.documentElement.dataset"
        assert before in ("light", "dark") and browser.run(modes)["mode"] in (
            "light",
            "dark",
            "auto",
        )
