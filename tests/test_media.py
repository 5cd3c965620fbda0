"""Images and videos, read and written."""

import gc
import struct
import sys
from collections import Counter
from pathlib import Path

import imageio.v2 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from tests.common import colour_clip, shell, write_frames
from utils import media, video
from utils.errors import UsageError


def test_numbered_images_come_in_order(tmp_path):
    for number in range(12):
        iio.imwrite(tmp_path / f"{number}.png", np.full((8, 8, 3), 20 * number, np.uint8))
    assert media.read_video(tmp_path, 8)[:, 0, 0, 0].tolist() == [20 * n for n in range(12)]


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_videos_are_written_as_they_come(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    frames = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with media.video_writer(tmp_path / f"a{ending}", zoom=4) as write:
        for part in frames.split(50):
            write(part)
        assert max(p.stat().st_size for p in tmp_path.iterdir()) > 100_000
        assert not (tmp_path / f"a{ending}").exists()
    with media.video_writer(f"12:30{ending}") as write:  # a colon is no protocol of ffmpeg's
        write(frames[:1])
    assert len(media.read_video(f"12:30{ending}", 16)) == 1
    back = media.read_video(tmp_path / f"a{ending}", 128)
    assert len(back) == 300
    assert (ending == ".mp4"
            or (back[7, :, ::4, ::4].float() / 127.5 - 1 - frames[7]).abs().mean() < 0.1)


def test_images(tmp_path):
    # with alpha
    iio.imwrite(tmp_path / "wide.png",
                np.dstack([np.full((40, 100), v, np.uint8) for v in (255, 0, 127, 255)]))
    iio.imwrite(tmp_path / "grey.jpg", np.full((50, 30), 100, np.uint8))
    image = media.read_image(tmp_path / "wide.png", 32)
    assert image.shape == (1, 1, 3, 32, 32) and image[0, 0, 0].min() == 1
    assert image[0, 0, 1].max() == -1
    assert media.read_image(tmp_path / "grey.jpg", 32).std() < 0.02
    # 100 in 16 bits
    Image.fromarray(np.full((20, 20), 25_700, np.uint16)).save(tmp_path / "deep.png")
    assert (media.read_image(tmp_path / "deep.png", 16) - (100 / 127.5 - 1)).abs().max() < 0.01
    colour_clip(tmp_path, "moving.gif")
    # its first frame
    assert media.read_image(tmp_path / "moving.gif", 16).shape == (1, 1, 3, 16, 16)
    # light above
    turned = Image.fromarray(np.repeat([[255], [0]], 20, 0).repeat(40, 1).astype(np.uint8))
    turned.getexif()[0x0112] = 6  # held a quarter turn to the left
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    light = media.read_image(tmp_path / "turned.jpg", 32)[0, 0].mean((0, 1))  # (columns,)
    assert light[-10:].min() > 0.9 and light[:10].max() < -0.9
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    for dtype, name in ((np.int32, "whole.tif"), (np.float32, "real.tif")):
        Image.fromarray(np.full((20, 20), 100, dtype)).save(tmp_path / name)
    Image.fromarray(np.full((20, 20), 25_700, ">u2")).save(tmp_path / "swapped.tif")
    assert (media.read_image(tmp_path / "swapped.tif", 16) - (100 / 127.5 - 1)).abs().max() < 0.01
    for name, message in (("bad.jpg", "cannot be read"), ("none.jpg", "is not a file"),
                          ("whole.tif", "tif has pixels in int32, of which .*: convert it to a"),
                          ("real.tif", "tif has pixels in float32, of which")):
        with pytest.raises(UsageError, match=message):
            media.read_image(tmp_path / name, 32)


@pytest.mark.parametrize("name", ["v.mp4", "v.gif"])
def test_writer_keeps_size_and_writes_whole_files(tmp_path, name):
    video = data.ToyWorld(34, 6, 0).batch([0])["video"][0]
    with media.video_writer(tmp_path / name, fps=8, zoom=3) as write:
        write(video[:3])
        assert not (tmp_path / name).exists()
        write(video[3:])
    back = media.read_video(tmp_path / name, 34)
    assert iio.get_reader(tmp_path / name).get_data(0).shape[:2] == (102, 102)
    assert len(back) == 6 and (back.float() / 127.5 - 1 - video).abs().mean() < 0.1
    with pytest.raises(RuntimeError):
        with media.video_writer(tmp_path / name) as write:
            write(video[:1])
            raise RuntimeError("interrupted")
    assert len(media.read_video(tmp_path / name, 34)) == 6 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match="mp4 or .gif"):
        sample.main(["--from-data", "--out", str(tmp_path / "v.txt")])


