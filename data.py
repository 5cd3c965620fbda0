"""Videos in, videos out: the toy world, folders of real clips, the toy codec and text encoder, reading and writing media.

    python data.py --preview preview.png                      contact sheet of what training will see (toy world)
    python data.py --preview preview.png --data DIR_OF_MP4    the same for your own clips
    python data.py encode --videos DIR_OF_MP4 --out DIR_OF_LATENTS --vae DIR_OF_VAE --text-encoder DIR_OF_UMT5
                                                              videos and captions to latents, for training at Wan scale

A dataset is anything with batch(indices) -> {"video": (b, f, 3, H, W) in [-1, 1], "text": [str]} and `latent` False, or, with `latent`
True, {"latents": (b, f, c, h, w), "embeddings": (b, l, d)}. Clip number i is always the same clip, so that a run is resumed by
knowing its step, and any number of devices reads the same global batch.
"""
import argparse
import contextlib
import csv
import io
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
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from model import UsageError, first_line, require

VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".gif", ".mkv", ".avi")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
HELD_OUT = 1_000_000_000  # clip numbers from here on are not trained on
HELD_OUT_SETS = {"search": 0, "report": 500_000}  # where the two sets begin


# ---------------------------------------------------------------- one sentence for what a user can mend

@contextlib.contextmanager
def explain():
    """Turn a UsageError, and what disks, devices and people do to a run, into one sentence on stderr and exit status 2 (Ctrl-C: 130)."""
    said, status = None, 2
    try:
        yield
    except UsageError as error:
        said = error
    except OSError as error:
        said = f"{error.filename or 'the file system'}: {error.strerror or error}: check the path, its permissions and the free space"
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no exception of its own
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        said = f"out of memory ({first_line(error)}): train.py takes a lower --micro-batch, --recompute or more devices, the others smaller clips"
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    if said:
        print(f"error: {said}", file=sys.stderr)
        sys.exit(status)


