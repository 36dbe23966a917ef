"""The chat page in a real browser: it talks with the server, stops, regenerates, shows errors, and loads nothing from elsewhere."""

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gpt.model import GPT, GPTConfig
from gpt.tokenizer import Tokenizer
from tests.test_serve import HELLO, answer, serving

aiohttp = pytest.importorskip("aiohttp")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


class Browser:
    """One page of a headless Chromium, driven by the DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.ids, self.seen = socket, itertools.count(1), []

    async def call(self, method, **params):
        """The result of a DevTools method; events that come meanwhile are kept in `seen`."""
        number = next(self.ids)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=30)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.seen.append(message)

    async def run(self, script):
        """The value of a JavaScript expression, awaited."""
        got = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    async def until(self, script):
        for _ in range(600):
            if await self.run(script):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{script}: {await self.run('document.body.innerText')}")

    async def type(self, text):
        await self.run("document.getElementById('text').focus()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)


async def browse(url, profile, act):
    """Open the page and `await act(browser)`."""
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
             "--window-size=1000,760", f"--user-data-dir={profile}")  # fmt: skip
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    try:
        told = Path(profile) / "DevToolsActivePort"
        for _ in range(600):
            if told.exists() and len(told.read_text().splitlines()) == 2:
                break
            await asyncio.sleep(0.05)
        port = told.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as http:
            pages = await (await http.get(f"http://127.0.0.1:{port}/json/list")).json()
            page = next(p for p in pages if p["type"] == "page")
            async with http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                browser = Browser(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await browser.call(f"{domain}.enable")
                await browser.call("Page.navigate", url=url)
                await act(browser)
                return browser.seen
    finally:
        os.killpg(process.pid, 9)
        process.wait()


SAID = "[...document.querySelectorAll('main > p')].map(p => [p.className, p.textContent])"
IDLE = "document.getElementById('send').textContent === 'Send'"


def test_the_page(data, tmp_path):
    tokenizer = Tokenizer((data / "tokenizer.json").read_text())
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=512, block_size=2048, n_layer=2, n_head=2, n_embd=32)).eval()
    torch.nn.init.normal_(model.head.weight)
    model.head.weight.data[:5] = -1

    async def act(page):
        await page.until("document.getElementById('model')?.textContent === 'mini'")
        for name, value in (("temperature", 0), ("max_tokens", 20)):
            await page.run(f"document.getElementById('{name}').value = {value}")
        await page.type("Hello there")
        await page.until(f"{SAID}.length === 2 && {IDLE}")
        assert await page.run(SAID) == [["user", "Hello there"], ["assistant", first]]

        await page.type("<b>and</b> now?")  # markup is text, and the second answer knows what was said before
        await page.until(f"{SAID}.length === 4 && {IDLE}")
        assert (await page.run(SAID))[2:] == [["user", "<b>and</b> now?"], ["assistant", second]]
        if shots := os.environ.get("PERENNIAL_SCREENSHOTS"):
            image = await page.call("Page.captureScreenshot")
            (Path(shots) / "chat-page.png").write_bytes(base64.b64decode(image["data"]))
        await page.run("document.getElementById('again').click()")
        await page.until(f"{SAID}.length === 4 && {IDLE}")
        assert (await page.run(SAID))[3] == ["assistant", second]

        await page.run("document.getElementById('max_tokens').value = 2000")
        await page.type("Go on")
        await page.until(f"{SAID}.length === 6 && {SAID}[5][1].length > 20")
        await page.run("document.getElementById('send').click()")  # Stop
        await page.until(IDLE)
        stopped = (await page.run(SAID))[5][1]
        assert 20 < len(stopped) < 4000  # 2,000 tokens are more
        assert answer(port, messages=HELLO, max_tokens=1)  # the server is free at once

        await page.run("document.getElementById('clear').click()")
        assert await page.run(SAID) == []
        await page.run("document.getElementById('temperature').value = 9")
        await page.type("Hi")
        await page.until(f"{SAID}.some(p => p[0] === 'error') && {IDLE}")
        assert "temperature: expected" in (await page.run(SAID))[1][1]

    with serving(model, tokenizer) as port:
        first = answer(port, messages=HELLO, temperature=0, top_k=50)["choices"][0]["message"]["content"]
        more = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "<b>and</b> now?"}]
        second = answer(port, messages=more, temperature=0, top_k=50)["choices"][0]["message"]["content"]
        seen = asyncio.run(browse(f"http://127.0.0.1:{port}/", tmp_path / "profile", act))
    urls = [m["params"]["request"]["url"] for m in seen if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(f"http://127.0.0.1:{port}/") for url in urls), urls
    complaints = [m["params"]["entry"]["text"] for m in seen if m["method"] == "Log.entryAdded"]
    assert [c for c in complaints if "400 (Bad Request)" not in c] == []
    assert not [m for m in seen if m["method"] == "Runtime.exceptionThrown"]