@pytest.mark.skipif(sys.platform != "linux",
                    reason="other systems count and allocate memory in other ways")
def test_long_videos_take_the_memory_of_their_frames():
    """2,000 frames of 256 x 256 pixels are 6 MB at 32 x 32. In a process of its own, whose memory
    has not been used before."""
    said = shell(
        "python",
        "-c",
        """if True:
        import resource, numpy as np
        from utils import media
        media.iter_video = lambda path, fps: (
            (np.zeros((256, 256, 3), np.uint8), 1.0) for _ in range(2000))
        used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = used()
        assert len(media.read_video("a.mp4", 32)) == 2000
        print(used() - before)
        """,
    )
    assert int(said) < 200_000  # KiB; gathered in one list it is 460,000 to 590,000


@pytest.mark.parametrize("name, fps, remedy", [
    ("a.gif", 60, "use 0.01 to 50, or write an .mp4"), ("a.gif", 1e-9, "use 0.01 to 50"),
    ("a.mp4", 1e-9, "use 0.01 to 1000"), ("a.mp4", 1e12, "use 0.01 to 1000"),
    ("a.mp4", float("nan"), "use 0.01 to 1000")])
def test_rates_that_a_file_cannot_have(tmp_path, name, fps, remedy):
    with pytest.raises(UsageError, match=f"--fps .* does not work for .*{name}: {remedy}"):
        with media.video_writer(tmp_path / name, fps):
            raise AssertionError("the work has begun")


@pytest.mark.parametrize("size", [
    "480", "480x832x3", "0x16", "016x16", "17x16", "16x16\n", "9" * 5000 + "x16"])
def test_sizes_that_are_none(size):
    assert media.parse_size("480x832") == (480, 832)
    with pytest.raises(UsageError, match="is not height x width in multiples of 16: use") as error:
        media.parse_size(size)
    assert len(str(error.value)) < 200


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    """And no word of imageio's, which would close its own file again at the end."""
    resource = pytest.importorskip("resource")
    ignored, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UsageError, match="cannot write .*a.png: File too large"):
            media.write_sheet(tmp_path / "a.png", torch.rand(1, 1, 3, 32, 32))
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not ignored and not list(tmp_path.iterdir())


def test_a_video_that_ffmpeg_cut_short_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "count_frames_and_secs", lambda path: (1, 0.1))
    with (pytest.raises(UsageError, match="ffmpeg left 1 of 3 frames"),
          media.video_writer(tmp_path / "a.mp4") as write):
        write(torch.zeros(3, 3, 16, 16))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- when a frame is shown

def greys(clip):
    """The mean grey of every frame."""
    return clip.float().mean((1, 2, 3)).round().int().tolist()


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm"])
def test_frames_are_thinned_by_their_times(tmp_path, ending):
    """Two seconds of 60 frames a second, then two of 10, as a screen recording: 40 frames that are
    0.1 s apart. Without a rate every frame once, none repeated."""
    times = [*range(120), *range(120, 240, 6)]
    path = tmp_path / f"a.{ending}"
    write_frames(path, [t for t in times], rate=60, times=times)
    assert len(media.read_video(path, 16)) == 140
    steps = np.diff(greys(media.read_video(path, 16, 10)))
    assert len(steps) == 39 and set(steps) <= {5, 6, 7}