@contextlib.contextmanager
def asked_to_stop(*signals):
    """A list that grows when one of the signals comes, so that a loop can end between two steps. The second time a signal does what it always did."""
    came, before = [], {number: signal.getsignal(number) for number in signals}

    def note(number, _):
        came.append(number)
        signal.signal(number, before[number])

    try:
        for number in signals:
            signal.signal(number, note)
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_device(name):
    """UsageError where there is no such device."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    require(name in here, f"--device {name}: say cuda, mps or cpu; which GPU cuda is, the variable CUDA_VISIBLE_DEVICES says")
    require(here[name], f"--device {name} is not here: leave it out to take what there is")


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
        why = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"cannot write {path}: {why}; free some space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- randomness that does not depend on the layout

class Draws:
    """Random numbers for a batch, one independent stream per clip, a function of (*key, clip) alone.

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

    def stratified_uniform(self):
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
    """One shape that glides over a still, softly rippled background, bounces off the walls, and turns when it pleases.

    Infinite and seeded: clip i is a pure function of i. The caption names colour, kind and first direction. Neither the speed
    nor the turns are in the image or the caption, so that one image has many futures: frames 0 to 3 go straight; from frame 4
    on the shape turns by 90 degrees, to either side alike, with probability `turns` a frame. A turn at frame n turns the step
    from n - 1 to n and all that follow. turns=0: it never turns.

    A `state` holds all there is to know, a dict of tensors: clip (b,) its number; kind, colour, direction (b,); start,
    velocity (b, 2) in pixels and pixels a frame, of the first step; ground (b, 2, 3) two colours, ripple (b, 3) angle, phase,
    wavelength. Raises UsageError for frames too small for the shape."""
    latent = False
    straight = 4  # frames before the first turn can come: they show the direction

    def __init__(self, size=32, frames=16, turns=0.0):
        require(size >= 24, f"the toy world needs frames of at least 24 pixels, not {size}: use --size 32")
        self.size, self.frames, self.turns = size, frames, turns
        self.radius, self.speeds = size * 7.5 / 32, (size * 1.3 / 32, size * 1.9 / 32)
        self.span = size - 2 * self.radius  # how far the centre can go along one axis
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
            rows.append((int(i), kind, colour, direction, start, velocity, np.stack([base + swing, base - swing]) * 2 - 1, ripple))
        names = ("clip", "kind", "colour", "direction", "start", "velocity", "ground", "ripple")
        state = {name: torch.as_tensor(np.array([row[j] for row in rows])) for j, name in enumerate(names)}
        return {name: x if x.dtype == torch.int64 else x.float() for name, x in state.items()}

    def walk(self, start, velocity, u):
        """Where the shape goes from `start` (..., 2): (..., f, 2) as x, y in pixels, with elastic walls.

        velocity (..., 2) of the first step; u (..., f) uniform in [0, 1): below turns / 2 the shape turns one way at that frame, below
        `turns` the other. The path is walked as if there were no walls, and folded back between them."""
        turn = (u < self.turns).long() - 2 * (u < self.turns / 2)                   # 0, 1 or -1 quarters
        turn[..., :self.straight] = 0
        angle = turn.cumsum(-1) * (np.pi / 2)
        (vx, vy), cos, sin = velocity[..., None, :].unbind(-1), angle.cos(), angle.sin()
        step = torch.stack([vx * cos - vy * sin, vx * sin + vy * cos], -1)          # (..., f, 2)
        step[..., 0, :] = 0
        free = (start[..., None, :] - self.radius + step.cumsum(-2)) % (2 * self.span)
        return self.radius + self.span - (free - self.span).abs()

    def centres(self, state, frames=None):
        """Where the shape is: (b, f, 2) as x, y in pixels. The first frames of a longer path are those of a shorter one."""
        frames = frames or self.frames
        u = np.stack([np.random.default_rng((int(i), 1)).random(frames) for i in state["clip"]])
        return self.walk(state["start"], state["velocity"], torch.from_numpy(u))

    def futures(self, indices, number, frames=None):
        """`number` continuations of each clip's image and caption, drawn from the world's own law: (clips, number, f, 2), the
        shape's positions in pixels. Turns are drawn anew, and the speed from its distribution given where the shape stands
        and goes (a fast shape cannot have started close before a wall)."""
        state, draws, frames = self.state(indices), [], frames or self.frames
        speeds = torch.linspace(*self.speeds, 1001)
        for clip, start, direction in zip(state["clip"], state["start"], self.directions[state["direction"]]):
            g = np.random.default_rng((int(clip), 2))
            reach = 3 * speeds[:, None] * direction                                 # the first three steps
            fits = ((start + reach - self.size / 2).abs() <= self.span / 2 + 1e-4).all(1)
            weight = (fits / (self.span - reach.abs()).prod(1)).double().numpy()    # start was uniform over what fits
            speed = torch.from_numpy(g.choice(speeds.numpy(), number, p=weight / weight.sum()))
            u = torch.from_numpy(g.random((number, frames)))
            draws.append(self.walk(start.expand(number, 2), speed[:, None] * direction, u))
        return torch.stack(draws)

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

def videos_in(folder):
    """The videos of a folder: files (mp4, webm, mov, gif, ...), and folders of numbered images. UsageError where there are none."""
    folder, endings = Path(folder), ", ".join(VIDEO_ENDINGS)
    require(folder.is_dir(), f"{folder} is not a folder of videos: name one with {endings} files")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_ENDINGS or p.is_dir() and any(image_files(p)))
    require(found, f"no videos in {folder}: put {endings} files or folders of images there")
    return found


def captions_in(folder, videos):
    """{name of a video: caption} of a folder's videos: captions.csv (file,caption), captions.jsonl ({"file": ..., "caption": ...}) and
    .txt files beside the videos, the later ones winning."""
    folder, found = Path(folder), {}
    for path in (folder / "captions.csv", folder / "captions.jsonl"):
        lines = io.StringIO(read_text(path), newline="") if path.is_file() else ()  # a quoted caption may have several
        try:
            rows = csv.DictReader(lines) if path.suffix == ".csv" else [json.loads(line) for line in lines if line.strip()]
            found |= {row["file"]: row["caption"].strip() for row in rows}
        except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
            raise UsageError(f"{path} needs a file and a caption in every row, as columns of a csv or keys of json lines") from None
    beside = lambda p: p.with_name(f"{p.name}.txt") if p.is_dir() else p.with_suffix(".txt")
    return found | {p.name: read_text(beside(p)).strip() for p in videos if beside(p).is_file()}


