"""Media files: images and videos to tensors and back, through imageio, Pillow and ffmpeg."""
import contextlib
import io
import itertools
import re
from pathlib import Path

import imageio.v2 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from imageio.v3 import improps, imread
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image, ImageOps

from utils.errors import UsageError, first_line, require
from utils.files import atomic_write
from utils.video import iter_video, over_white

VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".gif", ".mkv", ".avi")
OTHER_VIDEOS = (".m4v", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".wmv",
                ".asf", ".flv", ".f4v", ".ogv", ".ogg", ".3gp", ".mxf", ".y4m")
LEFT_BEHIND = ("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot",
               "$recycle.bin", "recycler", "system volume information", "found.000", "lost.dir",
               "lost+found", "__macosx", "temporary items", "network trash folder")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
OTHER_IMAGES = (".tif", ".tiff", ".exr", ".apng", ".avif", ".heic", ".jxl", ".tga", ".dpx")
FFMPEG = {  # file ending -> how ffmpeg writes it
    ".mp4": dict(codec="libx264", quality=8,
                 output_params=["-preset", "veryfast"]),  # must keep up with the stream
    ".gif": dict(codec="gif", pixelformat="pal8", output_params=[  # a palette for every frame
        "-filter_complex",
        "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none",
        "-loop", "0"]),
}


def parse_size(text):
    """"480x832" -> (480, 832), height and width in pixels, multiples of 16."""
    written = re.fullmatch("([1-9][0-9]{,5})x([1-9][0-9]{,5})", text)
    numbers = tuple(map(int, written.groups())) if written else ()
    require(written and all(n % 16 == 0 for n in numbers), f"--size {text[:40]} is not height x "
            "width in multiples of 16: use --size 480x832")
    return numbers


# ---------------------------------------------------------------- reading

def hidden(path):
    """Whether a name is one that programs leave behind: .ipynb_checkpoints, ._a.mp4, @eaDir."""
    return path.name.startswith(".") or path.name.lower() in LEFT_BEHIND


def image_files(folder):
    """The images of a folder in the order of their names, numbers by value: 2.png before 10.png."""
    def natural(path):
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    images = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not hidden(p))
    return sorted(images, key=natural)


def fit_frame(frame, size, aspect=1.0):
    """(H, W, 3) uint8 -> (3, h, w) uint8: resized (anti-aliased) until it covers size = (h, w), or
    the side of a square; the centre is kept. aspect: width of the frame's pixels over height."""
    height, width = (size, size) if isinstance(size, int) else size
    image = Image.fromarray(frame)
    if aspect > 1:
        image = image.resize((round(image.width * aspect), image.height))
    elif aspect < 1:
        image = image.resize((image.width, round(image.height / aspect)))
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def load_picture(path):
    """An image file as (H, W, 3) uint8, rotated as its EXIF says; grey (8 or 16 bits), palette and
    CMYK become RGB, transparent parts white. UsageError for numbers that have no known white."""
    first_frame = dict(plugin="pillow", index=0)
    dtype = improps(path, **first_frame).dtype
    require(dtype.kind in "bu", f"{path} has pixels in {dtype}, of which it is not known what is "
            "white: convert it to a png of 8 or 16 bits")
    if dtype.itemsize == 2:  # Pillow would clip at 255
        grey = imread(path, rotate=True, **first_frame) >> 8
        return grey.astype(np.uint8)[..., None].repeat(3, 2)
    with Image.open(path) as image:
        transparent = image.has_transparency_data
    if transparent:
        return over_white(imread(path, rotate=True, mode="RGBA", **first_frame))
    return imread(path, rotate=True, mode="RGB", **first_frame)


def read_image(path, size):
    """An image file as a clip of one frame (1, 1, 3, h, w) in [-1, 1]; size as in fit_frame()."""
    require(Path(path).is_file(), f"{path} is not a file: --image takes an image file")
    try:
        frame = load_picture(path)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an image ({first_line(error)}): convert it to "
                         "png or jpg") from None
    return fit_frame(frame, size)[None, None].float() / 127.5 - 1


def folder_frames(folder):
    """(pixels, 1.0) of the images of a folder, as iter_video() gives those of a file. UsageError
    that names an image which cannot be read, or has another size than the first."""
    shape = None
    for file in image_files(folder):
        try:
            pixels = load_picture(file)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{file} cannot be read as an image ({first_line(error)}): copy it "
                             "again, or remove its folder") from None
        shape = shape or pixels.shape
        require(pixels.shape == shape, f"{file} has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"the images before it {shape[1]} x {shape[0]}: they are not frames of one video, "
                "remove the folder")
        yield pixels, 1.0