@pytest.mark.parametrize("delays, fps, taken", [
    ([20] + 11 * [100], 10, [0, *range(1, 11)]),
    ([1000] + 11 * [50], 5, 5 * [0] + [1, 5, 9]),
    (12 * [100], 5, [0, 2, 4, 6, 8, 10]), (12 * [100], 16, list(range(12))),
    ([100, 100, 300, 100, 100], 16, [0, 1, 2, 2, 2, 3, 4])])
def test_gifs_whose_frames_last_differently(tmp_path, capsys, delays, fps, taken):
    frames = [Image.new("L", (16, 16), 20 * n) for n in range(len(delays))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=delays)
    found = [round(grey / 20) for grey in greys(media.read_video(tmp_path / "a.gif", 16, fps))]
    assert found == taken
    assert ("fewer than --fps 16" in capsys.readouterr().err) == (fps == 16)


def test_a_rate_that_is_almost_the_files(tmp_path):
    """25 to 24 frames a second leaves one of 25 out; 24 to 23.976 none, their times are rounded."""
    for ending in ("mp4", "mkv"):
        write_frames(tmp_path / f"a.{ending}", range(26), rate=25)
        write_frames(tmp_path / f"b.{ending}", range(26), rate=24)
        assert len(media.read_video(tmp_path / f"a.{ending}", 16, 24)) == 25
        assert len(media.read_video(tmp_path / f"b.{ending}", 16, 24000 / 1001)) == 26


def test_a_late_start_is_not_filled_up(tmp_path):
    """The picture begins half a second after the sound would."""
    write_frames(tmp_path / "a.mp4", range(0, 100, 10), rate=10, times=range(5, 15))
    assert len(media.read_video(tmp_path / "a.mp4", 16)) == 10
    assert len(media.read_video(tmp_path / "a.mp4", 16, 5)) == 5


# ---------------------------------------------------------------- shape and colours

def lit(clip):
    """(left, right, top, bottom) of what is bright in the first frame."""
    y, x = np.where(clip[0].float().mean(0) > 128)
    return [x.min(), x.max() + 1, y.min(), y.max() + 1]


def test_pixels_that_are_wider_than_high(tmp_path):
    """A square of 8 x 8 that a file holds as 4 x 8 pixels, twice as wide as high; and turned."""
    still = np.zeros((48, 32), np.uint8)
    still[8:16, 4:8] = 255
    write_frames(tmp_path / "a.mp4", [still] * 2, aspect=2)
    found = lit(media.read_video(tmp_path / "a.mp4", (48, 64)))
    assert np.abs(np.array(found) - [8, 16, 8, 16]).max() <= 1
    write_frames(tmp_path / "b.mp4", [still] * 2, aspect=2, rotation=90)  # to the left
    found = lit(media.read_video(tmp_path / "b.mp4", (64, 48)))
    assert np.abs(np.array(found) - [8, 16, 48, 56]).max() <= 1


@pytest.mark.parametrize("turn, place", [
    (90, [8, 16, 48, 56]), (180, [48, 56, 32, 40]), (270, [32, 40, 8, 16])])
def test_phones_that_were_turned(tmp_path, turn, place):
    still = np.zeros((48, 64), np.uint8)
    still[8:16, 8:16] = 255
    write_frames(tmp_path / "a.mp4", [still] * 2, rotation=turn)
    clip = media.read_video(tmp_path / "a.mp4", (48, 64) if turn == 180 else (64, 48))
    assert np.abs(np.array(lit(clip)) - place).max() <= 1


def test_display_matrices_mirror_and_turn():
    """All eight ways to look at a picture, as NumPy does them."""
    picture = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    ways = {(1, 0, 0, 1): picture, (-1, 0, 0, 1): picture[:, ::-1], (1, 0, 0, -1): picture[::-1],
            (-1, 0, 0, -1): np.rot90(picture, 2), (0, -1, 1, 0): np.rot90(picture, 1),
            (0, 1, -1, 0): np.rot90(picture, -1), (0, 1, 1, 0): picture.swapaxes(0, 1),
            (0, -1, -1, 0): np.rot90(picture.swapaxes(0, 1), 2)}
    for (a, b, c, d), expected in ways.items():
        found = video.turned(picture, [a, b, 0, c, d, 0, 0, 0, 1])
        assert np.array_equal(found, expected), (a, b, c, d)


