"""Data: the toy world, folders of real clips, the toy's codec and text encoder, random numbers.

    python data.py --preview preview.png                      contact sheet of the toy world
    python data.py --preview preview.png --data DIR_OF_MP4    the same for your own clips

A dataset is anything with batch(clip_ids) -> {"video": (b, f, 3, H, W) in [-1, 1], "text": [str]}
and `latent` False, or, with `latent` True, {"latents": (b, f, c, h, w), "embeddings": (b, l, d)}.
Clip i is always the same clip: a run resumes by its step alone, on any number of devices.
"""
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence

from utils.captions import captions_in, videos_in
from utils.errors import friendly_errors, require
from utils.files import check_whole, clips_in, read_clip, read_negative, read_tensors, save_tensors
from utils.media import IMAGE_ENDINGS, read_video, write_sheet
from utils.settings import Parser

HELD_OUT = 1_000_000_000  # clip ids from here on are never trained on
HELD_OUT_SETS = {"search": 0, "report": 500_000}  # settings are chosen on one, tables use the other


def held_out_ids(number, which="search"):
    """The first `number` clip ids of a held-out set. In the toy world training never sees them; in
    a folder they are cut from the same videos, so some of them are trained on."""
    start = HELD_OUT + HELD_OUT_SETS[which]
    return range(start, start + number)


