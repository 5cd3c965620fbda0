"""Headless Chromium, spoken to through its debugging pipe: no driver and no further package.

    python -m tests.browser http://127.0.0.1:8000 assets/live.png     a picture of a page that plays
"""
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

import pytest


class Browser:
    """A page in Chromium. Skips the test where there is none. complaints: errors of its script."""

    def __enter__(self):
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if not program:
            pytest.skip("needs Chromium: apt-get install chromium")
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   f"--user-data-dir={self.folder.name}", "about:blank"]
        # the pipe is expected as file descriptors 3 and 4
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(["bash", "-c", script, "bash", *command],
                                        pass_fds=(to_browser, from_browser),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.rest, self.complaints, self.session = 0, b"", [], None
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.send("Runtime.enable")
        self.send("Page.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.read)
        os.close(self.write)
        self.folder.cleanup()

    def send(self, method, **params):
        """One command of the DevTools protocol, and its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        """The next message."""
        while b"\0" not in self.rest:
            part = os.read(self.read, 2 ** 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        """Go to a page."""
        self.send("Page.navigate", url=address)

    def run(self, expression):
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"]
        return result.get("value")

    def wait(self, expression, seconds=60):
        """Until an expression is true."""
        limit = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < limit, f"{expression}: {self.run('document.body.innerText')}"
            time.sleep(0.1)

    def screenshot(self, width=920, height=700):
        """The page as PNG."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])


if __name__ == "__main__":
    with Browser() as browser:
        browser.open(sys.argv[1])
        time.sleep(4)  # until it has played for a while
        with open(sys.argv[2], "wb") as file:
            file.write(browser.screenshot())
