"""Images and videos, read and written."""

import sys
from pathlib import Path

import imageio.v2 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from tests.common import colour_clip, shell
from utils import media
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
    assert Path(f"12:30{ending}").is_file()
    back = media.read_video(tmp_path / f"a{ending}", 128)
    assert len(back) == 300
    assert (ending == ".mp4"
            or (back[7, :, ::4, ::4].float() / 127.5 - 1 - frames[7]).abs().mean() < 0.1)


def test_images(tmp_path):
    # with alpha
    iio.imwrite(tmp_path / "wide.png",
                np.dstack([np.full((40, 100), v, np.uint8) for v in (255, 0, 127, 9)]))
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
    for name, message in (("bad.jpg", "cannot be read"), ("none.jpg", "is not a file")):
        with pytest.raises(UsageError, match=message):
            media.read_image(tmp_path / name, 32)


@pytest.mark.parametrize("name", ["v.mp4", "v.gif"])
def test_writer_keeps_size_and_writes_whole_files(tmp_path, name):
    video = data.ToyWorld(34, 6).batch([0])["video"][0]
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
        class Reader:
            get_meta_data = lambda self: {"fps": 8}
            __enter__, __exit__ = lambda self: self, lambda self, *_: None
            __iter__ = lambda self: (np.zeros((256, 256, 3), np.uint8) for _ in range(2000))
        media.iio.get_reader = lambda path: Reader()
        used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = used()
        assert len(media.read_video("a.mp4", 32)) == 2000
        print(used() - before)
        """,
    )
    assert int(said) < 200_000  # KiB; gathered in one list it is 460,000 to 590,000


def test_a_video_that_ffmpeg_cut_short_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "count_frames_and_secs", lambda path: (1, 0.1))
    with (pytest.raises(UsageError, match="ffmpeg left 1 of 3 frames"),
          media.video_writer(tmp_path / "a.mp4") as write):
        write(torch.zeros(3, 3, 16, 16))
    assert not list(tmp_path.iterdir())