# ---------------------------------------------------------------- random numbers, one stream a clip
def generator(*key):
    """A random generator that depends on `key` alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


class Draws:
    """Random numbers for a batch, one stream per clip, a function of (*key, clip) alone: the same
    however a batch is split over devices, and whether or not a run was interrupted."""
    def __init__(self, clip_ids, *key, device="cpu"):
        self.device, self.clip_ids = device, clip_ids
        self.shared = generator(*key)
        self.streams = [generator(*key, int(i)) for i in clip_ids]

    def _each(self, draw):
        return torch.stack([draw(g) for g in self.streams]).to(self.device)

    def randn(self, *shape):
        """(b, *shape) standard normal."""
        return self._each(lambda g: torch.randn(shape, generator=g))

    def rand(self, *shape):
        """(b, *shape) uniform in [0, 1)."""
        return self._each(lambda g: torch.rand(shape, generator=g))

    def stratified_uniform(self):
        """(b, 1) numbers, each uniform in [0, 1), but far apart for consecutive clips: multiples of
        the golden ratio from a common random start. Gradients of a batch are then less noisy."""
        golden = [[int(i) * 0.6180339887498949 % 1] for i in self.clip_ids]
        start = torch.rand((), generator=self.shared)
        return ((torch.tensor(golden, dtype=torch.float64) + start) % 1).float().to(self.device)

    def choice(self, weights, *shape):
        """(b, *shape) indices, drawn with probability proportional to `weights`."""
        p, n = torch.tensor(weights, dtype=torch.float64), int(np.prod(shape))
        return self._each(lambda g: torch.multinomial(p, n, True, generator=g).view(shape))


# ---------------------------------------------------------------- the toy world
KINDS = ("disc", "square", "triangle")
COLOURS = {"red": (.95, .22, .18), "yellow": (.98, .82, .15), "green": (.25, .85, .3),
           "cyan": (.2, .85, .95), "blue": (.25, .35, 1.), "pink": (1., .45, .8)}
DIRECTIONS = {"right": (1, 0), "down-right": (1, 1), "down": (0, 1), "down-left": (-1, 1),
              "left": (-1, 0), "up-left": (-1, -1), "up": (0, -1), "up-right": (1, -1)}


class ToyWorld:
    """A shape glides over a still, rippled background, bounces off the walls and sometimes turns.

    Infinite and seeded: clip i is a pure function of i. The caption names colour, kind and first
    direction, but neither the speed nor the turns, so an image has many futures: frames 0 to 3 go
    straight; from frame 4 on the shape turns by 90 degrees, left or right, with probability `turns`
    a frame. A turn at frame n turns the step from n - 1 to n and all later steps.

    A `state` is a dict of tensors with all there is to know: clip, kind, colour, direction (b,);
    start, velocity (b, 2) in pixels and pixels a frame, of the first step; ground (b, 2, 3) two
    colours; ripple (b, 3) angle, phase, wavelength. Raises UsageError for too small frames."""
    latent = False
    straight = 4  # frames before the first possible turn: they show the direction

    def __init__(self, size=32, frames=10, turns=0.2):
        require(size >= 24, f"--size {size}: the toy world needs at least 24 pixels, use --size 32")
        self.size, self.frames, self.turns = size, frames, turns
        self.radius = size * 7.5 / 32
        self.speeds = (size * 1.3 / 32, size * 1.9 / 32)
        self.span = size - 2 * self.radius  # how far the centre can go along one axis
        unit = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
        self.directions = unit / unit.norm(dim=1, keepdim=True)
        self.colours = torch.tensor(list(COLOURS.values())) * 2 - 1
        grid = torch.arange(size) + 0.5
        self.y, self.x = torch.meshgrid(grid, grid, indexing="ij")

    def draw_state(self, clip):
        """One clip's row of the state. No wall is met in three steps: the direction shows."""
        g = np.random.default_rng(clip)
        kind, colour, direction = (g.integers(len(x)) for x in (KINDS, COLOURS, DIRECTIONS))
        velocity = self.directions[direction].numpy() * g.uniform(*self.speeds)
        low, high, ahead = self.radius, self.size - self.radius, 3 * velocity  # 3 steps from here
        start = g.uniform(np.maximum(low, low - ahead), np.minimum(high, high - ahead))
        ripple = (*g.uniform(0, 2 * np.pi, 2), g.uniform(1, 2) * self.size)
        base, swing = g.uniform(.1, .4, 3), g.uniform(-.1, .1, 3)
        ground = np.stack([base + swing, base - swing]) * 2 - 1
        return dict(clip=clip, kind=kind, colour=colour, direction=direction, start=start,
                    velocity=velocity, ground=ground, ripple=ripple)

    def state(self, clip_ids):
        """The states of these clips."""
        rows = [self.draw_state(int(i)) for i in clip_ids]
        state = {name: torch.as_tensor(np.array([row[name] for row in rows])) for name in rows[0]}
        return {name: x if x.dtype == torch.int64 else x.float() for name, x in state.items()}

    def walk(self, start, velocity, u):
        """The path from `start` (..., 2): (..., f, 2) as x, y in pixels, with elastic walls.

        velocity (..., 2) of the first step; u (..., f) uniform in [0, 1): below turns / 2 the shape
        turns one way, below `turns` the other. Walked without walls, then folded at both."""
        quarter = (u < self.turns).long() - 2 * (u < self.turns / 2)  # -1, 0 or 1 quarter turn
        quarter[..., :self.straight] = 0
        angle = quarter.cumsum(-1) * (np.pi / 2)
        (vx, vy), cos, sin = velocity[..., None, :].unbind(-1), angle.cos(), angle.sin()
        step = torch.stack([vx * cos - vy * sin, vx * sin + vy * cos], -1)
        step[..., 0, :] = 0
        free = (start[..., None, :] - self.radius + step.cumsum(-2)) % (2 * self.span)
        return self.radius + self.span - (free - self.span).abs()

    def centres(self, state, frames=None):
        """The shape's path (b, f, 2) in pixels. A longer path begins with the shorter one."""
        frames = frames or self.frames
        u = np.stack([np.random.default_rng((int(i), 1)).random(frames) for i in state["clip"]])
        return self.walk(state["start"], state["velocity"], torch.from_numpy(u))

    def futures(self, clip_ids, number, frames=None):
        """`number` continuations of each clip's image and caption: (clips, number, f, 2) in pixels.
        Turns are drawn anew, and the speed given the start and the direction: a fast shape cannot
        have started close to a wall."""
        state, paths, frames = self.state(clip_ids), [], frames or self.frames
        speeds = torch.linspace(*self.speeds, 1001)
        for clip, start, which in zip(state["clip"], state["start"], state["direction"]):
            g, direction = np.random.default_rng((int(clip), 2)), self.directions[which]
            ahead = 3 * speeds[:, None] * direction  # the first three steps, which meet no wall
            fits = ((start + ahead - self.size / 2).abs() <= self.span / 2 + 1e-4).all(1)
            # a start is uniform where its speed allows it, so likelier the less room there is
            weight = (fits / (self.span - ahead.abs()).prod(1)).double().numpy()
            speed = torch.from_numpy(g.choice(speeds.numpy(), number, p=weight / weight.sum()))
            u = torch.from_numpy(g.random((number, frames)))
            paths.append(self.walk(start.expand(number, 2), speed[:, None] * direction, u))
        return torch.stack(paths)

    def coverage(self, kind, centres):
        """Silhouettes (n, H, W) in [0, 1] of shapes of `kind` (n,) at `centres` (n, 2)."""
        cx, cy = centres.float()[..., None, None].unbind(1)
        dx, dy = self.x - cx, self.y - cy
        r, kind = self.radius, kind[:, None, None]
        disc = (dx ** 2 + dy ** 2).sqrt() - .95 * r
        square = torch.maximum(dx.abs(), dy.abs()) - .82 * r
        triangle = torch.maximum(dy - .62 * r, .866 * dx.abs() - .5 * dy - .62 * r)
        distance = torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle))
        return (.5 - distance / (self.size * 3 / 32)).clamp(0, 1)  # sharp edges take hours to learn

    def layers(self, state):
        """The empty background and the shape's colour everywhere, each (b, 3, H, W)."""
        angle, phase, wavelength = state["ripple"][..., None, None].unbind(1)
        along = self.x * angle.cos() + self.y * angle.sin()
        mix = (.5 + .5 * torch.sin(2 * np.pi * along / wavelength + phase))[:, None]
        one, two = state["ground"][..., None, None].unbind(1)
        background = one * mix + two * (1 - mix)
        return background, self.colours[state["colour"]][..., None, None].expand_as(background)

    def render(self, state, centres=None):
        """The clips (b, f, 3, H, W) in [-1, 1], along other `centres` (b, f, 2) if given."""
        centres = self.centres(state) if centres is None else centres
        b, f = centres.shape[:2]
        cover = self.coverage(state["kind"].repeat_interleave(f), centres.flatten(0, 1))
        cover = cover.unflatten(0, (b, f))[:, :, None]
        background, colour = (x[:, None] for x in self.layers(state))
        return background * (1 - cover) + colour * cover

    def captions(self, state):
        """["red disc moving up left", ...]: combined words are learnt sooner than eight names."""
        colours, directions = list(COLOURS), [name.replace("-", " ") for name in DIRECTIONS]
        rows = zip(state["colour"], state["kind"], state["direction"])
        return [f"{colours[c]} {KINDS[k]} moving {directions[d]}" for c, k, d in rows]

    def batch(self, clip_ids):
        """The clips, their captions and their state."""
        state = self.state(clip_ids)
        return {"video": self.render(state), "text": self.captions(state), "state": state}


