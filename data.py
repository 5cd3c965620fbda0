"""Videos in, videos out: the toy world, folders of real clips, the toy codec and text encoder, reading and writing media.

    python data.py --preview preview.png                      contact sheet of what training will see (toy world)
    python data.py --preview preview.png --data DIR_OF_MP4    the same for your own clips
    python data.py encode --videos DIR_OF_MP4 --out DIR_OF_LATENTS --vae DIR_OF_VAE --text-encoder DIR_OF_UMT5
                                                              videos and captions to latents, for training at Wan scale

A dataset is anything with batch(indices) -> {"video": (b, f, 3, H, W) in [-1, 1], "text": [str]}; clip number i is always
the same clip, so that a run is resumed by knowing its step, and any number of devices reads the same global batch.
"""
import argparse
import contextlib
import csv
import itertools
import json
import os
import re
import signal
import sys
import zlib
from pathlib import Path

import imageio.v2 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from imageio.v3 import improps, imread
from imageio_ffmpeg import count_frames_and_secs, write_frames
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import UsageError

VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".gif", ".mkv", ".avi")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
HELD_OUT = 1_000_000_000  # clip numbers from here on are not trained on


# ---------------------------------------------------------------- one sentence for what a user can mend

@contextlib.contextmanager
def explain():
    """Turn a UsageError, and what disks, devices and people do to a run, into one sentence on stderr and exit status 2 (Ctrl-C: 130)."""
    try:
        yield
    except UsageError as error:
        said, status = error, 2
    except OSError as error:
        said, status = f"{error.filename or 'the file system'}: {error.strerror or error}: check the path, its permissions and the free space", 2
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no exception of its own
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        said, status = f"out of memory ({_first_line(error)}): lower --micro-batch, or give it --recompute or more devices", 2
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    else:
        return
    print(f"error: {said}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def asked_to_stop(*signals):
    """A list that grows when one of the signals comes, so that a loop can end between two steps. The second time a signal does what it always did."""
    came, before = [], {}

    def note(number, _):
        came.append(number)
        signal.signal(number, before[number])

    for number in signals:
        before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_device(name):
    """UsageError where there is no such device."""
    try:
        torch.empty(1, device=name)
        known = name in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not here ({_first_line(error)})") from None
    if not known:
        raise UsageError(f"--device {name}: say cuda, mps or cpu; which GPU cuda is, the variable CUDA_VISIBLE_DEVICES says")


class Flags(argparse.ArgumentParser):
    """A command line that complains in one sentence and knows flags by their whole names only."""

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists every flag\n")


@contextlib.contextmanager
def written_whole(path):
    """A temporary name beside `path` that becomes `path` only when all has been written; a failure leaves nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # so that a folder that cannot be written says so, and not ffmpeg
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or _first_line(error)}; free some space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- randomness that does not depend on the layout

class Draws:
    """Random numbers for a batch, one independent stream per clip, a function of (seed, *key, clip) alone.

    The same clip gets the same noise however a batch is split over devices and micro-batches, and whether or not the
    run was interrupted: there is no random state to save."""

    def __init__(self, clips, *key, device="cpu"):
        seeded = lambda *key: torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
        self.device, self.clips, self.shared = device, clips, seeded(*key)
        self.streams = [seeded(*key, int(i)) for i in clips]

    def _each(self, draw):
        return torch.stack([draw(g) for g in self.streams]).to(self.device)

    def randn(self, *shape):
        return self._each(lambda g: torch.randn(shape, generator=g))

    def rand(self, *shape):
        return self._each(lambda g: torch.rand(shape, generator=g))

    def spread(self):
        """(b, 1) numbers from 0 to 1, uniform for every clip, but those of clips that follow one another lie far apart: multiples of the golden
        ratio from a common random start. A batch then has all levels of noise in it, and the mean of its gradients less noise."""
        golden = torch.tensor([[int(i) * 0.6180339887498949 % 1] for i in self.clips], dtype=torch.float64)
        return ((golden + torch.rand((), generator=self.shared)) % 1).float().to(self.device)

    def choice(self, weights, *shape):
        """Indices drawn with probability proportional to `weights`."""
        p = torch.tensor(weights, dtype=torch.float64)
        return self._each(lambda g: torch.multinomial(p, int(np.prod(shape)), True, generator=g).view(shape))


# ---------------------------------------------------------------- the toy world

KINDS = ("disc", "square", "triangle")
COLOURS = {"red": (.95, .22, .18), "yellow": (.98, .82, .15), "green": (.25, .85, .3), "cyan": (.2, .85, .95),
           "blue": (.25, .35, 1.), "pink": (1., .45, .8)}
DIRECTIONS = {"right": (1, 0), "down-right": (1, 1), "down": (0, 1), "down-left": (-1, 1),
              "left": (-1, 0), "up-left": (-1, -1), "up": (0, -1), "up-right": (1, -1)}


class ToyWorld:
    """One shape that glides over a still, softly rippled background and bounces off the walls.

    Infinite and seeded: clip i is a pure function of i. The caption tells colour, kind and first direction; the speed
    is told by nobody, so a clip has many futures. A `state` holds all there is to know, a dict of tensors:
    kind, colour, direction (b,); start, velocity (b, 2) in pixels and pixels a frame; ground (b, 2, 3) two colours,
    ripple (b, 3) angle, phase, wavelength. Raises UsageError for frames too small for the shape."""
    latent = False

    def __init__(self, size=32, frames=16):
        if size < 24:
            raise UsageError(f"the toy world needs frames of at least 24 pixels, not {size}: use --size 32")
        self.size, self.frames = size, frames
        self.radius, self.speeds = size * 7.5 / 32, (size * 1.3 / 32, size * 1.9 / 32)
        unit = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
        self.directions = unit / unit.norm(dim=1, keepdim=True)
        self.colours = torch.tensor(list(COLOURS.values())) * 2 - 1
        grid = torch.arange(size) + 0.5
        self.y, self.x = torch.meshgrid(grid, grid, indexing="ij")

    def state(self, indices):
        """The states of these clips. No wall is met in the first three steps, so that the direction can be seen."""
        rows = []
        for i in indices:
            g = np.random.default_rng(int(i))
            kind, colour, direction = g.integers(len(KINDS)), g.integers(len(COLOURS)), g.integers(len(DIRECTIONS))
            velocity = self.directions[direction].numpy() * g.uniform(*self.speeds)
            low, high = self.radius, self.size - self.radius
            start = g.uniform(np.maximum(low, low - 3 * velocity), np.minimum(high, high - 3 * velocity))
            ripple = (*g.uniform(0, 2 * np.pi, 2), g.uniform(1, 2) * self.size)
            base, swing = g.uniform(.1, .4, 3), g.uniform(-.1, .1, 3)
            rows.append((kind, colour, direction, start, velocity, np.stack([base + swing, base - swing]) * 2 - 1, ripple))
        names = ("kind", "colour", "direction", "start", "velocity", "ground", "ripple")
        state = {name: torch.as_tensor(np.array([row[j] for row in rows])) for j, name in enumerate(names)}
        return {name: x if x.dtype == torch.int64 else x.float() for name, x in state.items()}

    def centres(self, state, frames=None):
        """Where the shape is: (b, f, 2) as x, y in pixels, with elastic walls."""
        n, span = torch.arange(frames or self.frames)[:, None], self.size - 2 * self.radius
        free = (state["start"][:, None] - self.radius + state["velocity"][:, None] * n) % (2 * span)
        return self.radius + span - (free - span).abs()

    def coverage(self, kind, centres):
        """Anti-aliased silhouettes (n, H, W) in [0, 1] of shapes of `kind` (n,) at `centres` (n, 2)."""
        dx, dy = (g - c[:, None, None] for g, c in zip((self.x, self.y), centres.float().unbind(1)))
        r, kind = self.radius, kind[:, None, None]
        disc = (dx ** 2 + dy ** 2).sqrt() - .95 * r
        square = torch.maximum(dx.abs(), dy.abs()) - .82 * r
        triangle = torch.maximum(dy - .62 * r, .866 * dx.abs() - .5 * dy - .62 * r)
        distance = torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle))
        return (.5 - distance / (self.size * 3 / 32)).clamp(0, 1)  # soft edges: a pixel-sharp outline costs hours to learn

    def layers(self, state):
        """The empty background and the shape's colour everywhere, each (b, 3, H, W)."""
        angle, phase, wavelength = state["ripple"][..., None, None].unbind(1)
        wave = torch.sin(2 * np.pi * (self.x * angle.cos() + self.y * angle.sin()) / wavelength + phase)
        mix, (one, two) = (.5 + .5 * wave)[:, None], state["ground"][..., None, None].unbind(1)
        background = one * mix + two * (1 - mix)
        return background, self.colours[state["colour"]][..., None, None].expand_as(background)

    def render(self, state, centres=None):
        """(b, f, 3, H, W) in [-1, 1]"""
        centres = self.centres(state) if centres is None else centres
        b, f = centres.shape[:2]
        cover = self.coverage(state["kind"].repeat_interleave(f), centres.flatten(0, 1)).unflatten(0, (b, f))[:, :, None]
        background, colour = (x[:, None] for x in self.layers(state))
        return background * (1 - cover) + colour * cover

    def captions(self, state):
        """["red disc moving up left", ...]: directions as words that combine, which are learnt sooner than eight names"""
        words = [list(COLOURS), KINDS, list(DIRECTIONS)]
        rows = zip(state["colour"], state["kind"], state["direction"])
        return ["{} {} moving {}".format(*(w[i].replace("-", " ") for w, i in zip(words, row))) for row in rows]

    def batch(self, indices):
        state = self.state(indices)
        return {"video": self.render(state), "text": self.captions(state), "state": state}


# ---------------------------------------------------------------- folders of real clips

class VideoFolder:
    """Every clip of `frames` frames that can be cut from the videos of a folder, at `size` x `size` pixels.

    Videos are files (mp4, webm, mov, gif, ...) or folders of numbered images; the caption is a .txt file of the same name
    beside them. Frames are thinned out to `fps` (0: as they are), the short side is resized, the centre is kept. All
    frames are held in memory, which is right for the toy preset. Raises UsageError, naming the file and the remedy."""
    latent = False

    def __init__(self, folder, size, frames, fps=0.0):
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder of videos: --data takes a folder with {', '.join(VIDEO_ENDINGS)} files")
        sources = sorted(p for p in folder.iterdir()
                         if p.suffix.lower() in VIDEO_ENDINGS or p.is_dir() and any(image_files(p)))
        if not sources:
            raise UsageError(f"no videos in {folder}: put {', '.join(VIDEO_ENDINGS)} files or folders of images there")
        self.frames, self.clips, self.texts = frames, [], []
        for path in sources:
            video = read_video(path, size, fps)
            if len(video) < frames:
                raise UsageError(f"{path} has {len(video)} frames, a clip needs {frames}: remove it, or lower --frames"
                                 + (", or raise --fps" if fps else ""))
            self.clips.append(video)
            sidecar = path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")
            self.texts.append(read_text(sidecar).strip() if sidecar.is_file() else "")
        starts = torch.tensor([len(v) - frames + 1 for v in self.clips], dtype=torch.float64)
        self.weights = (starts / starts.sum()).tolist()

    def batch(self, indices):
        rows = []
        for i in indices:
            g = np.random.default_rng(int(i))
            which = g.choice(len(self.clips), p=self.weights)
            rows.append((which, g.integers(len(self.clips[which]) - self.frames + 1)))
        video = torch.stack([self.clips[w][s:s + self.frames] for w, s in rows]).float() / 127.5 - 1
        return {"video": video, "text": [self.texts[w] for w, _ in rows]}


def padded(texts):
    """Embedded captions (l, d) of any length as one tensor (b, l, d), zeros after the shorter ones."""
    length = max(len(text) for text in texts)
    return torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts])