class VideoFolder:
    """Every clip of `frames` frames that can be cut from the videos of a folder, at `size` x `size` pixels.

    Frames are thinned out to `fps` (0: as they are), the short side is resized, the centre is kept. All frames are held in
    memory, which is right for the toy preset. Raises UsageError, naming the file and the remedy."""
    latent = False

    def __init__(self, folder, size, frames, fps=0.0):
        sources = videos_in(folder)
        captions = captions_in(folder, sources)
        self.frames, self.clips, self.texts = frames, [], [captions.get(path.name, "") for path in sources]
        for path in sources:
            self.clips.append(read_video(path, size, fps))
            require(len(self.clips[-1]) >= frames, f"{path} has {len(self.clips[-1])} frames, a clip needs {frames}: remove it, or lower --frames"
                    + (", or raise --fps" if fps else ""))
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
        require(not self.only_text or cfg.stage == 1, f"{self.paths[0]} holds a caption alone, which is enough for stage 1 and, after it, "
                f"for stage 2: stage {cfg.stage} needs clips, see data.py encode")
        self.network = cfg
        self._read(self.paths[0])
        return self

    def batch(self, indices):
        clips = [self._read(self.paths[np.random.default_rng(int(i)).integers(len(self.paths))]) for i in indices]
        batch = {"embeddings": pad_sequence([clip["text"].float() for clip in clips], batch_first=True)}
        if self.only_text:
            return batch
        require(len({clip["latents"].shape[1:] for clip in clips}) == 1,
                f"the clips beside {self.paths[0]} are of different shapes: encode them with one --size into a folder of their own")
        return {**batch, "latents": torch.stack([clip["latents"][:self.frames].float() for clip in clips])}

    def _read(self, path):
        clip, cfg = read_tensors(path), self.network
        if "states" in clip:
            clip["latents"] = clip["states"][-1]
        text, latents = clip.get("text"), None if self.only_text else clip.get("latents")
        require(text is not None and text.ndim == 2 and (self.only_text or latents is not None and latents.ndim == 4),
                f"{path} holds no clip, which is latents (f, c, h, w) and text (l, d): remove it from the folder")
        require(self.only_text or len(latents) >= self.frames,
                f"{path} has {0 if latents is None else len(latents)} latent frames, a clip needs {self.frames}: remove it, or lower --frames")
        _, c, h, w = (0, cfg.in_dim, 0, 0) if latents is None else latents.shape
        require(c == cfg.in_dim and text.shape[1] == cfg.text_dim and len(text) <= cfg.text_len and h % cfg.patch == w % cfg.patch == 0,
                f"{path} has {c} channels, sides of {h} x {w} and text {tuple(text.shape)}, the network takes {cfg.in_dim} channels, sides that "
                f"divide by {cfg.patch}, text up to {cfg.text_len} x {cfg.text_dim}: choose the preset they were made for")
        return clip


def dataset(cfg):
    """The data that a Config asks for: the toy world, or the folder of videos or latents named by --data."""
    if cfg.data and clips_in(cfg.data):
        return LatentFolder(cfg.data, cfg.frames)
    return VideoFolder(cfg.data, cfg.size, cfg.frames, cfg.fps) if cfg.data else ToyWorld(cfg.size, cfg.frames, cfg.turns)


def held_out(number, which="search"):
    """The first `number` clips of one of the two sets that are kept for scores: "search" to choose settings by, "report" for
    tables, which no choice has seen. Of the toy world training never sees either; of a folder they are cut from the same
    videos, so that some are trained on."""
    start = HELD_OUT + HELD_OUT_SETS[which]
    return range(start, start + number)


# ---------------------------------------------------------------- text and latents at toy scale

