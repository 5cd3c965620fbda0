"""The stream in a browser as it is made, with a caption that can be changed while it plays.

    python experiments/live.py                                   the toy's student, then open the
                                                                 address that is printed
    python experiments/live.py --weights out/wan/stage3 --vae DIR_OF_VAE --text-encoder DIR_OF_UMT5
        --image assets/example.png --prompt "a disc that moves"  a Wan student, decoded by chunks

One thread makes chunks, one shows their frames at --fps, and every viewer sees the same stream; it
waits while nobody looks. The pictures are a multipart JPEG answer, which browsers show in an <img>
without a line of script, and the server is the standard library's: one process, a few viewers, no
dependency. It listens on 127.0.0.1 alone and answers no page of another site.
"""
import contextlib
import io
import json
import signal
import sys
import tempfile
import threading
import time
import unicodedata
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from data import PatchCodec, dataset, held_out_ids
from sample import generate_chunks, load_network, per_chunk
from scale.serve import (check_stream_flags, chosen_stage, one_input, read_images, seeded_noise,
                         steps_of, stream_flags)
from utils.errors import UsageError, catch_signals, first_line, friendly_errors, require
from utils.media import parse_size, to_uint8, video_writer
from utils.settings import synced_time

PASSES = (1, 2, 4)
LONGEST_CAPTION = 2000      # characters; Wan's encoder reads 512 tokens
LARGEST_PICTURE = 32 * 2 ** 20  # bytes
MOST_VIEWERS = 16