# ---------------------------------------------------------------- folders of clips
class VideoFolder:
    """Every clip of `frames` frames of the videos in a folder, `size` pixels square, in memory.
    Frames are thinned to `fps` (0: all are kept), the short side is resized, the centre is kept.
    Raises UsageError that names the file and the remedy."""
    latent = False

    def __init__(self, folder, size, frames, fps=0.0):
        sources = videos_in(folder)
        captions = captions_in(folder, sources)
        self.frames, self.videos = frames, []
        self.texts = [captions.get(path.name, "") for path in sources]
        hint = ", or raise --fps" if fps else ""
        for path in sources:
            self.videos.append(read_video(path, size, fps))
            number = len(self.videos[-1])
            require(number >= frames, f"{path} has {number} frames, a clip needs {frames}: remove "
                    f"it, or lower --frames{hint}")
        starts = torch.tensor([len(v) - frames + 1 for v in self.videos], dtype=torch.float64)
        self.weights = (starts / starts.sum()).tolist()

    def batch(self, clip_ids):
        """Clip i is a video and a start, drawn by a generator seeded with i."""
        video, text = [], []
        for i in clip_ids:
            g = np.random.default_rng(int(i))
            which = g.choice(len(self.videos), p=self.weights)
            start = g.integers(len(self.videos[which]) - self.frames + 1)
            video.append(self.videos[which][start:start + self.frames])
            text.append(self.texts[which])
        return {"video": torch.stack(video).float() / 127.5 - 1, "text": text}


