"""JupyterLab in a headless Chromium, driven over its DevTools protocol: no more than one test needs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import websocket  # which jupyter_server brings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 180  # seconds a page may take on a machine that does something else besides


class Page:
    """The browser's one page."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=PATIENCE)
        self.calls = 0

    def call(self, method: str, **given: object) -> dict:
        """The answer to one command of the protocol."""
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": given}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.calls:
            pass  # an event
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def js(self, expression: str) -> object:
        """The value of an expression; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = PATIENCE) -> object:
        """The expression's value once it is true; TimeoutError, with what the page shows, if it never is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.js(expression):
                return value
            time.sleep(0.2)
        raise TimeoutError(f"{expression} stayed false; the page shows: {self.js('document.body.innerText')}")


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A JupyterLab that serves `folder`, with nothing of a person's settings; its address, with a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")}
    token = "of-the-test"
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
            *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"),
            *(f"--ServerApp.root_dir={folder}", "--ServerApp.log_level=ERROR"),
        ],
        env=os.environ | own | {"JUPYTER_PREFER_ENV_PATH": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _answer(f"{address}/api?token={token}", server)
        yield f"{address}/lab/tree/NAME?token={token}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A page of a Chromium that keeps its things in `folder`."""
    assert CHROMIUM is not None
    browser = subprocess.Popen(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--window-size=1200,1600", "--remote-debugging-port=0", f"--user-data-dir={folder}"),
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told = folder / "DevToolsActivePort"
        end = time.monotonic() + PATIENCE
        while not (told.is_file() and told.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        port = told.read_text().split()[0]
        pages = json.loads(_answer(f"http://127.0.0.1:{port}/json", browser))
        page = Page(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))
        yield page
        page.socket.close()
    finally:
        browser.terminate()
        browser.wait()


def _answer(address: str, process: subprocess.Popen) -> bytes:
    """What a server that is just starting answers once it does."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(address) as answer:
                return answer.read()
        except URLError:
            time.sleep(0.2)
    raise RuntimeError(f"nothing answers at {address}")