# ---------------------------------------------------------------- the stream
class Stream:
    """One endless rollout that any number of viewers watch. `change` guards all that is shared.

    Threads: make() fills `slot` with one chunk ahead of what show() plays; requests call set()."""

    def __init__(self, args, net, settings, codec, where):
        self.args, self.net, self.settings, self.where = args, net, settings, where
        self.codec, first, encode, caption = one_input(args, codec, settings, where)
        self.encode, self.encoding = encode, threading.Lock()
        self.zoom, self.fps, self.size, self.data = 1, args.fps or 16, None, None
        if isinstance(self.codec, PatchCodec):
            self.size, self.fps = settings["size"], args.fps or 8
            self.zoom = max(1, 256 // self.size)
            if first.shape[1] and (not settings["data"] or Path(settings["data"]).is_dir()):
                self.data = dataset(SimpleNamespace(**settings))
        elif first.shape[1]:
            self.size = parse_size(args.size or "480x832")
        passes = per_chunk(steps_of(args) or settings["student_steps"])
        self.wanted = {"first": first, "caption": caption, "text": encode(caption),
                       "asked": time.perf_counter(), "record": False,
                       "passes": passes[0] if len(passes) == 1 else passes, "seed": args.seed}
        self.change, self.version, self.ended = threading.Condition(), 0, False
        self.slot = None                      # (version, frames, caption, asked) to be shown next
        self.picture, self.number = b"", 0    # the frame on show, and how many there were
        self.viewers, self.recorded, self.error = 0, None, ""
        self.shown = {"caption": caption, "frame": 0, "latency": None, "made": None, "heard": None}
        self.times = deque(maxlen=16)         # when the latest frames were shown
        self.threads = [threading.Thread(target=target, daemon=True)
                        for target in (self.make, self.show)]

    def start(self):
        """Begin, as soon as somebody looks."""
        for thread in self.threads:
            thread.start()
        return self

    def close(self):
        """End the threads; a recording is finished."""
        with self.change:
            self.ended = True
            self.change.notify_all()
        for thread in self.threads:
            thread.join()

    def set(self, restart=False, **values):
        """Change what is wanted; with `restart` the stream begins anew."""
        with self.change:
            self.wanted |= values
            if restart:
                self.version += 1
                self.slot, self.error = None, ""
            self.change.notify_all()

    def wait_for(self, condition):
        """Block until the condition holds, or the program ends."""
        with self.change:
            self.change.wait_for(lambda: self.ended or condition())

    # ---- making

    def make(self):
        """Chunks without end. What goes wrong is said on the page; a new start tries again."""
        while not self.ended:
            version = self.version
            try:
                self.rollout(version)
            except Exception as error:  # out of memory, say
                self.error = f"The stream stopped ({first_line(error)}): start again."
            self.wait_for(lambda: self.version != version)

    @torch.no_grad()
    def rollout(self, version):
        """One stream, until another is wanted."""
        wanted, device = dict(self.wanted), self.args.device
        used = {}

        def text(_):
            used.update(self.wanted)
            return used["text"]

        randn = seeded_noise(wanted["first"], wanted["seed"])
        chunks = generate_chunks(self.net, self.settings, wanted["first"], text, randn, None,
                                 wanted["passes"])
        decode, count = self.codec.decoder(), 0
        while True:
            self.wait_for(lambda: self.version != version
                          or self.slot is None and (self.viewers or self.wanted["record"]))
            if self.ended or self.version != version:
                return
            began = synced_time(torch.device(device))
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                frames = decode(next(chunks))[0]
            seconds = synced_time(torch.device(device)) - began
            note = {"caption": used.get("caption", wanted["caption"]),
                    "asked": used.get("asked", wanted["asked"]), "frame": count}
            if used:  # not the image, which costs nothing
                note |= {"latency": seconds, "made": len(frames) / seconds}
            count += len(frames)
            with self.change:
                if self.version == version:
                    self.slot = (version, to_uint8(frames), frames.cpu(), note)
                    self.change.notify_all()

    # ---- showing

    def show(self):
        """Frames at their time, to all viewers and to the recording."""
        due, heard = 0.0, self.wanted["asked"]
        with contextlib.closing(Recorder(self)) as recorder:
            while True:
                self.wait_for(lambda: self.slot or recorder.is_to_finish())
                if self.ended:
                    return
                if recorder.is_to_finish():
                    recorder.close()
                with self.change:
                    if not self.slot:  # or a new start took it back
                        continue
                    (version, pictures, frames, note), self.slot = self.slot, None
                    self.change.notify_all()
                for i, picture in enumerate(pictures):
                    due = max(due + 1 / self.fps, time.perf_counter())
                    self.pause_until(due, version)
                    if self.ended or self.version != version:
                        break
                    if i == 0 and note["asked"] != heard:
                        heard = note["asked"]
                        note["heard"] = time.perf_counter() - heard
                    self.publish(picture, {**note, "frame": note["frame"] + i})
                    recorder.take(frames[i:i + 1])

    def pause_until(self, due, version):
        """Sleep, unless the program ends or another stream is wanted."""
        with self.change:
            self.change.wait_for(lambda: self.ended or self.version != version,
                                 max(0.0, due - time.perf_counter()))

    def publish(self, picture, note):
        """One frame (H, W, 3) uint8 for all viewers."""
        file = io.BytesIO()
        enlarged = picture.repeat(self.zoom, 0).repeat(self.zoom, 1)
        Image.fromarray(enlarged).save(file, "JPEG", quality=90, subsampling=0)
        with self.change:
            self.picture, self.number = file.getvalue(), self.number + 1
            self.shown |= {name: value for name, value in note.items() if name in self.shown}
            self.times.append(time.perf_counter())
            self.change.notify_all()

    def next_picture(self, last):
        """(number, JPEG) of a frame after number `last`, or after 5 seconds the same once more, so
        that a closed tab is noticed; None when the program ends."""
        with self.change:
            self.change.wait_for(lambda: self.ended or self.number > last, 5)
            return None if self.ended else (self.number, self.picture)

    def status(self):
        """What the page shows, as a dict."""
        with self.change:
            rate = None
            if len(self.times) > 1:
                rate = (len(self.times) - 1) / max(1e-9, self.times[-1] - self.times[0])
            return {**self.shown, "shown": rate, "wanted": self.wanted["caption"],
                    "passes": self.wanted["passes"], "seed": self.wanted["seed"],
                    "viewers": self.viewers, "error": self.error,
                    "recording": self.wanted["record"], "toy": self.data is not None,
                    "recorded": self.recorded and self.recorded.name,
                    "network": f"{self.where}, on {self.args.device}"}


class Recorder:
    """The frames that are shown, as an mp4 for as long as it is wanted."""

    def __init__(self, stream):
        self.stream, self.stack, self.write, self.path = stream, contextlib.ExitStack(), None, None

    def is_to_finish(self):
        """Whether there is a file that nobody wants to go on."""
        return self.write is not None and not self.stream.wanted["record"]

    def take(self, frame):
        """Write a frame (1, 3, H, W) if that is wanted."""
        if not self.stream.wanted["record"]:
            return
        with self.said_on_the_page():
            if not self.write:
                self.path = free_name(Path(self.stream.args.record_to))
                self.write = self.stack.enter_context(
                    video_writer(self.path, self.stream.fps, self.stream.zoom))
            self.write(frame)

    def close(self):
        """Finish the file, which appears now."""
        stack, self.stack = self.stack, contextlib.ExitStack()
        written, self.write = self.write, None
        with self.said_on_the_page():
            stack.close()
            if written:
                self.stream.recorded = self.path

    @contextlib.contextmanager
    def said_on_the_page(self):
        """A full disk, say, ends the recording alone."""
        try:
            yield
        except Exception as error:
            self.write, self.stack = None, contextlib.ExitStack()
            self.stream.set(record=False)
            self.stream.error = f"The recording failed ({first_line(error)})."


def free_name(folder):
    """live-1.mp4, or the next that is not there."""
    number = 1
    while (folder / f"live-{number}.mp4").exists():
        number += 1
    return folder / f"live-{number}.mp4"


# ---------------------------------------------------------------- what the page may ask for
def whole(value, name, most):
    """A whole number from 0 to `most`."""
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
    require(valid, f"{name} has to be a whole number from 0 to {most}.")
    return value


def control(stream, asked):
    """Do what a JSON request asks for; returns a sentence for the page. UsageError if it is
    wrong, and then nothing is changed."""
    known = {"caption", "passes", "seed", "clip", "record"}
    require(isinstance(asked, dict) and asked.keys() <= known, "The request is not one of this "
            "page's: reload it.")
    values, said = {}, ""
    if "passes" in asked:
        require(asked["passes"] in PASSES and asked["passes"] is not True,
                f"Passes are one of {', '.join(map(str, PASSES))}.")
        values["passes"] = int(asked["passes"])
    if "seed" in asked:
        values["seed"] = whole(asked["seed"], "The seed", 2 ** 53)
    if "record" in asked:
        require(isinstance(asked["record"], bool), "Recording is on or off.")
        values["record"] = asked["record"]
    caption = asked.get("caption")
    if "clip" in asked:
        number = whole(asked["clip"], "The number of a toy clip", 99_999)
        require(stream.data is not None, "This network has no clips: upload a picture.")
        clip = stream.data.batch(held_out_ids(number + 1)[-1:])
        frames = clip["video"][:, :stream.settings["first"]]
        values["first"] = stream.codec.encode(frames).to(stream.args.device)
        caption = clip["text"][0] if caption is None else caption
    if caption is not None:
        require(isinstance(caption, str), "A caption is a text.")
        require(len(caption) <= LONGEST_CAPTION, f"A caption has up to {LONGEST_CAPTION:,} "
                f"characters, this one has {len(caption):,}.")
        # U+3000, a no-break space or a joiner are part of a language
        control = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in caption)
        require(not control, "The caption has characters that cannot be printed.")
        with stream.encoding, torch.no_grad():
            text = stream.encode(caption)
        limit = stream.settings["text_len"]
        if isinstance(stream.codec, PatchCodec) and len(caption.split()) > limit:
            said = f"This network reads the first {limit} words."
        values |= {"caption": caption, "text": text, "asked": time.perf_counter()}
    stream.set(restart=bool(asked.keys() & {"passes", "seed", "clip"}), **values)
    return said