@pytest.mark.parametrize("transfer, primaries", [(16, 9), (18, 9), (1, 9)])
def test_hdr_is_refused(tmp_path, transfer, primaries):
    write_frames(tmp_path / "a.mp4", [50] * 2, transfer=transfer, primaries=primaries)
    with pytest.raises(UsageError, match="is HDR video .*convert it first"):
        media.read_video(tmp_path / "a.mp4", 16)


def test_interlaced_video_is_said(tmp_path, capsys):
    write_frames(tmp_path / "a.mp4", [50] * 2, **{"x264-params": "interlaced=1"})
    write_frames(tmp_path / "b.mp4", [50] * 2)
    for name in ("a.mp4", "b.mp4"):
        assert len(media.read_video(tmp_path / name, 16)) == 2
    said = capsys.readouterr().err
    assert "a.mp4 is marked as interlaced" in said and "b.mp4" not in said


def test_transparent_parts_are_white(tmp_path):
    picture = np.zeros((20, 20, 4), np.uint8)
    picture[5:15, 5:15] = 255, 0, 0, 255
    iio.imwrite(tmp_path / "a.png", picture)
    palette = Image.fromarray(picture).convert("P")
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
    Image.fromarray(picture).save(tmp_path / "c.webp", lossless=True)
    for name in ("a.png", "b.png", "c.webp"):
        image = media.read_image(tmp_path / name, 20)[0, 0]
        assert (image[:, 0, 0] == 1).all() and image[1:, 10, 10].max() < -0.9
    Image.fromarray(picture).save(tmp_path / "a.gif")
    clip = media.read_video(tmp_path / "a.gif", 20)
    assert (clip[0, :, 0, 0] == 255).all() and clip[0, 1, 10, 10] < 10


def test_odd_sides_become_an_mp4(tmp_path):
    """H.264 has even sides; a gif keeps its own."""
    with media.video_writer(tmp_path / "a.mp4") as write:
        write(torch.rand(3, 3, 27, 33))
    assert media.iio.get_reader(tmp_path / "a.mp4").get_data(0).shape[:2] == (28, 34)
    assert len(media.read_video(tmp_path / "a.mp4", 16)) == 3


# ---------------------------------------------------------------- damage

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm", "a.gif"])
@pytest.mark.parametrize("damage", ["hole", "noise", "cut"])
def test_damaged_videos_are_not_read(tmp_path, name, damage):
    """A fifth in the middle lost or overwritten, or the last two fifths missing: never a clip with
    frames that stand still."""
    path = tmp_path / name
    g = np.random.default_rng(0)
    write_frames(path, [g.integers(0, 255, (48, 64), np.uint8) for _ in range(20)])
    assert len(media.read_video(path, 16)) == 20
    whole = path.read_bytes()
    a, b = 2 * len(whole) // 5, 3 * len(whole) // 5
    middle = {"hole": bytes(b - a), "noise": g.bytes(b - a), "cut": b""}[damage]
    path.write_bytes(whole[:a] + middle + (b"" if damage == "cut" else whole[b:]))
    with pytest.raises(UsageError, match="cannot be read as a video, it is damaged"):
        media.read_video(path, 16)