def iter_frames(path, size, fps=0.0):
    """The frames (3, h, w) uint8 of a video file or a folder of images, one by one; those of a file
    are thinned to `fps` unless that is 0. Raises UsageError if it cannot be read or is empty."""
    path, taken = Path(path), 0
    try:
        for pixels, aspect in folder_frames(path) if path.is_dir() else iter_video(path, fps):
            yield fit_frame(pixels, size, aspect)
            taken += 1
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a video ({first_line(error)}): remove it, or "
                         "convert it to mp4") from None
    require(taken, f"{path} has no frames: remove it, or convert it to mp4")


def read_video(path, size, fps=0.0):
    """All frames of a video file or a folder of images: (f, 3, h, w) uint8.

    Collected in blocks of 64: small tensors kept between the large temporary ones fragment the
    heap (it took 200 KB a frame of 256 x 256 pixels)."""
    frames = iter_frames(path, size, fps)
    blocks = iter(lambda: list(itertools.islice(frames, 64)), [])
    return torch.cat([torch.stack(block) for block in blocks])


# ---------------------------------------------------------------- writing

def to_uint8(frames):
    """(..., 3, H, W) in [-1, 1] -> numpy (..., H, W, 3) uint8"""
    scaled = (frames.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().movedim(-3, -1).numpy()


def side_by_side(video, gap=2):
    """Clips (b, f, 3, H, W) in [-1, 1] as one (f, 3, H, W'), in a row with white gaps between.

    gap: pixels, an even number, since mp4 halves the sides for colour."""
    joined = rearrange(F.pad(video, (0, gap), value=1.0), "b f c h w -> f c h (b w)")
    return joined[..., :joined.shape[-1] - gap]


def count_frames(path):
    """Frames of a video file, 0 if it has none that can be counted."""
    with contextlib.suppress(RuntimeError):
        return count_frames_and_secs(f"file:{path}")[0]  # or ffmpeg sees a protocol in 12:30.mp4
    return 0


def check_rate(path, fps):
    """UsageError for a frame rate that this kind of file cannot have."""
    # ffmpeg is told two decimals; a gif's frame of less than 20 ms is shown for 100
    gif = Path(path).suffix.lower() == ".gif"
    require(0.01 <= fps <= (50 if gif else 1000), f"--fps {fps:g} does not work for {path}: use "
            f"{'0.01 to 50, or write an .mp4' if gif else '0.01 to 1000'}")


@contextlib.contextmanager
def video_writer(path, fps=8, zoom=1):
    """A function that takes frames (f, 3, H, W) in [-1, 1], part by part, and writes an mp4 or gif.

    Memory is constant; the file appears when all is written. Pixels are enlarged `zoom` times. The
    last row or column is repeated in an mp4 whose sides would be odd, which H.264 cannot have."""
    path, sent = Path(path), 0
    even = path.suffix.lower() == ".mp4"
    check_rate(path, fps)
    options = dict(fps=fps, macro_block_size=1, ffmpeg_log_level="error",
                   **FFMPEG[path.suffix.lower()])
    with atomic_write(path) as temporary:
        # "mp4" selects imageio's ffmpeg plugin, which writes gifs too
        with contextlib.closing(iio.get_writer(temporary, "mp4", **options)) as file:
            def write(frames):
                nonlocal sent
                for frame in to_uint8(frames):
                    frame = frame.repeat(zoom, 0).repeat(zoom, 1)
                    if even and (frame.shape[0] % 2 or frame.shape[1] % 2):
                        odd = [(0, side % 2) for side in frame.shape[:2]]
                        frame = np.pad(frame, (*odd, (0, 0)), "edge")
                    file.append_data(frame)
                    sent += 1

            yield write
        # closing waits for ffmpeg but ignores its exit status
        arrived = count_frames(temporary)
        require(arrived == sent, f"cannot write {path}: ffmpeg left {arrived} of {sent} frames; "
                "free some space or choose another place")


def write_sheet(path, video, zoom=2):
    """Contact sheet: a row per clip of `video` (b, f, 3, H, W), a column per frame."""
    sheet = rearrange(to_uint8(video), "b f h w c -> (b h) (f w) c")
    encoded = io.BytesIO()  # imageio's plugin does not clean up silently after a full disk
    iio.imwrite(encoded, sheet.repeat(zoom, 0).repeat(zoom, 1), format=Path(path).suffix)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.getvalue())