class WordEncoder:
    """A fixed, training-free text encoder: every word has its own random vector, derived from its letters.

    Stands in for Wan's UMT5 encoder with the same output, (b, l, d) zero-padded embeddings. Words beyond `length` are cut;
    an empty caption is all zeros, which is also what classifier-free guidance calls "no text". What is cut is said once."""

    def __init__(self, length, dim):
        self.length, self.dim, self.said = length, dim, False

    def encode(self, captions):
        out = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(out, captions):
            words = caption.lower().split()
            if len(words) > self.length and not self.said:
                self.said = True
                print(f"of \"{caption[:80]}\" only the first {self.length} of {len(words)} words are used: --text-len {len(words)} in all "
                      "stages takes them all", file=sys.stderr)
            for slot, word in zip(row, words):
                slot.copy_(torch.randn(self.dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()))))
        return out


class PatchCodec:
    """Latents at toy scale: the leading principal components of square patches, fitted in closed form in a second.

    encode (b, f, 3, H, W) in [-1, 1] -> (b, f, c, H/patch, W/patch), unit variance over all. Components are divided by the
    SQUARE ROOT of their spread: undivided, the coarse ones outshine the noise and motion is hardly ever in doubt; made equal,
    fine detail takes half of the loss.

    decode draws every patch from the 3 x 3 latents around it, by ridge regression: what one patch has dropped, its neighbours
    tell in part, and patches meet without seams. The ridge is the variance of the errors that latents are expected to have,
    for a generated latent is never exact. The interface is that of a video VAE."""
    ratio = 1     # frames to a latent frame
    ridge = 0.01  # variance of a latent's error

    def __init__(self, patch, mean, basis, scale, drawing):
        self.patch, self.mean, self.basis, self.scale, self.drawing = patch, mean, basis, scale, drawing

    @classmethod
    def fit(cls, video, patch, channels):
        """The codec of these frames (b, f, 3, H, W). UsageError for more channels than a patch has values."""
        require(channels <= 3 * patch ** 2, f"--in-dim {channels}: a patch of {patch} x {patch} pixels has only {3 * patch ** 2} components")
        x = rearrange(video, "b f c (h p) (w q) -> (b f h w) (c p q)", p=patch, q=patch).double()
        mean = x.mean(0)
        basis, power, _ = torch.linalg.svd((x - mean).T @ (x - mean) / len(x))
        power = power[:channels].clamp_min(1e-8)
        scale = power ** 0.25 * power.sqrt().mean().sqrt()  # latent variances power ** 0.5, of mean 1
        codec = cls(patch, mean.float(), basis[:, :channels].float().contiguous(), scale.float(), None)
        codec.drawing = codec.fit_drawing(video)
        return codec

    def fit_drawing(self, video):
        """The ridge regression from 3 x 3 latents to the patch in their middle, as a kernel (3 * patch^2, c, 3, 3)."""
        number = self.basis.shape[1] * 9
        gram, target = torch.zeros(number, number, dtype=torch.float64), torch.zeros(number, len(self.basis), dtype=torch.float64)
        for clips in video.split(32):
            patches = rearrange(clips, "b f c (h p) (w q) -> (b f h w) (c p q)", p=self.patch, q=self.patch)
            around = F.unfold(self.surround(self.encode(clips)), 3)                         # (b f, c 9, h w)
            around, patches = rearrange(around, "n k l -> (n l) k").double(), (patches - self.mean).double()
            gram += around.T @ around
            target += around.T @ patches
        rows = video[:, :, 0].numel() // self.patch ** 2
        kernel = torch.linalg.solve(gram + rows * self.ridge * torch.eye(number, dtype=torch.float64), target)
        return kernel.T.float().unflatten(1, (-1, 3, 3)).contiguous()

    @staticmethod
    def surround(latents):
        """Frames one by one, with their outermost latents repeated around them: (b f, c, h + 2, w + 2)."""
        return F.pad(latents.float().flatten(0, 1), (1, 1, 1, 1), "replicate")

    def encode(self, video):
        height, width = video.shape[-2:]
        require(height % self.patch == width % self.patch == 0, f"frames of {height}x{width} do not divide into patches of {self.patch}")
        x = rearrange(video, "b f c (h p) (w q) -> b f h w (c p q)", p=self.patch, q=self.patch)
        mean, basis, scale = (y.to(video.device) for y in (self.mean, self.basis, self.scale))
        return rearrange((x - mean) @ basis / scale, "b f h w c -> b f c h w")

    def decode(self, latents):
        mean, drawing = self.mean.to(latents.device), self.drawing.to(latents.device)
        patches = F.conv2d(self.surround(latents), drawing, mean)
        return rearrange(patches, "(b f) (c p q) h w -> b f c (h p) (w q)", b=len(latents), p=self.patch, q=self.patch)

    def decoder(self):
        """decode() for a stream, part by part."""
        return self.decode

    def save(self, path):
        save_tensors(path, {"mean": self.mean, "basis": self.basis, "scale": self.scale, "drawing": self.drawing, "patch": torch.tensor(self.patch)})

    @classmethod
    def load(cls, path):
        """What save() has written; None where there is no file, as in stages that were trained on latents."""
        if not Path(path).is_file():
            return None
        tensors = read_tensors(path)
        require(tensors.keys() == {"patch", "mean", "basis", "scale", "drawing"},
                f"{path} holds no codec of this version: train the stage again, or copy the file from another stage of the run")
        return cls(int(tensors["patch"]), *(tensors[name] for name in ("mean", "basis", "scale", "drawing")))