def upload(stream, picture):
    """Start again from an image file's bytes."""
    require(stream.size and stream.settings["first"], "This network starts from its caption alone.")
    with tempfile.NamedTemporaryFile() as file:
        file.write(picture)
        file.flush()
        try:
            pixels = read_images([file.name], stream.size)
        except UsageError as error:
            raise UsageError(str(error).replace(file.name, "This file")) from None
    with stream.encoding, torch.no_grad():
        first = stream.codec.encode(pixels).to(stream.args.device)
    stream.set(restart=True, first=first)
    return ""


class Handler(BaseHTTPRequestHandler):
    """The page, its pictures and its requests. Every wrong request gets a sentence."""
    timeout = 20  # seconds for a request to arrive, or for a viewer to take a picture

    def log_message(self, *_):
        """The terminal stays quiet."""

    def answer(self, status, kind, body):
        """A whole answer."""
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Cache-Control":
                            "no-store", "X-Frame-Options": "DENY", "X-Content-Type-Options":
                            "nosniff"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self):
        """Answer requests that another site's page could have sent: a foreign name for this machine
        (DNS rebinding), another origin, or a picture embedded elsewhere."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        local = host.rpartition(":")[0] if ":" in host else host
        embedded = self.headers.get("Sec-Fetch-Site") == "cross-site" and self.path != "/"
        if local in ("127.0.0.1", "localhost") and origin in (None, f"http://{host}") and (
                not embedded):
            return False
        self.drain()
        self.answer(403, "text/plain", "This page is for 127.0.0.1 and localhost alone.")
        return True

    def drain(self):
        """Read a body that is not wanted, or the client would miss the answer."""
        left = self.headers.get("Content-Length", "0")
        left = min(int(left) if left.isdecimal() and len(left) < 16 else 0, 2 * LARGEST_PICTURE)
        while left > 0 and (got := self.rfile.read(min(left, 2 ** 16))):
            left -= len(got)

    def do_GET(self):
        if self.refused():
            return
        stream, path = self.server.stream, self.path.partition("?")[0]
        if path == "/":
            page = (HERE / "experiments" / "live.html").read_text(encoding="utf-8")
            self.answer(200, "text/html; charset=utf-8", page)
        elif path == "/status":
            self.answer(200, "application/json", json.dumps(stream.status()))
        elif path == "/stream":
            self.pictures(stream)
        elif path == "/recording.mp4" and stream.recorded and stream.recorded.is_file():
            self.answer(200, "video/mp4", stream.recorded.read_bytes())
        else:
            self.answer(404, "text/plain", "There is no such page.")

    do_HEAD = do_GET

    def pictures(self, stream):
        """Frames until the viewer goes or the program ends. A browser shows a part when the next
        boundary has come, so that follows at once."""
        with stream.change:
            full = stream.viewers >= MOST_VIEWERS
            stream.viewers += not full
            stream.change.notify_all()
        if full:
            return self.answer(503, "text/plain", f"{MOST_VIEWERS} viewers are the most.")
        try:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(b"--frame\r\n")
            number = 0
            while self.command != "HEAD" and (item := stream.next_picture(number)):
                number, picture = item
                if not picture:  # none has been made yet
                    continue
                head = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n--frame\r\n")
        except OSError:  # a closed tab, or one that takes no pictures
            pass
        finally:
            with stream.change:
                stream.viewers -= 1

    def do_POST(self):
        if self.refused():
            return
        json_only = self.path == "/control"
        most = 2 ** 18 if json_only else LARGEST_PICTURE
        length = self.headers.get("Content-Length", "")
        number = int(length) if length.isdecimal() and len(length) < 16 else -1
        if self.path not in ("/control", "/picture") or not 0 <= number <= most:
            status, said = 404, "There is no such page."
            if self.path in ("/control", "/picture"):
                status, said = (411, "Say how long it is.") if number < 0 else (
                    413, f"That is too large: up to {most // 2 ** 10:,} KiB.")
            self.drain()
            return self.answer(status, "text/plain", said)
        body = self.rfile.read(number)
        try:
            require(len(body) == number, "The request broke off.")
            if json_only:
                said = control(self.server.stream, json.loads(body))
            else:
                said = upload(self.server.stream, body)
            self.answer(200, "text/plain; charset=utf-8", said)
        except (ValueError, RecursionError) as error:  # UsageError among them, and wrong JSON
            said = str(error) if isinstance(error, UsageError) else "The request is no JSON."
            self.answer(400, "text/plain; charset=utf-8", said)


class Server(ThreadingHTTPServer):
    """A thread for every request, ended with the program."""
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A connection that breaks off is the client's business; all else keeps its traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


# ---------------------------------------------------------------- the command
def arguments(argv):
    """The command line, checked."""
    parser = stream_flags(__doc__)
    parser.add_argument("--port", type=int, default=8000, help="Port on 127.0.0.1; 0: a free one.")
    parser.add_argument("--record-to", default=".", metavar="DIR", help="Folder for recordings.")
    args = parser.parse_args(argv)
    check_stream_flags(args)
    require(0 <= args.port < 65536, f"--port {args.port} does not work: use 0 to 65535")
    require(len(args.steps or [1]) == 1, "--steps takes one number here")
    require(Path(args.record_to).is_dir(), f"--record-to {args.record_to} is not a folder: make it")
    require(not args.text, "--text is one embedded prompt, and captions change here: name the text "
            "encoder in its place")
    args.futures, args.frames, args.prompt_at = 1, 0, []
    return args


def serve(args):
    """(server, stream), both at work: serve_forever() runs in a thread."""
    weights, codec, settings, where = chosen_stage(args)
    require(settings["stage"], f"{where} is a teacher, and this page shows students: name a later "
            "stage with --weights")
    require(settings["first"] < 2, f"{where} was trained with --first {settings['first']}: this "
            "page starts from one image")
    try:
        server = Server(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise UsageError(f"port {args.port} cannot be had ({error.strerror}): choose another with "
                         "--port, or 0") from None
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    net = load_network(weights, settings, args.device, dtype)
    server.stream = Stream(args, net, settings, codec, where).start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.stream


def main(argv=None):
    """Serve until Ctrl-C or SIGTERM; a recording is kept."""
    args = arguments(argv)
    with catch_signals(signal.SIGINT, signal.SIGTERM) as received:
        server, stream = serve(args)
        print(f"{stream.where}: open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)",
              flush=True)
        while not received:
            time.sleep(0.1)
        server.shutdown()
        server.server_close()
        stream.close()
    if stream.recorded:
        print(f"the latest recording is {stream.recorded}")


if __name__ == "__main__":
    with friendly_errors():
        main()