def test_a_gif_that_lacks_a_piece(tmp_path):
    """Pillow ends where a frame should begin and does not, or at the end of the file. What comes
    after the mark of the end is no part of the gif."""
    path, g = tmp_path / "a.gif", np.random.default_rng(0)
    write_frames(path, [g.integers(0, 255, (48, 64), np.uint8) for _ in range(20)])
    whole = path.read_bytes()
    begins = whole.rindex(b"\0!\xf9\x04", 0, len(whole) // 2) + 1
    pixels = whole.index(b";", begins + 1000) - 1  # a byte that looks like the mark
    for damage in (whole[:begins], whole[:begins] + whole[pixels:]):
        path.write_bytes(damage)
        with pytest.raises(UsageError, match="damaged or none .(its end|no block begins at byte)"):
            media.read_video(path, 16)
    comment = b"!\xfe\x02hi\0"
    path.write_bytes(whole[:begins] + comment + b"\0" + whole[begins:] + b"junk" * 50)
    assert len(media.read_video(path, 16)) == 20
    Image.new("RGB", (16, 16)).save(path, "webp")  # many a name is wrong
    assert len(media.read_video(path, 16)) == 1


@pytest.mark.parametrize("promised", [24, 2 ** 30])
def test_an_avi_may_count_more_frames_than_it_has(tmp_path, promised):
    """Frames that were left out are chunks of no bytes; into a pipe ffmpeg writes no number."""
    path, times = tmp_path / "a.avi", [n for n in range(24) if n not in (5, 6, 13)]
    write_frames(path, [8 * n for n in times], times=times)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"strh") + 40  # of the number of frames
    assert struct.unpack_from("<I", whole, place) == (24,)
    struct.pack_into("<I", whole, place, promised)
    path.write_bytes(whole)
    assert len(media.read_video(path, 16)) == 21
    shown = greys(media.read_video(path, 16, 10))
    assert len(shown) == 24 and shown[4] == shown[5] == shown[6] < shown[7] - 10


def test_two_recordings_in_one_file_are_not_one(tmp_path):
    """Of a stream whose times begin again, the second part would be thinned away."""
    write_frames(tmp_path / "a.ts", range(20))
    whole = (tmp_path / "a.ts").read_bytes()
    packets = [bytearray(whole[i:i + 188]) for i in range(0, len(whole), 188)]
    def stream(p):
        return p[1] & 31, p[2]

    number = Counter(stream(p) for p in packets if p[3] & 16)  # those with a payload
    for p in packets:  # the second part counts on, as if it were of one recording
        p[3] = p[3] & 240 | (p[3] + number[stream(p)]) & 15
    (tmp_path / "a.ts").write_bytes(whole + b"".join(packets))
    with pytest.raises(UsageError, match="its times go back after"):
        media.read_video(tmp_path / "a.ts", 16, fps=5)


def test_damaged_sound_refuses_no_picture():
    """It is not read, but ffmpeg tries a little of it to know the file."""
    assert video.sound("aac") and video.sound("mp3")
    assert not (video.sound("h264") or video.sound("mov,mp4,m4a,3gp,3g2,mj2") or video.sound(""))


def test_the_second_damaged_video_is_noticed_too(tmp_path):
    """ffmpeg keeps quiet when it says the same twice."""
    write_frames(tmp_path / "a.mkv", range(20))
    whole = (tmp_path / "a.mkv").read_bytes()
    for name in ("a.mkv", "b.mkv"):
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
        with pytest.raises(UsageError, match="damaged"):
            media.read_video(tmp_path / name, 16)


def test_sound_alone_is_no_video(tmp_path):
    import av
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(UsageError, match="holds no video"):
        media.read_video(tmp_path / "a.mp4", 16)


def test_a_name_of_the_most_bytes_is_written(tmp_path):
    """The temporary file must not need a longer one; a name that is too long is said before the
    work."""
    longest = tmp_path / ("a" * 251 + ".png")
    media.write_sheet(longest, torch.zeros(1, 1, 3, 8, 8))
    assert longest.is_file()
    with pytest.raises(UsageError, match="File name too long; use a shorter name"):
        with media.video_writer(tmp_path / ("a" * 252 + ".mp4")):
            raise AssertionError("the work has begun")


def test_pictures_of_two_sizes_are_no_video(tmp_path):
    """First frames that happen to be numbered; and a damaged one is named."""
    for n, side in enumerate((16, 16, 24)):
        iio.imwrite(tmp_path / f"{n}.png", np.zeros((16, side, 3), np.uint8))
    with pytest.raises(UsageError, match="2.png has 24 x 16 pixels, the images before it 16 x 16"):
        media.read_video(tmp_path, 16)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    with pytest.raises(UsageError, match="2.png cannot be read as an image"):
        media.read_video(tmp_path, 16)
