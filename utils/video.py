"""Video files read by their timestamps, through PyAV: which frame is shown when, in its shape.

A file is no list of pictures. Its frames may last differently long (phones, screen recordings,
gifs), its pixels may be wider than high, it may be turned, and parts of it may be missing. What
cannot be read rightly is refused: a wrong clip in a folder of thousands is never seen again.
"""
import contextlib
import sys
from functools import partial

import av
import av.logging
import numpy as np
from av.sidedata.sidedata import Type
from PIL import Image, ImageSequence

from utils.errors import UsageError, first_line, first_process, require

JITTER = 0.005  # seconds: a frame that is this late for its time is still taken
ROUNDING = 0.0015  # seconds: times in a container are rounded, often to milliseconds
HDR = {16: "PQ", 18: "HLG"}  # transfer functions, as ffmpeg numbers them
BT2020 = 9  # its number for these primaries
TO_SDR = ("ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709,"
          "format=yuv420p OUT.mp4")
UNCOUNTED = 2 ** 30  # frames that an AVI promises if ffmpeg wrote it into a pipe
HARMLESS = ("mmco:", "co located POCs")  # said of whole clips that were cut from longer ones

av.logging.set_level(av.logging.ERROR)  # what is said is read, never printed
av.logging.set_skip_repeated(False)     # or the second damaged file would go unnoticed


@contextlib.contextmanager
def listening(path):
    """UsageError if ffmpeg fails or says meanwhile that the file is damaged. What it cannot decode
    it conceals, by frames that stand still, and goes on."""
    error = ""
    with av.logging.Capture(local=True) as messages:
        try:
            yield
        except av.FFmpegError as failure:
            error = failure.strerror
    said = [f"{name}: {text.strip()}" for level, name, text in messages
            if level <= av.logging.ERROR and not text.startswith(HARMLESS) and not sound(name)]
    if error or said:
        raise damaged(path, (said or [error])[0])


def sound(name):
    """Whether a message comes from a decoder of sound, which is not read."""
    return name in av.codecs_available and av.Codec(name, "r").type == "audio"


def damaged(path, what):
    """The error for a file that is not whole."""
    return UsageError(f"{path} cannot be read as a video, it is damaged or none ({what[:100]}): "
                      "copy or download it again, or remove it")


def open_video(path, stack):
    """(container, its video stream). One thread decodes, so that its complaints are heard."""
    # an absolute path: ffmpeg sees a protocol in 12:30.mp4
    container = stack.enter_context(av.open(str(path.absolute())))
    stream = container.streams.best("video")
    require(stream is not None, f"{path} holds no video: remove it")
    require(stream.metadata.get("alpha_mode") != "1", f"{path} is transparent, and its colours "
            "there mean nothing: lay it over a background first, and write an mp4")
    stream.codec_context.thread_count = 1
    return container, stream


def packets_of(path, container, stream):
    """The packets of a stream. UsageError for a file that is cut off or at a packet that is not
    whole."""
    ends = [entry.pos + entry.size for entry in stream.index_entries]
    if max(ends, default=0) > container.size:
        raise damaged(path, f"it ends after {container.size} of {max(ends)} bytes")
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise damaged(path, "a part is missing")
        yield packet


def file_times(path):
    """Seconds of the frames of a video file, from the container's table alone."""
    times, number = set(), 0
    with contextlib.ExitStack() as stack, listening(path):
        container, stream = open_video(path, stack)
        index = stream.index_entries
        # an AVI counts frames that were left out, as chunks of no bytes that its index steps over
        dropped = index[-1].timestamp + 1 - len(index) if len(index) else 0
        for packet in packets_of(path, container, stream):
            number += packet.size > 0
            if packet.size and packet.pts is not None and not packet.is_discard:
                times.add(float(packet.pts * packet.time_base))
        if container.format.name == "avi" and number + dropped < stream.frames < UNCOUNTED:
            raise damaged(path, f"{number} of {stream.frames} frames are there")
    return sorted(times)


def file_frames(path, stack):
    """(seconds after the first frame, a function that gives its pixels) of every frame of a video
    file, in the order in which they are shown."""
    with listening(path):
        container, stream = open_video(path, stack)
        packets = packets_of(path, container, stream)
    step, start, time = 1 / float(stream.average_rate or 10), None, None
    while True:
        with listening(path):
            packet = next(packets, None)
            frames = packet.decode() if packet else []
        if packet is None:
            return
        for frame in frames:
            if frame.is_corrupt:
                raise damaged(path, f"in the frame after {0 if time is None else time - start:.2f} "
                              "seconds")
            if start is None:
                check_colours(path, frame)
                say_interlaced(path, frame)
            before = time
            if frame.pts is not None:
                time = float(frame.pts * frame.time_base)
            else:
                time = 0.0 if time is None else time + step
            if before is not None and time < before:  # two recordings in one file
                raise damaged(path, f"its times go back after {before - start:.2f} seconds")
            start = time if start is None else start
            yield time - start, partial(upright, frame, stream.sample_aspect_ratio)


