"""The stream in a browser: what the page asks for, and what should not be asked."""
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import struct
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import model as M
from experiments import live
from scale import serve
from tests.browser import Browser
from tests.common import HERE, network, small_vae_and_text_encoder, tiny, write_official
from utils import media
from utils.errors import UsageError, friendly_errors
from utils.runs import SHIPPED


@contextlib.contextmanager
def serving(*flags):
    """A server on a free port, and its stream."""
    server, stream = live.serve(live.arguments(["--port", "0", *map(str, flags)]))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        stream.close()
        assert not any(thread.is_alive() for thread in stream.threads)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The shipped student, fast."""
    folder = tmp_path_factory.mktemp("recordings")
    with serving("--weights", SHIPPED, "--fps", 60, "--record-to", folder) as running:
        yield running


def ask(server, method, path, body=None, **headers):
    """(status, text) of a request."""
    client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, dict):
        body = json.dumps(body)
    client.request(method, path, body, headers)
    answer = client.getresponse()
    text = answer.read()
    client.close()
    return answer.status, text if path.endswith(".mp4") else text.decode()


def status(server):
    """The stream's numbers."""
    return json.loads(ask(server, "GET", "/status")[1])


class Viewer:
    """A tab that looks at the stream."""

    def __init__(self, server):
        self.client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        self.client.request("GET", "/stream")
        self.answer = self.client.getresponse()
        assert self.answer.status == 200 and self.answer.readline() == b"--frame\r\n"

    def picture(self):
        """The next frame as an array (H, W, 3)."""
        assert self.answer.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(self.answer.readline().split()[1])
        assert self.answer.readline() == b"\r\n"
        file = self.answer.read(length)
        assert self.answer.readline() == b"\r\n" and self.answer.readline() == b"--frame\r\n"
        return np.asarray(Image.open(io.BytesIO(file))).astype(int)

    def close(self, rudely=False):
        """Close the tab; rudely: with a reset, as when a browser is killed."""
        if rudely:
            linger = struct.pack("ii", 1, 0)
            self.answer.fp.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.answer.close()
        self.client.close()


@pytest.fixture
def viewer(server):
    """A tab that is open; at the end the stream still plays in it."""
    tab = Viewer(server)
    tab.picture()
    yield tab
    before = server.stream.number
    while server.stream.number < before + 4:
        tab.picture()
    assert not server.stream.error
    tab.close()


def wait_until(condition):
    """Give the stream time."""
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_the_page_and_its_pictures(server, viewer):
    code, page = ask(server, "GET", "/")
    assert code == 200 and "</html>" in page and "://" not in page  # nothing from elsewhere
    frames = [viewer.picture() for _ in range(12)]
    assert frames[0].shape == (256, 256, 3)
    assert abs(frames[0] - frames[-1]).mean() > 1
    said = status(server)
    assert said["frame"] > 6 and said["made"] > 1 and said["shown"] > 1 and said["latency"] > 0
    assert said["toy"] and said["network"] == "assets/student, on cpu" and said["passes"] == 1


def test_a_caption_that_changes_while_it_plays(server, viewer):
    before = status(server)
    assert ask(server, "POST", "/control", {"caption": "red disc moving up"}) == (200, "")
    wait_until(lambda: viewer.picture() is not None
               and status(server)["caption"] == "red disc moving up")
    after = status(server)
    assert after["frame"] > before["frame"]  # it went on
    assert 0 < after["heard"] < 60
    assert "first 6 words" in ask(server, "POST", "/control", {"caption": "a " * 7})[1]


def test_passes_seed_and_clip_begin_anew(server, viewer):
    for asked in ({"passes": 4}, {"seed": 3}, {"clip": 7}, {"passes": 1, "seed": 0}):
        version = server.stream.version
        assert ask(server, "POST", "/control", asked)[0] == 200
        assert server.stream.version == version + 1
        wait_until(lambda: viewer.picture() is not None and status(server)["frame"] < 30)
        said = status(server)
        assert asked.items() <= {**said, "clip": 7}.items()
    world = server.stream.data.batch([serve.held_out_ids(8)[-1]])
    assert status(server)["caption"] == world["text"][0]


def test_two_viewers_and_a_closed_tab(server, viewer):
    """Both see the same stream; it goes on for the one that stays, and waits when all are gone."""
    for rudely in (False, True):
        second = Viewer(server)
        assert second.picture().shape == viewer.picture().shape
        wait_until(lambda: viewer.picture() is not None and second.picture() is not None
                   and status(server)["viewers"] == 2)
        second.close(rudely)
        wait_until(lambda: viewer.picture() is not None and status(server)["viewers"] == 1)


def test_a_viewer_that_takes_no_pictures_is_let_go(server, viewer, monkeypatch):
    """When the system's buffers are full, after the handler's patience."""
    monkeypatch.setattr(live.Handler, "timeout", 0.3)
    monkeypatch.setattr(server.stream, "zoom", 40)  # large pictures
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    stalled.connect(("127.0.0.1", server.server_port))
    stalled.sendall(b"GET /stream HTTP/1.0\r\nHost: localhost\r\n\r\n")
    wait_until(lambda: viewer.picture() is not None and status(server)["viewers"] == 2)
    wait_until(lambda: viewer.picture() is not None and status(server)["viewers"] == 1)
    stalled.close()