def clips_in(folder):
    """The .safetensors files of a folder, without those that are being written (.NAME.tmp.safetensors)."""
    return sorted(p for p in Path(folder).glob("*.safetensors") if not p.name.startswith("."))


class LatentFolder:
    """Clips that have been encoded: a .safetensors file each, with `latents` (f, c, h, w) and `text` (l, d), the embedded caption.

    What training at Wan scale reads. A clip is the first `frames` frames of a file, since the first latent frame of a video
    VAE is special. Files may also hold `text` alone, or be a teacher's trajectories (`states`, of which the last is a clip).
    Raises UsageError, naming the file, for what does not fit."""
    latent = True

    def __init__(self, folder, frames):
        self.paths, self.frames = clips_in(folder), frames
        self.only_text, self.network = read_tensors(self.paths[0]).keys() == {"text"}, None  # the Config that every clip has to fit, see check()
        negative = Path(folder) / "negative" / "text.safetensors"
        self.negative = read_tensors(negative)["text"].float() if negative.is_file() else None  # (l, d), for guidance

    def check(self, cfg, trajectories):
        """The folder to train on: this one, or, for stage 2 where only captions are given, the ends of stage 1's trajectories, in the first
        of the folders `trajectories` that holds any.
        UsageError unless channels and text are what the network of `cfg` takes."""
        if self.only_text and cfg.stage == 2 and (made := next(filter(clips_in, trajectories), None)):
            clips = LatentFolder(made, self.frames)
            clips.negative = self.negative
            return clips.check(cfg, trajectories)
        if self.only_text and cfg.stage != 1:
            raise UsageError(f"{self.paths[0]} holds a caption alone, which is enough for stage 1 and, after it, for stage 2: "
                             f"stage {cfg.stage} needs clips, see data.py encode")
        self.network = cfg
        self._read(self.paths[0])
        return self

    def batch(self, indices):
        clips = [self._read(self.paths[np.random.default_rng(int(i)).integers(len(self.paths))]) for i in indices]
        batch = {"embeddings": padded([clip["text"].float() for clip in clips])}
        if self.only_text:
            return batch
        if len({clip["latents"].shape[1:] for clip in clips}) > 1:
            raise UsageError(f"the clips beside {self.paths[0]} are of different shapes: encode them with one --size into a folder of their own")
        return {**batch, "latents": torch.stack([clip["latents"][:self.frames].float() for clip in clips])}

    def _read(self, path):
        clip = read_tensors(path)
        if "states" in clip:
            clip["latents"] = clip["states"][-1]
        needed = {"text"} if self.only_text else {"latents", "text"}
        if not needed <= clip.keys() or clip["text"].ndim != 2 or not self.only_text and clip["latents"].ndim != 4:
            raise UsageError(f"{path} holds no clip, which is latents (f, c, h, w) and text (l, d): remove it from the folder")
        if not self.only_text and len(clip["latents"]) < self.frames:
            raise UsageError(f"{path} has {len(clip['latents'])} latent frames, a clip needs {self.frames}: remove it, or lower --frames")
        if self.network:
            cfg, text = self.network, tuple(clip["text"].shape)
            shape = (self.frames, cfg.in_dim, cfg.patch, cfg.patch) if self.only_text else tuple(clip["latents"].shape)
            if shape[1] != cfg.in_dim or text[1] != cfg.text_dim or text[0] > cfg.text_len or shape[2] % cfg.patch or shape[3] % cfg.patch:
                raise UsageError(f"{path} has latents {shape} and text {text}, the network takes {cfg.in_dim} channels, sides that divide by "
                                 f"{cfg.patch}, text up to {cfg.text_len} x {cfg.text_dim}: choose the preset they were made for")
        return clip