def gif_frames(path, stack):
    """The same for a gif, through Pillow: ffmpeg does not see where a gif is damaged. A delay below
    20 ms means 100, as in browsers."""
    time = 0.0
    try:
        for frame in ImageSequence.Iterator(stack.enter_context(Image.open(path))):
            pixels = over_white(np.array(frame.convert("RGBA")))
            delay = frame.info.get("duration", 0)
            yield time, partial(lambda pixels: (pixels, 1.0), pixels)
            time += delay / 1000 if delay >= 20 else 0.1
    except Exception as error:  # Pillow has six kinds for damaged files
        raise damaged(path, first_line(error)) from None


def check_gif(path):
    """UsageError unless the blocks of a gif follow each other up to the mark of its end. Where a
    piece is missing, Pillow takes the next such byte among the pixels for that mark. A picture of
    another kind that is named .gif has no such blocks; what comes after the mark does not count."""
    data = path.read_bytes()
    if not data.startswith(b"GIF8"):
        return

    def table(flags):
        """Bytes of a table of colours."""
        return 3 << (flags & 7) + 1 if flags & 128 else 0

    try:
        place = 13 + table(data[10])
        while data[place] != 0x3B:  # the mark
            if data[place] == 0x21:  # an extension
                place += 2
            elif data[place] == 0x2C:  # a picture
                place += 11 + table(data[place + 9])
            elif data[place]:  # some programs write a zero too many
                raise damaged(path, f"no block begins at byte {place}")
            while data[place]:
                place += 1 + data[place]
            place += 1
    except IndexError:
        raise damaged(path, "its end is missing") from None


def shown_at(frames, fps):
    """Of (seconds, frame) those that are shown at 0, 1 / fps, 2 / fps, ... seconds, up to the time
    of the last one. A frame that lasts long is taken more than once."""
    slack, n, time = min(JITTER, 0.25 / fps), 0, 0.0
    shown = None
    for time, frame in frames:
        while shown is not None and n / fps + slack < time:
            yield shown
            n += 1
        shown = frame
    while shown is not None and n / fps <= time + slack:
        yield shown
        n += 1


def check_colours(path, frame):
    """UsageError for what would come out washed out: HDR and BT.2020."""
    trc = HDR.get(int(frame.color_trc))
    if not trc and int(frame.color_primaries) == BT2020:
        trc = "BT.2020 colours"
    require(not trc, f"{path} is HDR video ({trc}), whose colours would come out pale: convert it "
            f"first, for instance {TO_SDR}")


def say_interlaced(path, frame):
    """A line for interlaced video. It is no error: whole frames are often marked so as well."""
    if frame.interlaced_frame and first_process():
        print(f"{path} is marked as interlaced: if moving edges look like combs, convert it with "
              "ffmpeg -i IN -vf bwdif OUT.mp4", file=sys.stderr)


def over_white(rgba):
    """(H, W, 4) uint8 over a white background: (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def to_pixels(frame):
    """A frame as it lies in the file: (H, W, 3) uint8, transparent parts white."""
    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        return over_white(frame.to_ndarray(format="rgba"))
    return frame.to_ndarray(format="rgb24")


def turned(pixels, matrix):
    """(H, W, 3) as a display matrix wants it: turned by quarters, mirrored. Its first four numbers
    say where x and y of the file go: x' = a x + c y, y' = b x + d y."""
    a, b, _, c, d = matrix[:5]
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def display_matrix(frame):
    """The nine numbers of a frame's display matrix: without one, those that change nothing."""
    for data in frame.side_data:
        if data.type == Type.DISPLAYMATRIX:
            return np.frombuffer(bytes(data), np.int32).tolist()
    return [1, 0, 0, 0, 1, 0, 0, 0, 1]


def upright(frame, aspect):
    """(pixels (H, W, 3) uint8, width of a pixel relative to its height) of a frame of ffmpeg's, the
    way up that it is meant to be seen."""
    matrix, aspect = display_matrix(frame), float(aspect or 1)
    quarter = abs(matrix[1]) > abs(matrix[0])
    return turned(to_pixels(frame), matrix), 1 / aspect if quarter else aspect


def iter_video(path, fps):
    """(pixels (H, W, 3) uint8, width of a pixel relative to its height) of the frames of a video
    file, thinned to `fps` unless that is 0. If none are closer than 1 / fps, all stay, and those
    that last longer than the shortest are repeated.

    Raises UsageError for damage, HDR and transparency."""
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() == ".gif":
            check_gif(path)
            times = [time for time, _ in gif_frames(path, stack)]
            frames = gif_frames(path, stack)
        else:
            times, frames = file_times(path), file_frames(path, stack)
        lasting = np.diff(times)
        shortest, longest = min(lasting, default=0), max(lasting, default=0)
        if fps and shortest > 1 / fps + ROUNDING and first_process():
            print(f"{path}: {1 / shortest:.3g} frames a second, fewer than --fps {fps:g}: all are "
                  "kept, so it plays faster", file=sys.stderr)
        if fps and shortest < 1 / fps - ROUNDING:
            chosen = shown_at(frames, fps)
        elif fps and longest > shortest + 2 * ROUNDING:  # motion keeps its rhythm
            chosen = shown_at(frames, 1 / shortest)
        else:
            chosen = (frame for _, frame in frames)
        for pixels_of in chosen:
            yield pixels_of()