def test_without_viewers_it_waits(server):
    wait_until(lambda: status(server)["viewers"] == 0)
    time.sleep(0.5)
    before = server.stream.number
    time.sleep(0.5)
    assert server.stream.number == before
    assert Viewer(server).picture() is not None


def test_too_many_viewers_are_told(server, viewer, monkeypatch):
    monkeypatch.setattr(live, "MOST_VIEWERS", 1)
    assert ask(server, "GET", "/stream")[0] == 503


def test_a_picture_is_uploaded(server, viewer):
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (250, 240, 20)).save(file, "PNG")
    assert ask(server, "POST", "/picture", file.getvalue(), Content_Type="image/png") == (200, "")
    wait_until(lambda: abs(viewer.picture() - (250, 240, 20)).mean() < 12)


@pytest.mark.parametrize("body", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", bytes(200_000)])
def test_a_wrong_upload(server, viewer, body):
    code, said = ask(server, "POST", "/picture", body, Content_Type="image/png")
    assert code == 400 and "This file cannot be read as an image" in said and "tmp" not in said


@pytest.mark.parametrize("asked, said", [
    ({"caption": "x" * 10_000}, "up to 2,000 characters, this one has 10,000"),
    ({"caption": "a\x00b"}, "cannot be printed"), ({"caption": 3}, "A caption is a text"),
    ({"passes": 3}, "Passes are one of 1, 2, 4"), ({"passes": True}, "Passes are one of"),
    ({"seed": -1}, "whole number"), ({"seed": 1.5}, "whole number"), ({"seed": 10 ** 30}, "whole"),
    ({"seed": 1, "clip": "x"}, "whole number"), ({"record": "yes"}, "on or off"),
    ({"volume": 1}, "not one of this page"), ("[]", "not one of this page"),
    ("{", "no JSON"), ("\xff", "no JSON"), ("[" * 100_000, "no JSON"), ("", "no JSON")])
def test_a_wrong_request_changes_nothing(server, viewer, asked, said):
    before = dict(server.stream.wanted)
    code, answer = ask(server, "POST", "/control", asked)
    assert code == 400 and said in answer
    assert server.stream.wanted == before


def test_captions_of_every_script(server, viewer):
    """A full-width space, a no-break space and joiners are part of some."""
    assert ask(server, "POST", "/control", {"caption": "红\u3000圆 a\u00a0b \u200c"}) == (200, "")


def test_requests_of_another_site(server, viewer):
    """A foreign name for this machine, another origin, a picture embedded elsewhere."""
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{server.server_port}"},
                    {"Host": "localhost.evil.example"}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}):
        for method, path in (("GET", "/"), ("GET", "/stream"), ("GET", "/status"),
                             ("POST", "/control"), ("POST", "/picture")):
            body = {"seed": 9} if method == "POST" else None
            assert ask(server, method, path, body, **headers)[0] == 403, (headers, path)
    assert ask(server, "GET", "/stream", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(server, "GET", "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link to the page
    ours = f"http://localhost:{server.server_port}"
    assert ask(server, "POST", "/control", {}, Host=ours[7:], Origin=ours)[0] == 200
    assert status(server)["seed"] != 9


def test_odd_requests(server, viewer, monkeypatch):
    assert ask(server, "GET", "/none")[0] == 404
    assert ask(server, "GET", "/../live.py")[0] == 404
    assert ask(server, "POST", "/none", {})[0] == 404
    assert ask(server, "PUT", "/control", {})[0] == 501
    assert ask(server, "POST", "/control", "x" * 300_000)[0] == 413
    for length in ("-1", "x", "9" * 400):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
            client.sendall(b"POST /control HTTP/1.0\r\nHost: localhost\r\nContent-Length: "
                           + length.encode() + b"\r\n\r\n")
            assert client.recv(100).split()[1] in (b"411", b"413")
    monkeypatch.setattr(live.Handler, "timeout", 0.3)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(b"POST /control HTTP/1.0\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert client.recv(100) == b""  # given up, and nothing else waits for it


def test_a_recording(server, viewer, monkeypatch):
    """It grows while nobody looks, too, and a second one has a name of its own."""
    for name in ("live-1.mp4", "live-2.mp4"):
        assert ask(server, "POST", "/control", {"record": True})[0] == 200
        number = server.stream.number
        wait_until(lambda: viewer.picture() is not None and server.stream.number > number + 10)
        assert ask(server, "POST", "/control", {"record": False})[0] == 200
        wait_until(lambda: viewer.picture() is not None and status(server)["recorded"] == name)
        path = server.stream.recorded
        assert len(media.read_video(path, 256)) >= 8
    code, file = ask(server, "GET", "/recording.mp4")
    assert code == 200 and file == path.read_bytes()

    def full(*_):
        raise UsageError("cannot write: no space left")

    monkeypatch.setattr(live, "video_writer", full)
    ask(server, "POST", "/control", {"record": True})
    wait_until(lambda: viewer.picture() is not None and "no space left" in status(server)["error"])
    assert not status(server)["recording"]
    server.stream.set(restart=True)


def test_what_stops_the_stream_is_said(server, viewer, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(live, "generate_chunks", broken)
    ask(server, "POST", "/control", {"seed": 1})
    wait_until(lambda: "out of memory" in status(server)["error"])
    monkeypatch.undo()
    ask(server, "POST", "/control", {"seed": 1})
    assert viewer.picture() is not None and not status(server)["error"]


def test_the_command(tmp_path, capsys, monkeypatch):
    """It says where, and ends at SIGTERM with its recording kept."""
    def visit():
        wait_until(lambda: servers)
        tab = Viewer(servers[0])
        ask(servers[0], "POST", "/control", {"record": True})
        for _ in range(8):
            tab.picture()
        os.kill(os.getpid(), signal.SIGTERM)

    servers, serve_one = [], live.serve
    monkeypatch.setattr(live, "serve", lambda args: servers.append(serve_one(args)[0]) or (
        servers[0], servers[0].stream))
    visitor = threading.Thread(target=visit)
    visitor.start()
    live.main(["--weights", str(SHIPPED), "--port", "0", "--fps", "60", "--record-to",
               str(tmp_path)])
    visitor.join()
    said = capsys.readouterr().out
    assert "open http://127.0.0.1:" in said and "live-1.mp4" in said
    assert len(media.read_video(tmp_path / "live-1.mp4", 256)) >= 2


@pytest.mark.parametrize("flags, message", [
    (["--port", "99999"], "--port 99999 does not work"), (["--record-to", "none"], "not a folder"),
    (["--text", "a.safetensors"], "--text is one embedded prompt, and captions change here"),
    (["--steps", "1", "2"], "--steps takes one number"), (["--frames", "3"], "unrecognized"),
    (["--weights", str(HERE / "assets/teacher")], "is a teacher"), (["--seed", "-1"], "--seed -1")])
def test_a_bad_command_is_one_sentence(capsys, flags, message):
    with pytest.raises(SystemExit) as stop, friendly_errors():
        live.main(["--port", "0", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("error:") == 1


def test_a_port_that_is_taken(server):
    flags = ["--weights", str(SHIPPED), "--port", str(server.server_port)]
    with pytest.raises(UsageError, match="choose another with --port"):
        live.serve(live.arguments(flags))


def test_a_wan_student(tmp_path, monkeypatch):
    """Decoded chunk by chunk by its VAE, four frames a latent."""
    small_vae_and_text_encoder(tmp_path)
    cfg = tiny(precondition=False)
    shape = {field.name: getattr(cfg, field.name) for field in fields(M.Config)}
    monkeypatch.setitem(M.PRESETS, "wan-1.3b", shape)
    path = write_official(tmp_path / "wan", "generator_ema", network(cfg))
    flags = ["--weights", path, "--preset", "wan-1.3b", "--vae", tmp_path / "vae", "--steps", "1",
             "--chunk", "3", "--window", "6", "--text-encoder", tmp_path / "umt5", "--size",
             "32x48", "--fps", "60", "--image", HERE / "assets/example.png", "--prompt",
             "red disc", "--device", "cpu"]
    with serving(*flags) as wan:
        tab = Viewer(wan)
        assert [tab.picture().shape for _ in range(18)][-1] == (32, 48, 3)
        assert ask(wan, "POST", "/control", {"clip": 1})[0] == 400
        assert ask(wan, "POST", "/control", {"caption": "disc"})[0] == 200
        wait_until(lambda: tab.picture() is not None and status(wan)["caption"] == "disc")
        tab.close()


@pytest.mark.slow
def test_in_a_browser(server, tmp_path):
    """In headless Chromium: the picture moves, the caption is changed by typing, passes and seed by
    a click; what is wrong is said on the page."""
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.wait("document.getElementById('video').naturalWidth == 256")
        browser.wait("document.getElementById('numbers').textContent.includes('frames a second')")
        one = browser.screenshot()
        assert browser.run("document.getElementById('caption').value") == status(server)["wanted"]
        browser.run("document.getElementById('caption').value = 'green square moving left'")
        browser.run("document.querySelector('#words button').click()")
        browser.wait("document.getElementById('numbers').textContent.includes('green square')")
        assert browser.screenshot() != one
        browser.run("document.querySelector('#passes button:nth-child(3)').click()")
        browser.wait("document.querySelector('#passes .on').textContent == '4'")
        browser.run("document.getElementById('caption').value = 'x'.repeat(10000)")
        browser.run("document.querySelector('#words button').click()")
        browser.wait("document.getElementById('said').textContent.includes('10,000')")
        assert server.stream.wanted["passes"] == 4 and not browser.complaints