def dataset(cfg):
    """The data that a Config asks for: the toy world, or the folder of videos or latents named by --data."""
    if cfg.data and clips_in(cfg.data):
        return LatentFolder(cfg.data, cfg.frames)
    return VideoFolder(cfg.data, cfg.size, cfg.frames, cfg.fps) if cfg.data else ToyWorld(cfg.size, cfg.frames)


def held_out(number):
    """The first `number` clips that are kept for scores. Of the toy world training never sees them; of a folder they are cut from the same
    videos, so that some are trained on."""
    return range(HELD_OUT, HELD_OUT + number)


# ---------------------------------------------------------------- text and latents at toy scale

class WordEncoder:
    """A fixed, training-free text encoder: every word has its own random vector, derived from its letters.

    Stands in for Wan's UMT5 encoder with the same output, (b, l, d) zero-padded embeddings. Words beyond `length` are cut;
    an empty caption is all zeros, which is also what classifier-free guidance calls "no text". What is cut is said once."""

    def __init__(self, length, dim):
        self.length, self.dim, self.said = length, dim, False

    def _word(self, word):
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))

    def encode(self, captions):
        out = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(out, captions):
            words = caption.lower().split()
            if len(words) > self.length and not self.said:
                self.said = True
                print(f"of \"{caption[:80]}\" only the first {self.length} of {len(words)} words are used: --text-len {len(words)} in all "
                      "stages takes them all", file=sys.stderr)
            for slot, word in zip(row, words):
                slot.copy_(self._word(word))
        return out