class LatentFolder:
    """Encoded clips, for Wan scale: .safetensors files of `latents` (f, c, h, w) and `text` (l, d).
    A clip is the first `frames` frames of a file: the first latent of a video VAE is special.
    Files may hold `text` alone, or be a teacher's trajectories (`states`, see read_clip).
    Raises UsageError that names the file."""
    latent = True

    def __init__(self, folder, frames):
        self.paths, self.frames = check_whole(clips_in(folder)), frames
        self.only_text = read_tensors(self.paths[0]).keys() == {"text"}
        self.network = None  # the Config that every clip has to fit, see scale/clips.py
        self.negative = read_negative(self.paths[0])

    def batch(self, clip_ids):
        """Clip i is a file, drawn by a generator seeded with i."""
        files = [np.random.default_rng(int(i)).integers(len(self.paths)) for i in clip_ids]
        clips = [self.read(self.paths[n]) for n in files]
        batch = {"embeddings": pad_sequence([c["text"].float() for c in clips], batch_first=True)}
        if self.only_text:
            return batch
        require(len({c["latents"].shape[1:] for c in clips}) == 1, f"the clips beside "
                f"{self.paths[0]} differ in shape: encode them with one --size into a new folder")
        latents = torch.stack([c["latents"][:self.frames].float() for c in clips])
        return {**batch, "latents": latents}

    def read(self, path):
        """One clip, checked against the network."""
        return read_clip(path, self.network, self.frames, self.only_text)


def dataset(cfg):
    """The data that a TrainConfig names: the toy world, or its folder of videos or of latents."""
    if not cfg.data:
        return ToyWorld(cfg.size, cfg.frames, cfg.turns)
    if clips_in(cfg.data):
        return LatentFolder(cfg.data, cfg.frames)
    return VideoFolder(cfg.data, cfg.size, cfg.frames, cfg.fps)


# ---------------------------------------------------------------- text and latents at toy scale
class WordEncoder:
    """A text encoder without training: every word is a random vector seeded by its letters.

    Stands in for Wan's UMT5, with the same output: (b, l, d) zero-padded embeddings. Warns once
    when a caption is truncated. An empty caption is all zeros, the "no text" of guidance."""
    def __init__(self, length, dim):
        self.length, self.dim, self.warned = length, dim, False

    def encode(self, captions):
        """[str] -> (b, length, dim)"""
        out = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(out, captions):
            words = caption.lower().split()
            if len(words) > self.length and not self.warned:
                self.warned = True
                print(f'"{caption[:80]}": only the first {self.length} of {len(words)} words are '
                      f"used; --text-len {len(words)} in all stages uses all", file=sys.stderr)
            for slot, word in zip(row, words):
                seeded = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                slot.copy_(torch.randn(self.dim, generator=seeded))
        return out