# ---------------------------------------------------------------- media files

def save_tensors(path, tensors):
    """A dict of tensors as one safetensors file, whole or not at all."""
    with written_whole(path) as temporary:
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files that nobody else may read
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
        temporary.chmod(mode)


def read_text(path):
    """A text file, with or without the mark that Excel puts before it; UsageError where it is missing or not UTF-8."""
    require(Path(path).exists(), f"{path} does not exist: check the path")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({first_line(error)}): save it as UTF-8, or make it again") from None


def read_json(path):
    """A JSON file; UsageError where it is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged ({error}): remove it, and give the command that made it again") from None


def write_json(path, value):
    """A JSON file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_tensors(path):
    """A safetensors file as a dict; UsageError where it is missing or broken."""
    require(Path(path).exists(), f"{path} does not exist: run the stage that makes it, or check the path")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own kinds for truncated and foreign files
        raise UsageError(f"{path} is not a readable safetensors file ({error}): remove it, and give the command that made it again") from None


def image_files(folder):
    """The images of a folder in the order of their names, numbers in them by value: 2.png before 10.png."""
    order = lambda p: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", p.name)]
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS), key=order)


def fit_frame(frame, size):
    """(H, W, 3 or 4) or grey (H, W) uint8 -> (3, h, w) uint8, size = (h, w) or the side of a square: resized (anti-aliased) until it
    covers that, centre kept."""
    height, width = (size, size) if isinstance(size, int) else size
    fitted = ImageOps.fit(Image.fromarray(frame).convert("RGB"), (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def picture(path):
    """An image file (H, W, 3) uint8, turned as its camera says; grey (of 8 or 16 bits), palettes, CMYK and transparency become RGB."""
    first = dict(plugin="pillow", index=0)  # of an animation
    if improps(path, **first).dtype == np.uint16:  # which Pillow would cut off at 255
        return (imread(path, rotate=True, **first) >> 8).astype(np.uint8)[..., None].repeat(3, 2)
    return imread(path, rotate=True, mode="RGB", **first)


def read_image(path, size):
    """An image file as a clip of one frame: (1, 1, 3, h, w) in [-1, 1], size = (h, w) or the side of a square."""
    require(Path(path).is_file(), f"{path} is not a file: --image takes an image file")
    try:
        frame = picture(path)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an image ({first_line(error)}): convert it to png or jpg") from None
    return fit_frame(frame, size)[None, None].float() / 127.5 - 1


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
            thin = 0 < fps < rate
            for i, frame in enumerate(frames):
                if not thin or i == int(taken * rate / fps):
                    yield fit_frame(frame, size)
                    taken += 1
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a video ({first_line(error)}): remove it, or convert it to mp4") from None
    require(taken, f"{path} has no frames: remove it, or convert it to mp4")


def read_video(path, size, fps=0.0):
    """All frames of a video file or a folder of images: (f, 3, h, w) uint8. Gathered in blocks: a small tensor left between the large
    ones that every frame goes through keeps their memory from being used again (it took 200 KB a frame of 256 x 256 pixels)."""
    frames = frames_of(path, size, fps)
    return torch.cat([torch.stack(block) for block in iter(lambda: list(itertools.islice(frames, 64)), [])])


# ending of a name -> how ffmpeg is to write it
FFMPEG = {".mp4": dict(codec="libx264", quality=8, output_params=["-preset", "veryfast"]),  # it has to keep up with the stream
          ".gif": dict(codec="gif", pixelformat="pal8", output_params=[  # every frame has a palette of its own
              "-filter_complex", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none", "-loop", "0"])}


@contextlib.contextmanager
def video_writer(path, fps=8, zoom=1):
    """A function that takes frames (f, 3, H, W) in [-1, 1], part after part, to an mp4 or gif. Written as they come, so that memory stays
    constant; the name appears once all is there. Small frames are enlarged by `zoom` (whole pixels) to be visible."""
    path, sent, arrived = Path(path), 0, 0
    with written_whole(path) as temporary:
        with contextlib.closing(iio.get_writer(temporary, "mp4", fps=fps, macro_block_size=1, ffmpeg_log_level="error",
                                               **FFMPEG[path.suffix.lower()])) as file:  # "mp4" means by ffmpeg, which writes gifs too
            def write(frames):
                nonlocal sent
                for frame in to_uint8(frames):
                    file.append_data(frame.repeat(zoom, 0).repeat(zoom, 1))
                    sent += 1

            yield write  # closing waits for ffmpeg, but nobody looks at its exit status
        with contextlib.suppress(RuntimeError):  # nothing that could be counted
            arrived = count_frames_and_secs(f"file:{temporary}")[0]  # else it would see a protocol in 12:30.mp4
        require(arrived == sent, f"cannot write {path}: ffmpeg left {arrived} of {sent} frames; free some space or choose another place")


def to_uint8(frames):
    """(..., 3, H, W) in [-1, 1] -> numpy (..., H, W, 3)"""
    return ((frames.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).numpy()


def write_sheet(path, video, zoom=2):
    """Contact sheet, a row per video of `video` (b, f, 3, H, W), a column per frame."""
    sheet = rearrange(to_uint8(video), "b f h w c -> (b h) (f w) c")
    with written_whole(path) as temporary:
        iio.imwrite(temporary, sheet.repeat(zoom, 0).repeat(zoom, 1))


# ---------------------------------------------------------------- the command

def main(argv=None):
    """`python data.py --preview PNG`: what training will see. `python data.py encode`: see wan.py."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["encode"]:
        import wan  # which itself reads this file
        return wan.main(argv[1:])
    parser = Flags(__doc__)
    parser.add_argument("--preview", metavar="PNG", required=True, help="contact sheet to write")
    parser.add_argument("--data", default="", help="folder of videos; empty: the toy world")
    parser.add_argument("--size", type=int, default=32, help="side of a frame in pixels")
    parser.add_argument("--frames", type=int, default=10, help="frames of a clip")
    parser.add_argument("--fps", type=float, default=0.0, help="thin frames out to this rate; 0: every frame")
    parser.add_argument("--turns", type=float, default=0.2, help="probability a frame that the toy's shape turns")
    parser.add_argument("--clips", type=int, default=8, help="rows of the sheet")
    args = parser.parse_args(argv)
    require(min(args.clips, args.frames, args.size) >= 1 and args.fps >= 0 and Path(args.preview).suffix.lower() in IMAGE_ENDINGS,
            f"--preview takes a name that ends in {', '.join(IMAGE_ENDINGS)}, --clips, --frames and --size at least 1, --fps at least 0")
    data = dataset(args)
    require(not data.latent, f"{args.data} holds latents, which cannot be shown: --preview takes a folder of videos")
    batch = data.batch(range(args.clips))
    write_sheet(args.preview, batch["video"])
    for caption in batch["text"]:
        print(caption or "(no caption)")
    print(f"wrote {args.preview}: a row per clip, a column per frame")


if __name__ == "__main__":
    with explain():
        main()