class PatchCodec:
    """Latents at toy scale: the leading principal components of square patches, in closed form, fitted in a second.

    encode (b, f, 3, H, W) in [-1, 1] -> (b, f, c, H/patch, W/patch), unit variance over all; decode is its inverse but for
    the dropped components. The interface of a video VAE. Components are divided by the SQUARE ROOT of their spread: undivided,
    the coarse ones outshine the noise and motion is hardly ever in doubt; made equal, fine detail takes half of the loss."""
    ratio = 1  # frames to a latent frame

    def __init__(self, patch, mean, basis, scale):
        self.patch, self.mean, self.basis, self.scale = patch, mean, basis, scale

    @classmethod
    def fit(cls, video, patch, channels):
        """The codec of these frames (b, f, 3, H, W). UsageError for more channels than a patch has values."""
        if channels > 3 * patch ** 2:
            raise UsageError(f"--in-dim {channels}: a patch of {patch} x {patch} pixels has only {3 * patch ** 2} components")
        x = rearrange(video, "b f c (h p) (w q) -> (b f h w) (c p q)", p=patch, q=patch).double()
        mean = x.mean(0)
        basis, power, _ = torch.linalg.svd((x - mean).T @ (x - mean) / len(x))
        power = power[:channels].clamp_min(1e-8)
        scale = power ** 0.25 * power.sqrt().mean().sqrt()  # latent variances power ** 0.5, of mean 1
        return cls(patch, mean.float(), basis[:, :channels].float().contiguous(), scale.float())

    def encode(self, video):
        if video.shape[-2] % self.patch or video.shape[-1] % self.patch:
            raise UsageError(f"frames of {video.shape[-2]}x{video.shape[-1]} do not divide into patches of {self.patch}")
        x = rearrange(video, "b f c (h p) (w q) -> b f h w (c p q)", p=self.patch, q=self.patch)
        mean, basis, scale = (y.to(video.device) for y in (self.mean, self.basis, self.scale))
        return rearrange((x - mean) @ basis / scale, "b f h w c -> b f c h w")

    def decode(self, latents):
        mean, basis, scale = (y.to(latents.device) for y in (self.mean, self.basis, self.scale))
        x = (rearrange(latents.float(), "b f c h w -> b f h w c") * scale) @ basis.T + mean
        return rearrange(x, "b f h w (c p q) -> b f c (h p) (w q)", p=self.patch, q=self.patch)

    def decoder(self):
        """decode() for a stream, part by part."""
        return self.decode

    def save(self, path):
        save_tensors(path, {"mean": self.mean, "basis": self.basis, "scale": self.scale, "patch": torch.tensor(self.patch)})

    @classmethod
    def load(cls, path):
        tensors = read_tensors(path)
        if tensors.keys() != {"patch", "mean", "basis", "scale"}:
            raise UsageError(f"{path} holds no codec: train the stage again, or copy the file from another stage of the run")
        return cls(int(tensors["patch"]), tensors["mean"], tensors["basis"], tensors["scale"])