class PatchCodec:
    """Latents at toy scale: the leading principal components of square patches, in closed form.

    Latents have unit variance over all. Components are divided by the SQUARE ROOT of their spread:
    undivided, the coarse ones drown the noise, so that motion is rarely in doubt; made equal, fine
    detail is half of the loss. decode draws a patch from the 3 x 3 latents around it by ridge
    regression: neighbours know part of what a patch has dropped, and there are no seams."""
    ratio = 1     # frames per latent frame, as of a video VAE
    ridge = 0.01  # variance that errors of generated latents are expected to have

    def __init__(self, patch, mean, basis, scale, kernel):
        self.patch, self.mean, self.basis = patch, mean, basis
        self.scale, self.kernel = scale, kernel

    @classmethod
    def fit(cls, video, patch, channels):
        """The codec of these frames (b, f, 3, H, W). UsageError for too many channels."""
        require(channels <= 3 * patch ** 2, f"--in-dim {channels}: a patch of {patch} x {patch} "
                f"pixels has only {3 * patch ** 2} components")
        x = rearrange(video, "b f c (h p) (w q) -> (b f h w) (c p q)", p=patch, q=patch).double()
        mean = x.mean(0)
        basis, power, _ = torch.linalg.svd((x - mean).T @ (x - mean) / len(x))
        power = power[:channels].clamp_min(1e-8)
        scale = power ** 0.25 * power.sqrt().mean().sqrt()  # latent variances power ** 0.5, mean 1
        basis = basis[:, :channels].float().contiguous()
        codec = cls(patch, mean.float(), basis, scale.float(), None)
        codec.kernel = codec.fit_decoder(video)
        return codec

    def fit_decoder(self, video):
        """Ridge regression from 3 x 3 latents to the patch in the middle: (3 patch^2, c, 3, 3)."""
        size, p = self.basis.shape[1] * 9, self.patch
        gram = torch.zeros(size, size, dtype=torch.float64)
        target = torch.zeros(size, len(self.basis), dtype=torch.float64)
        for clips in video.split(32):
            patches = rearrange(clips, "b f c (h p) (w q) -> (b f h w) (c p q)", p=p, q=p)
            around = F.unfold(self.pad(self.encode(clips)), 3)  # (b f, c 9, h w)
            around = rearrange(around, "n k l -> (n l) k").double()
            gram += around.T @ around
            target += around.T @ (patches - self.mean).double()
        rows = video[:, :, 0].numel() // p ** 2
        gram += rows * self.ridge * torch.eye(size, dtype=torch.float64)
        kernel = torch.linalg.solve(gram, target).T.float()
        return kernel.unflatten(1, (-1, 3, 3)).contiguous()

    @staticmethod
    def pad(latents):
        """Single frames with their outermost latents repeated: (b f, c, h + 2, w + 2)."""
        return F.pad(latents.float().flatten(0, 1), (1, 1, 1, 1), "replicate")

    def encode(self, video):
        """(b, f, 3, H, W) -> (b, f, c, H/patch, W/patch)"""
        p, (h, w) = self.patch, video.shape[-2:]
        require(h % p == w % p == 0, f"frames of {h}x{w} do not divide into patches of {p}")
        x = rearrange(video, "b f c (h p) (w q) -> b f h w (c p q)", p=p, q=p)
        mean, basis, scale = (y.to(video.device) for y in (self.mean, self.basis, self.scale))
        return rearrange((x - mean) @ basis / scale, "b f h w c -> b f c h w")

    def decode(self, latents):
        """(b, f, c, h, w) -> (b, f, 3, H, W)"""
        kernel, mean = self.kernel.to(latents.device), self.mean.to(latents.device)
        patches = F.conv2d(self.pad(latents), kernel, mean)
        return rearrange(patches, "(b f) (c p q) h w -> b f c (h p) (w q)", b=len(latents),
                         p=self.patch, q=self.patch)

    def decoder(self):
        """decode() for a stream, chunk by chunk."""
        return self.decode

    def save(self, path):
        """Write the codec to a .safetensors file."""
        save_tensors(path, {"patch": torch.tensor(self.patch), "mean": self.mean,
                            "basis": self.basis, "scale": self.scale, "kernel": self.kernel})

    @classmethod
    def load(cls, path):
        """What save() wrote; None without a file, as in stages that were trained on latents."""
        if not Path(path).is_file():
            return None
        tensors = read_tensors(path)
        names = ("mean", "basis", "scale", "kernel")
        require(tensors.keys() == {"patch", *names} and tensors["scale"].all(), f"{path} holds no "
                "codec: train the stage again, or copy the file from another stage of the run")
        return cls(int(tensors["patch"]), *(tensors[name] for name in names))


# ---------------------------------------------------------------- the command
def main(argv=None):
    """Write a contact sheet of what training will see, and print the captions."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preview", metavar="PNG", required=True, help="Contact sheet to write.")
    add("--data", default="", help="Folder of videos. Default: the toy world.")
    add("--size", type=int, default=32, help="Side of a frame in pixels.")
    add("--frames", type=int, default=10, help="Frames of a clip.")
    add("--fps", type=float, default=0.0, help="Thin frames to this rate. 0: all.")
    add("--turns", type=float, default=0.2, help="Toy world: probability of a turn at a frame.")
    add("--clips", type=int, default=8, help="Rows of the sheet.")
    args = parser.parse_args(argv)
    require(min(args.clips, args.frames, args.size) >= 1 and args.fps >= 0,
            "--clips, --frames and --size take numbers from 1, --fps from 0")
    require(Path(args.preview).suffix.lower() in IMAGE_ENDINGS,
            f"--preview {args.preview}: use a name that ends in {', '.join(IMAGE_ENDINGS)}")
    data = dataset(args)
    require(not data.latent, f"{args.data} holds latents, not videos: name a folder of videos")
    batch = data.batch(range(args.clips))
    write_sheet(args.preview, batch["video"])
    for caption in batch["text"]:
        print(caption or "(no caption)")
    print(f"wrote {args.preview}: a row per clip, a column per frame")


if __name__ == "__main__":
    with friendly_errors():
        main()