# ---------------------------------------------------------------- media files

def save_tensors(path, tensors):
    """A dict of tensors as one safetensors file, whole or not at all."""
    with written_whole(path) as temporary:
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files that nobody else may read
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
        temporary.chmod(mode)


def read_text(path):
    """A text file, with or without the mark that Excel puts before it; UsageError where it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({_first_line(error)}): save it as UTF-8, or make it again") from None


def read_json(path):
    """A JSON file; UsageError where it is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged ({error}): remove it, and give the command that made it again") from None


def read_tensors(path):
    """A safetensors file as a dict; UsageError where it is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: run the stage that makes it, or check the path") from None
    except Exception as error:  # safetensors raises its own kinds for truncated and foreign files
        raise UsageError(f"{path} is not a readable safetensors file ({error}): make or download it again") from None


def image_files(folder):
    """The images of a folder in the order of their names, numbers in them by value: 2.png before 10.png."""
    order = lambda p: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", p.name)]
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS), key=order)


def fit_frame(frame, size):
    """(H, W, 3 or more) uint8 -> (3, h, w) uint8, size = (h, w) or the side of a square: resized (anti-aliased) until it
    covers that, centre kept; grey becomes RGB."""
    height, width = (size, size) if isinstance(size, int) else size
    frame = np.atleast_3d(frame)
    frame = frame[..., :3] if frame.shape[2] >= 3 else frame[..., :1].repeat(3, 2)
    x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    scale = max(height / x.shape[2], width / x.shape[3])
    shape = [max(side, round(old * scale)) for side, old in zip((height, width), x.shape[2:])]
    x = F.interpolate(x, shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return x[0, :, top:top + height, left:left + width].round().clamp(0, 255).byte()


def picture(path):
    """An image file (H, W, 3) uint8, turned as its camera says; grey (of 8 or 16 bits), palettes, CMYK and transparency become RGB."""
    first = dict(plugin="pillow", index=0)  # of an animation
    if improps(path, **first).dtype == np.uint16:  # which Pillow would cut off at 255
        return (imread(path, rotate=True, **first) >> 8).astype(np.uint8)[..., None].repeat(3, 2)
    return imread(path, rotate=True, mode="RGB", **first)


def read_image(path, size):
    """An image file as a clip of one frame: (1, 1, 3, h, w) in [-1, 1], size = (h, w) or the side of a square."""
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a file: --image takes an image file")
    try:
        frame = picture(path)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an image ({_first_line(error)}): convert it to png or jpg") from None
    return fit_frame(frame, size)[None, None].float() / 127.5 - 1


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def frames_of(path, size, fps=0.0):
    """The frames (3, h, w) uint8 of a video file or a folder of images, one by one, thinned out to `fps` where that is not 0.

    Raises UsageError for what cannot be read or is empty."""
    path, taken = Path(path), 0
    try:
        with contextlib.ExitStack() as stack:
            if path.is_dir():
                frames, rate = map(picture, image_files(path)), 0
            else:
                frames = stack.enter_context(iio.get_reader(path))
                rate = frames.get_meta_data().get("fps") or 1000 / max(1, frames.get_meta_data().get("duration") or 100)
            for i, frame in enumerate(frames):
                if not 0 < fps < rate or i == int(taken * rate / fps):
                    yield fit_frame(frame, size)
                    taken += 1
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a video ({_first_line(error)}): remove it, or convert it to mp4") from None
    if not taken:
        raise UsageError(f"{path} has no frames: remove it, or convert it to mp4")


def read_video(path, size, fps=0.0):
    """All frames of a video file or a folder of images: (f, 3, h, w) uint8. Gathered in blocks: a small tensor left between the large ones
    that every frame goes through keeps their memory from being used again (100,000 frames of 256 x 256 pixels, read at 32 x 32, took 22 GB for 0.3)."""
    frames, blocks = frames_of(path, size, fps), []
    while block := list(itertools.islice(frames, 64)):
        blocks.append(torch.stack(block))
    return torch.cat(blocks)


class VideoWriter:
    """Frames to an mp4 or gif by ffmpeg, written as they come, so that memory stays constant; the name appears once all is there.

    Small frames are enlarged by `zoom` (whole pixels) to be visible. Every frame of a gif has a palette of its own."""
    OPTIONS = {".mp4": dict(codec="libx264", quality=8, output_params=["-preset", "veryfast"]),  # it has to keep up with the stream
               ".gif": dict(codec="gif", quality=None, pix_fmt_out="pal8", output_params=[
                   "-filter_complex", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none", "-loop", "0"])}

    def __init__(self, path, fps=8, zoom=1):
        self.path, self.fps, self.zoom, self.writer, self.frames = Path(path), fps, zoom, None, 0
        if self.path.suffix.lower() not in self.OPTIONS:
            raise UsageError(f"{path}: write to a name that ends in .mp4 or .gif")

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.temporary = self.stack.enter_context(written_whole(self.path))
        return self

    def write(self, frames):
        """frames (f, 3, H, W) in [-1, 1]"""
        for frame in to_uint8(frames):
            frame = np.ascontiguousarray(enlarged(frame, self.zoom))
            if self.writer is None:
                self.writer = write_frames(f"file:{self.temporary}", frame.shape[1::-1], fps=self.fps, macro_block_size=1,
                                           ffmpeg_log_level="error", **self.OPTIONS[self.path.suffix.lower()])
                self.stack.push(self._finish)
                self.writer.send(None)
            self.writer.send(frame)
            self.frames += 1

    def _finish(self, failed, *_):
        self.writer.close()  # waits for ffmpeg, whose exit status imageio_ffmpeg does not look at
        if not failed:
            try:
                there = count_frames_and_secs(str(self.temporary))[0]
            except RuntimeError:
                there = 0
            if there != self.frames:
                raise UsageError(f"cannot write {self.path}: ffmpeg left {there} of {self.frames} frames; free some space or choose another place")

    def __exit__(self, *failure):
        return self.stack.__exit__(*failure)


def enlarged(picture, zoom):
    """(H, W, 3) with every pixel a square of `zoom` x `zoom`."""
    return picture.repeat(zoom, 0).repeat(zoom, 1)


def to_uint8(frames):
    """(..., 3, H, W) in [-1, 1] -> numpy (..., H, W, 3)"""
    return ((frames.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).numpy()


def write_sheet(path, video, zoom=2):
    """Contact sheet, a row per video of `video` (b, f, 3, H, W), a column per frame."""
    sheet = rearrange(to_uint8(video), "b f h w c -> (b h) (f w) c")
    with written_whole(path) as temporary:
        iio.imwrite(temporary, enlarged(sheet, zoom))


def write_gif_grid(path, video, columns=4, zoom=3, fps=8):
    """One animation of all videos of `video` (b, f, 3, H, W), `columns` side by side."""
    video = video[:len(video) // columns * columns] if len(video) >= columns else video
    columns = min(columns, len(video))
    with VideoWriter(path, fps, zoom) as writer:
        writer.write(rearrange(video, "(r k) f c h w -> f c (r h) (k w)", k=columns))


# ---------------------------------------------------------------- real videos and texts to latents

def sides(size):
    """"480x832" -> (480, 832), height and width in pixels."""
    try:
        height, width = (int(n) for n in size.split("x"))
    except ValueError:
        height = width = 1
    if height % 16 or width % 16 or min(height, width) < 16:
        raise UsageError(f"--size {size} is not height x width in multiples of 16: use --size 480x832")
    return height, width


@contextlib.contextmanager
def published(path):
    """One sentence for what can go wrong while a published model is loaded from a folder."""
    if not Path(path).is_dir():
        raise UsageError(f"{path} is not a folder: name the one that the model was downloaded to")
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r requirements-wan.txt") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"the model in {path} cannot be loaded ({_first_line(error)}): download it again") from None


class WanCodec:
    """Wan's video VAE (diffusers' AutoencoderKLWan) behind the codec interface: 1 + 4 k frames <-> 1 + k latent frames.

    path: a folder with the VAE's config.json and weights. Needs requirements-wan.txt."""
    ratio = 4  # frames to a latent frame, after the first

    def __init__(self, path, device="cpu"):
        with published(path):
            from diffusers import AutoencoderKLWan
            self.vae = AutoencoderKLWan.from_pretrained(path).eval().requires_grad_(False).to(device)
        column = lambda values: torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        self.mean, self.std = column(self.vae.config.latents_mean), column(self.vae.config.latents_std)

    def encode(self, video):
        """(b, 1 + 4 k, 3, H, W) in [-1, 1] -> (b, 1 + k, c, H / 8, W / 8), normalised"""
        z = self.vae.encode(video.transpose(1, 2).to(self.mean.device)).latent_dist.mode()
        return ((z - self.mean) / self.std).transpose(1, 2)

    def decode(self, latents):
        """The inverse: (b, 1 + k, c, h, w) -> (b, 1 + 4 k, 3, H, W)"""
        return self.decoder()(latents)

    def decoder(self):
        """decode() for a stream, part by part: a callable that goes on where its last call ended, at constant memory."""
        vae, first = self.vae, [True]
        vae.clear_cache()
        memory = list(vae._feat_map)  # one of its own, so that two streams do not meet

        @torch.autocast(self.mean.device.type, enabled=False)  # the VAE is published in float32
        def decode(latents):
            z = vae.post_quant_conv(latents.float().transpose(1, 2).to(self.mean.device) * self.std + self.mean)
            frames = []
            for frame in z.split(1, 2):  # as AutoencoderKLWan does inside, but for the end of the stream
                frames.append(vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=bool(first) and first.pop()))
            return torch.cat(frames, 2).clamp(-1, 1).transpose(1, 2)

        return decode


class CaptionEncoder:
    """Wan's text encoder (transformers' UMT5): captions to embeddings (l, d), one for each token, the padding left out."""

    def __init__(self, path, length=512, device="cpu"):
        with published(path):
            from transformers import AutoTokenizer, UMT5EncoderModel
            self.tokens, self.length, self.device = AutoTokenizer.from_pretrained(path), length, device
            self.model = UMT5EncoderModel.from_pretrained(path).eval().requires_grad_(False).to(device)

    def encode(self, caption):
        """str -> (l, d), l at most `length`"""
        given = self.tokens(caption, max_length=self.length, truncation=True, return_tensors="pt").to(self.device)
        if not given["input_ids"].numel():  # no caption, and a tokenizer that adds no end mark
            return torch.zeros(1, self.model.config.d_model)
        return self.model(**{k: given[k] for k in ("input_ids", "attention_mask")}).last_hidden_state[0].float()


def captions_in(folder):
    """{file name: caption} of a folder: captions.csv (file,caption), captions.jsonl ({"file": ..., "caption": ...}) and
    .txt files beside the videos, the later ones winning."""
    folder, found = Path(folder), {}
    for path in (folder / "captions.csv", folder / "captions.jsonl"):
        lines = read_text(path).splitlines() if path.is_file() else []
        try:
            rows = csv.DictReader(lines) if path.suffix == ".csv" else [json.loads(line) for line in lines if line.strip()]
            found |= {row["file"]: row["caption"].strip() for row in rows}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError(f"{path} needs a file and a caption in every row, as columns of a csv or keys of json lines") from None
    return found | {p.name: read_text(p.with_suffix(".txt")).strip() for p in folder.iterdir() if p.with_suffix(".txt").is_file()}


def cut(frames, length):
    """A stream of frames as clips (length, 3, h, w), one after the other; what is left at the end is dropped."""
    while len(part := list(itertools.islice(frames, length))) == length:
        yield torch.stack(part)


def to_encode(args):
    """(videos, captions) that `python data.py encode` was given, one of them empty. UsageError before anything is loaded."""
    if args.frames % 4 != 1 or args.frames < 1:
        raise UsageError(f"--frames {args.frames} is not 4 k + 1: use --frames {max(5, args.frames // 4 * 4 + 1)}")
    if bool(args.prompts) == bool(args.videos) or args.videos and not args.vae:
        raise UsageError("name either --videos with --vae, or --prompts")
    check_device(args.device)
    if args.videos:
        sources = sorted(p for p in Path(args.videos).glob("*") if p.suffix.lower() in VIDEO_ENDINGS)
        if not sources:
            raise UsageError(f"no videos in {args.videos}: put {', '.join(VIDEO_ENDINGS)} files there")
        return sources, []
    lines = [line for line in read_text(args.prompts).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{args.prompts} has no captions: write one a line")
    if len(there := clips_in(args.out)) > len(lines):
        raise UsageError(f"{args.out} holds {len(there)} files, {args.prompts} has {len(lines)} captions: choose another --out, "
                         "or the others would be trained on too")
    return [], lines


def encode(args):
    """`python data.py encode`: a .safetensors per clip. Finished videos are skipped, unreadable and short ones listed at the end."""
    size, out, bad, (sources, lines) = sides(args.size), Path(args.out), [], to_encode(args)
    words = CaptionEncoder(args.text_encoder, device=args.device)
    with torch.no_grad():
        if args.negative is not None or not (out / "negative" / "text.safetensors").is_file():
            save_tensors(out / "negative" / "text.safetensors", {"text": words.encode(args.negative or "")})
        if lines:
            return encode_prompts(lines, words, out)
    codec = WanCodec(args.vae, args.device)
    captions, shape = captions_in(args.videos), f"{args.size} {args.frames} frames {args.fps:g} fps"
    for path in tqdm(sources, unit="video"):
        done = out / "done" / path.name
        if done.is_file():
            if done.read_text() != shape:
                raise UsageError(f"{out} was made with {done.read_text()}, now it is {shape}: choose another --out")
            continue
        try:
            encode_video(path, captions.get(path.name, ""), codec, words, out, size, args)
        except UsageError as error:
            if "cannot write" in str(error):
                raise
            bad.append(str(error))
            for part in [p for p in clips_in(out) if p.name.startswith(f"{path.name}-")]:
                part.unlink()  # of a video that breaks off in the middle
            continue
        with written_whole(done) as temporary:
            temporary.write_text(shape)
    print(f"{len(clips_in(out))} clips in {out}" + "".join(f"\nskipped: {line}" for line in bad))


@torch.no_grad()
def encode_video(path, caption, codec, words, out, size, args):
    """The clips of one video, a file each. UsageError where it is shorter than one."""
    text, n = words.encode(caption), -1
    for n, clip in enumerate(cut(frames_of(path, size, args.fps), args.frames)):
        latents = codec.encode(clip[None].float() / 127.5 - 1)[0]
        save_tensors(out / f"{path.name}-{n:04d}.safetensors", {"latents": latents, "text": text})
    if n < 0:
        raise UsageError(f"{path} is shorter than a clip of {args.frames} frames")


def encode_prompts(lines, words, out):
    """Captions to a .safetensors each: all that stage 1 needs, and with it stage 2."""
    for n, line in enumerate(tqdm(lines, unit="caption")):
        save_tensors(out / f"{n:06d}.safetensors", {"text": words.encode(line)})
    print(f"{len(lines)} captions in {out}")


def encode_flags(argv):
    """The command line of `python data.py encode`."""
    parser = Flags(encode.__doc__, prog="data.py encode")
    parser.add_argument("--videos", help=f"folder of {', '.join(VIDEO_ENDINGS)}; captions as .txt, captions.csv or .jsonl")
    parser.add_argument("--out", required=True, help="folder for the latents")
    parser.add_argument("--prompts", help="instead of videos: a text file with a caption a line, enough for stages 1 and 2")
    parser.add_argument("--vae", help="folder of Wan's VAE, as diffusers saves it")
    parser.add_argument("--text-encoder", required=True, help="folder of Wan's UMT5 encoder and tokenizer, as transformers saves them")
    parser.add_argument("--size", default="480x832", help="height x width in pixels")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip, 4 k + 1")
    parser.add_argument("--fps", type=float, default=16, help="thin frames out to this rate; 0: every frame")
    parser.add_argument("--negative", help="what guidance keeps away from; default: the empty caption")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, mps or cpu")
    return parser.parse_args(argv)


def main(argv=None):
    """`python data.py --preview PNG`: what training will see. `python data.py encode`: see encode()."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        return encode(encode_flags(argv[1:]))
    parser = Flags(__doc__)
    parser.add_argument("--preview", metavar="PNG", required=True, help="contact sheet to write")
    parser.add_argument("--data", default="", help="folder of videos; empty: the toy world")
    parser.add_argument("--size", type=int, default=32, help="side of a frame in pixels")
    parser.add_argument("--frames", type=int, default=10, help="frames of a clip")
    parser.add_argument("--fps", type=float, default=0.0, help="thin frames out to this rate; 0: every frame")
    parser.add_argument("--clips", type=int, default=8, help="rows of the sheet")
    args = parser.parse_args(argv)
    if min(args.clips, args.frames, args.size) < 1 or not args.fps >= 0 or Path(args.preview).suffix.lower() not in IMAGE_ENDINGS:
        raise UsageError(f"--preview takes a name that ends in {', '.join(IMAGE_ENDINGS)}, --clips, --frames and --size at least 1, --fps at least 0")
    data = dataset(args)
    if data.latent:
        raise UsageError(f"{args.data} holds latents, which cannot be shown: --preview takes a folder of videos")
    batch = data.batch(range(args.clips))
    write_sheet(args.preview, batch["video"])
    for caption in batch["text"]:
        print(caption or "(no caption)")
    print(f"wrote {args.preview}: a row per clip, a column per frame")


if __name__ == "__main__":
    with explain():
        main()
