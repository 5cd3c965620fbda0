"""Scores of a trained stage, or of a folder of videos. On the toy world they are exact, since its
state is known.

    python experiments/evaluate.py out/toy/stage3              scores, also to its metrics.json
    python experiments/evaluate.py out/toy/stage*              a table, a row per stage
    python experiments/evaluate.py DIR --clips 256 --steps 4   more clips, four passes per chunk
    python experiments/evaluate.py DIR --held-out report       the clips kept for tables
    python experiments/evaluate.py DIR_OF_VIDEOS               0.mp4, 1.gif: held-out toy clips
    python experiments/evaluate.py out/wan/stage3 --vbench DIR --vbench-info FILE --vbench-images
        DIR --vae DIR --text-encoder DIR                       videos for VBench-I2V, to score there

The names are VBench's, the definitions are ours: a toy clip can be compared with the truth instead
of with a network's taste. Scores on 0-100, higher is better; errors are fractions of the object's
energy, 0 perfect, 1 as wrong as no object at all. Motion is counted between frames in which the
object can be found: broken frames do not move.

Two axes are measured, never one alone. Error: is every frame a true frame? Energy and spread: do
clips of one image, each from its own noise, go where the world would let them go, or all to one
place? The row "real" is real clips through the codec, against which all others are read: jitter,
say, is right at the real value, not at 0.
"""

import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import (COLOURS, HELD_OUT_SETS, KINDS, Draws, PatchCodec, ToyWorld, WordEncoder, dataset,
                  held_out_ids)
from experiments.vbench import make_videos
from sample import generate, load_stage
from utils.errors import UsageError, WriteError, check_device, friendly_errors, require
from utils.files import read_json, write_json
from utils.media import VIDEO_ENDINGS, read_video
from utils.settings import Parser, as_words, cuda_or_cpu, has_bfloat16

BROKEN = 0.25  # a frame with a larger error shows no object
LAG = 4  # frames over which displacement is measured
WORLD = ("data", "size", "turns", "frames", "codec_patch", "in_dim")  # what real clips depend on
GHOST = 0.1  # a clip with a frame of a larger error is counted as a ghost
IMAGES = 64  # whose futures are compared
SEEDS = 16  # clips of each
FUTURES = 256  # of the world, for each


# ---------------------------------------------------------------- where is the object?


@functools.lru_cache
def templates(size, kind, step=0.25):
    """Silhouettes of a kind at every position of a grid, in frames of `size` pixels: (positions
    (n, 2), coverage (n, H*W), side of the grid). Drawn once."""
    world = ToyWorld(size)
    ticks = torch.arange(world.radius, size - world.radius + 1e-6, step)
    centres = torch.cartesian_prod(ticks, ticks).flip(1)  # x runs fastest
    cover = world.coverage(torch.full((len(centres),), kind), centres).flatten(1)
    return centres, cover, len(ticks)


def locate(world, state, video):
    """The nearest true frame of every frame of `video` (b, f, 3, H, W): error (b, f) and position
    (b, f, 2) in pixels.

    A true frame is this clip's background with this clip's object anywhere. The error is the
    squared distance to the nearest one over the squared contrast of the object there."""
    b, f = video.shape[:2]
    background, colour = world.layers(state)
    contrast = colour - background  # (b, 3, H, W)
    rest = video - background[:, None]
    match = (rest * contrast[:, None]).sum(2)  # (b, f, H, W)
    power = contrast.square().sum(1)  # (b, H, W)
    position = torch.zeros(b, f, 2)
    for kind in range(len(KINDS)):
        rows = (state["kind"] == kind).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        centres, cover, side = templates(world.size, kind)
        prior = power[rows].flatten(1) @ cover.square().T  # (rows, n)
        for i, frames in enumerate(match[rows].flatten(2)):
            cost = (prior[i] - 2 * frames @ cover.T).view(f, side, side)  # relative to "no object"
            position[rows[i]] = refine(cost, centres)
    cover = drawn(world, state, position)
    energy = (power[:, None] * cover.square()).sum((2, 3))
    error = rest.square().sum((2, 3, 4)) - 2 * (match * cover).sum((2, 3)) + energy
    return (error / energy).clamp_min(0), position


def drawn(world, state, position):
    """The silhouettes of the clips' shapes at `position` (b, f, 2): (b, f, H, W)."""
    b, f = position.shape[:2]
    kind = state["kind"].repeat_interleave(f)
    return world.coverage(kind, position.flatten(0, 1)).unflatten(0, (b, f))


def refine(cost, centres):
    """Sub-grid minimum of costs (f, side, side) [y, x] by a parabola along each axis: (f, 2)."""
    f, side, _ = cost.shape
    best = cost.flatten(1).argmin(1)
    y, x, n = best // side, best % side, torch.arange(f)

    def offset(low, mid, high):
        bend = low - 2 * mid + high
        shift = (low - high) / (2 * bend.clamp_min(1e-12))
        return torch.where(bend > 0, shift, torch.zeros_like(mid)).clamp(-0.5, 0.5)

    def inside(i):
        return (i > 0) & (i < side - 1)

    left, right = (x - 1).clamp_min(0), (x + 1).clamp_max(side - 1)
    above, below = (y - 1).clamp_min(0), (y + 1).clamp_max(side - 1)
    dx = offset(cost[n, y, left], cost[n, y, x], cost[n, y, right]) * inside(x)
    dy = offset(cost[n, above, x], cost[n, y, x], cost[n, below, x]) * inside(y)
    step = float(centres[1, 0] - centres[0, 0])
    return centres[best] + torch.stack([dx, dy], 1) * step


def recognise(world, state, frame):
    """The kind and colour (b,), (b,) that explain a frame (b, 3, H, W) best, over all kinds,
    colours and positions."""
    background, _ = world.layers(state)
    rest, costs = frame - background, []
    for kind in range(len(KINDS)):
        _, cover, _ = templates(world.size, kind, 0.5)
        for colour in world.colours:
            contrast = colour[:, None, None] - background
            match, power = (rest * contrast).sum(1).flatten(1), contrast.square().sum(1).flatten(1)
            costs.append((power @ cover.square().T - 2 * match @ cover.T).amin(1))
    best = torch.stack(costs, 1).argmin(1)
    return best // len(COLOURS), best % len(COLOURS)


def crops(world, video, position):
    """The object and what is around it, cut out around `position`: (b, f, 3, k, k)."""
    k, (b, f) = 2 * int(world.radius) + 3, video.shape[:2]
    ticks = torch.arange(k) - (k - 1) / 2
    around = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)
    grid = around + position.flatten(0, 1)[:, None, None]
    cut = F.grid_sample(video.flatten(0, 1), grid * 2 / world.size - 1, align_corners=False,
                        padding_mode="border")
    return cut.unflatten(0, (b, f))


def silhouettes(world, kind):
    """The object's mask (b, 1, 1, k, k) in what crops() cuts out."""
    # the centre of a pixel, so that nothing is interpolated
    centre = torch.full((len(kind), 1, 2), world.size // 2 - 0.5)
    return crops(world, world.coverage(kind, centre[:, 0])[:, None, None], centre)


# ---------------------------------------------------------------- scores


def moved(position, found, lag):
    """Displacement over `lag` frames (b, f - lag), 0 wherever the object was not found in one of
    the two."""
    lag = min(lag, position.shape[1] - 1)  # of shorter clips, all there is
    step = (position[:, lag:] - position[:, :-lag]).norm(dim=-1)
    return step * (found[:, lag:] & found[:, :-lag])


def percent(error):
    """An error as a score: 100 for none, 0 for 1 and more."""
    return 100 * (1 - error.clamp(0, 1)).mean().item()


def exact_scores(world, state, video, first=1, chunk=3):
    """All scores of toy clips (b, f, 3, H, W) whose states are known; the first `first` frames are
    given, not scored. Clips have at least 3 frames, or there is no jitter to speak of."""
    error, position = locate(world, state, video)
    truth = world.centres(state, video.shape[1])
    found, always = error < BROKEN, torch.ones_like(error, dtype=torch.bool)
    background, colour = world.layers(state)
    contrast = (colour - background).square().mean((1, 2, 3))[:, None]
    cut, silhouette = crops(world, video, position), silhouettes(world, state["kind"])
    cover = drawn(world, state, position)[:, :, None]
    bare = (F.max_pool2d(cover.flatten(0, 1), 3, 1, 1).view_as(cover) < 0.01).float()

    def differ(a, b, mask=silhouette):
        return ((a - b).square() * mask).sum((2, 3, 4)) / (mask.sum((2, 3, 4)) * 3 * contrast)

    def differ_bg(a, b):
        return differ(a, b, bare)

    def motion(lag):
        ours, real = moved(position, found, lag), moved(truth, always, lag)
        return ours.mean().item() / real.mean().item()

    made = slice(first, None)
    still = video[:, made].median(1, keepdim=True).values  # a made clip's own background
    kind, tint = recognise(world, state, video[:, -1])
    step = position[:, min(3, video.shape[1] - 1)] - position[:, 0]
    heading = (step @ world.directions.T).argmax(1)
    agree = (kind == state["kind"]) & (tint == state["colour"]) & found[:, -1]
    agree &= heading == state["direction"]
    bend = (position[:, 2:] - 2 * position[:, 1:-1] + position[:, :-2]).norm(dim=-1)
    return {
        "quality_error": error[:, made].mean().item(),
        "first_error": error[:, first:first + chunk].mean().item(),
        "last_error": error[:, -chunk:].mean().item(),
        "error_growth": (error[:, -chunk:] - error[:, first:first + chunk]).mean().item(),
        "dynamic_degree": motion(1),
        "displacement": motion(LAG),
        "jitter": bend.mean().item(),
        "ghosts": (error[:, made].amax(1) > GHOST).float().mean().item(),
        "caption_agreement": agree.float().mean().item(),
        "imaging_quality": percent(error[:, made]),
        "motion_smoothness": percent(bend / world.radius),
        "subject_consistency": percent(differ(cut[:, made], cut[:, made].mean(1, keepdim=True))),
        "background_consistency": percent(differ_bg(video, still)[:, made]),
        "i2v_subject": percent(differ(cut, cut[:, :1])[:, made]),
        "i2v_background": percent(differ_bg(video, background[:, None])[:, made]),
    }


def drift(quality, segments=8):
    """Standard deviation of imaging quality over temporal segments of a long rollout, of as equal
    length as can be, averaged over videos (paper, sec. 5).

    quality: (b, f), 0-100."""
    parts = quality.tensor_split(min(segments, quality.shape[1]), 1)
    means = torch.stack([part.mean(1) for part in parts], 1)
    return means.std(1, unbiased=False).mean().item()


def energy_distance(ours, theirs):
    """How far two clouds of points lie apart, for every image: ours (i, n, d), theirs (i, m, d) ->
    (i,).

    (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / E|Y - Y'|, with Euclidean distances and pairs of
    different draws: 0 on the mean over images if both are drawn from one distribution, below it by
    chance alone; it grows when ours are elsewhere or too alike."""

    def among(x):
        n = x.shape[1]
        return torch.cdist(x, x).sum((1, 2)) / (n * (n - 1))

    between = torch.cdist(ours, theirs).mean((1, 2))
    return (2 * between - among(ours) - among(theirs)) / among(theirs)


def chunk_ends(frames, first, chunk):
    """The last frame of every chunk that is written."""
    return list(range(first + chunk - 1, frames, chunk))


def future_scores(ours, theirs):
    """Energy and spread of paths (i, n, ends, 2) in pixels, at the ends of the chunks, against the
    world's (i, m, ends, 2).

    Spread is the root of the ratio of the variances of the last position, summed over images: 1 =
    as many futures as the world."""
    distance = energy_distance(ours.flatten(2), theirs.flatten(2))
    variance, their_variance = (paths[:, :, -1].var(1).sum() for paths in (ours, theirs))
    return {
        "energy": distance.mean().item(),
        "energy_se": distance.std().item() / math.sqrt(len(distance)),
        "spread": (variance / their_variance).sqrt().item(),
    }


def seam_score(paths, first, chunk):
    """Share of paths (i, n, f, 2) that go straight on, to within 45 degrees, where one chunk ends
    and the next begins. A chunk that does not read its past goes anywhere."""
    step = paths[:, :, 1:] - paths[:, :, :-1]  # step n leads to frame n + 1
    starts = torch.arange(first + chunk, paths.shape[2], chunk)
    cosine = F.cosine_similarity(step[:, :, starts - 1], step[:, :, starts - 2], dim=-1)
    return (cosine > math.sqrt(0.5)).float().mean().item()


def general_scores(video, real, first=1):
    """Scores that need no knowledge of the scene, for clips (b, f, 3, H, W) against real ones of
    the same first frames."""
    lag = min(LAG, video.shape[1] - 1)

    def low(v):
        v = F.avg_pool2d(v.flatten(0, 1), 4).unflatten(0, v.shape[:2]).flatten(2)
        return v - v.mean(2, keepdim=True)

    def change(v):
        return (v[:, lag:] - v[:, :-lag]).abs().mean().item()

    likeness = F.cosine_similarity(low(video), low(video[:, :1]), dim=2)[:, first:]
    bend = (video[:, 2:] - 2 * video[:, 1:-1] + video[:, :-2]).abs().mean() / 2
    return {
        "i2v_fidelity": 100 * likeness.mean().item(),
        # relative to clips that stand still it has no meaning
        "dynamic_degree": change(video) / change(real) if change(real) > 1e-4 else None,
        "motion_smoothness": 100 * (1 - bend.clamp(max=1)).item(),
    }


def sharpness(video):
    """Edge energy of every frame relative to the clip's first: (b, f), 100 = as sharp as the
    image."""
    across = (video[..., 1:] - video[..., :-1]).square().mean((2, 3, 4))
    down = (video[..., 1:, :] - video[..., :-1, :]).square().mean((2, 3, 4))
    edges = across + down
    return 100 * (edges / edges[:, :1].clamp_min(1e-9)).clamp(max=2)


# ---------------------------------------------------------------- of a stage, of a folder


@torch.no_grad()
def make(net, codec, settings, clips, frames, steps, seed=0, at_once=64):
    """Held-out clips animated by a stage: (videos (b, f, 3, H, W), raw batches, the data they come
    from). net None: the real clips through the codec. Another `seed` is other noise, and another
    future, for the same images."""
    cfg = SimpleNamespace(**(settings if net else {**settings, "frames": frames}))
    data, words, made, raws = dataset(cfg), WordEncoder(cfg.text_len, cfg.text_dim), [], []
    clips = list(clips)
    device = next(net.parameters()).device if net else torch.device("cpu")
    bfloat16 = settings["dtype"] == "bfloat16" and has_bfloat16(device.type)
    for i in range(0, len(clips), at_once):
        part = clips[i:i + at_once]
        raw, draws = data.batch(part), Draws(part, "evaluate", seed)
        x = codec.encode(raw["video"])
        if net is not None:
            image, text = x[:, :cfg.first].to(device), words.encode(raw["text"]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                x = generate(net, settings, image, text,
                             lambda n: draws.randn(n, *x.shape[2:]).to(device), frames, steps)
        made.append(codec.decode(x.cpu()))
        raws.append(raw)
    return torch.cat(made), raws, data


def states(raws):
    """The states of several raw batches of toy clips as one."""
    return {k: torch.cat([raw["state"][k] for raw in raws]) for k in raws[0]["state"]}


def future_paths(net, codec, settings, clips, steps=None, seeds=SEEDS):
    """Where a stage lets the shape go: (clips, seeds, f, 2) in pixels, a path for every image and
    seed. net None: the world's own."""
    frames = settings["frames"]
    if net is None:
        world = dataset(SimpleNamespace(**settings))
        return world.futures(clips, FUTURES + seeds, frames)[:, FUTURES:]
    paths = []
    for seed in range(1, seeds + 1):
        video, raws, world = make(net, codec, settings, clips, frames, steps, seed)
        paths.append(locate(world, states(raws), video)[1])
    return torch.stack(paths, 1)


def scores_of(net, codec, settings, number=256, steps=None, long=True, which="search"):
    """Scores on `number` held-out clips. With `long`, also those of rollouts 4 times as long, of a
    quarter of the clips, and of the futures of IMAGES images. net None: of the real clips, through
    the codec."""
    clips = held_out_ids(number, which)
    frames, first = settings["frames"], settings["first"]
    third = max(1, (frames - first) // 3)  # the toy's chunk; the same for students of other chunks
    video, raws, data = make(net, codec, settings, clips, frames, steps)
    # without an image the background of the clip is unknown
    toy = isinstance(data, ToyWorld) and first > 0
    scores = {"clips": number, "held_out": which}
    if toy:
        scores |= exact_scores(data, states(raws), video, first, third)
    else:
        scores |= general_scores(video, torch.cat([raw["video"] for raw in raws]), first)
    if long and (toy if net is None else settings["stage"]):
        few, length = clips[:max(1, number // 4)], first + 4 * (frames - first)
        video, raws, _ = make(net, codec, settings, few, length, steps)
        if toy:
            error = locate(data, states(raws), video)[0][:, first:]
            scores["long_error"] = error.mean().item()
            quality = 100 * (1 - error.clamp(0, 1))
        else:
            quality = sharpness(video)[:, first:]
        scores["drift"] = drift(quality)
        scores["long_quality"] = quality.mean().item()
    if long and toy:
        images, ends = held_out_ids(IMAGES, which), chunk_ends(frames, first, third)
        ours = future_paths(net, codec, settings, images, steps)
        theirs = data.futures(images, FUTURES, frames)
        scores |= future_scores(ours[:, :, ends], theirs[:, :, ends])
        scores["seam"] = seam_score(ours, first, third)
    return scores


def stage_scores(folder, number=256, steps=None, long=True, which="search", device=""):
    """Scores of a stage's EMA weights, see scores_of(). steps: passes per chunk, also a list;
    device: cuda, mps or cpu, by default CUDA if there is any."""
    net, codec, settings = load_stage(folder, device=device or cuda_or_cpu())
    require(codec, f"{folder} was trained on latents, which have no scores here: look at what "
            "sample.py makes of it")
    require(settings["stage"] or not isinstance(steps, list), f"{folder} is a teacher, which "
            "follows its ODE: give --steps one number")
    used = steps or settings["student_steps" if settings["stage"] else "ode_steps"]
    used = as_words(tuple(used)) if isinstance(used, (list, tuple)) else str(used)
    return {"stage": settings["stage"], "steps": used,
            **scores_of(net, codec, settings, number, steps, long, which)}


def real_scores(folder, number=256, long=True, which="search"):
    """Scores of the real clips through the codec of a stage: what no network can beat."""
    settings = read_json(Path(folder) / "config.json")
    codec = PatchCodec.load(Path(folder) / "codec.safetensors")
    world = {name: settings[name] for name in WORLD}
    return {"stage": "real", **world, **scores_of(None, codec, settings, number, None, long, which)}


def folder_scores(folder, size=32, turns=0.2):
    """Scores of video files named by the number of the held-out toy clip that they continue: 0.mp4,
    17.gif, ..."""
    paths = sorted(p for p in Path(folder).iterdir()
                   if p.suffix.lower() in VIDEO_ENDINGS and p.stem.isdecimal())
    require(paths, f"{folder} holds neither a finished stage nor videos named by clip number "
            "(0.mp4, 1.mp4, ...)")
    videos = [read_video(p, size) for p in paths]
    frames, shortest = min((len(video), path) for video, path in zip(videos, paths))
    require(frames >= 3, f"{shortest} has {frames} frames: a clip to score has 3 or more")
    world = ToyWorld(size, frames, turns)
    state = world.state([held_out_ids(1)[0] + int(p.stem) for p in paths])
    clips = torch.stack([v[:frames] for v in videos]).float() / 127.5 - 1
    return {"stage": Path(folder).name, "clips": len(paths), **exact_scores(world, state, clips)}


COLUMNS = {  # a score -> its heading
    "stage": "stage", "steps": "steps", "quality_error": "error", "last_error": "last",
    "error_growth": "growth", "energy": "energy", "spread": "spread", "seam": "seam",
    "drift": "drift", "long_error": "long", "ghosts": "ghosts", "dynamic_degree": "dynamic",
    "displacement": "displ.", "jitter": "jitter", "caption_agreement": "caption",
    "subject_consistency": "subject", "background_consistency": "backgr.",
    "i2v_subject": "i2v subj.", "i2v_background": "i2v backgr.", "motion_smoothness": "smooth",
    "imaging_quality": "imaging", "i2v_fidelity": "i2v", "minutes": "minutes"}


def cell(value):
    """A score as text, empty if there is none."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows, columns=COLUMNS):
    """Scores as a Markdown table, with those of the columns that at least one row has."""
    names = [name for name in columns if any(name in row for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[n] for n in names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [cell(row.get(n)) for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows_of_docs(*names):
    """The head and the rows of these names from the table of the stages in docs/results.md."""
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    head, rule, *rows = text.partition("<!-- table stages")[2].splitlines()[1:]
    return [head, rule, *(next(row for row in rows if row.startswith(f"| {n} |")) for n in names)]


def summary(out):
    """What the recipe ends with: a row for real clips, every stage and the control (that of
    docs/results.md, if it was not trained), and where the pictures are."""
    rows = []
    folders = sorted(path.parent for path in Path(out).glob("stage[0-3]*/metrics.json"))
    for folder in (Path(out) / "real", *folders):
        if (folder / "metrics.json").is_file():
            row = read_json(folder / "metrics.json")
            rows.append({**row, "stage": folder.name.removeprefix("stage")})
    columns = ("stage quality_error last_error energy spread drift long_error ghosts jitter "
               "displacement caption_agreement i2v_fidelity motion_smoothness minutes").split()
    print("\n" + table(rows, columns))
    stage3, control = Path(out) / "stage3", Path(out) / "stage2-control"
    toy = any(row["stage"] == "3" and "energy" in row for row in rows)
    if toy and not control.exists() and read_json(stage3 / "config.json")["recipe"] == "aad-1":
        print("\nNot trained here: stage 3's control, stage 2 trained on (train.py --control). "
              "From docs/results.md, of the default settings, on other clips:\n")
        print("\n".join(rows_of_docs("stage 3", "control: stage 2 trained on, as many steps")))
    if any(Path(out).glob("stage[0-3]/samples.gif")):
        print(f"\nPictures: {out}/stage*/samples.gif (upper half real clips, lower half the "
              "stage's, from the same first frames)")


def main(argv=None):
    """Score every folder named on the command line and print a table; a stage's scores also go to
    its metrics.json, but for those of --steps and --no-long. The first row has the real clips,
    through the codec of the first stage."""
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="stages of a run, or folders of videos")
    parser.add_argument("--clips", type=int, default=256, help="held-out clips")
    parser.add_argument("--held-out", choices=list(HELD_OUT_SETS), default="search",
                        help="which of the two sets of held-out clips: one to choose settings by, "
                             "one for tables")
    parser.add_argument("--steps", type=int, nargs="+", help="network passes per chunk, several "
                        "numbers for the first chunks and the rest; default: as trained")
    parser.add_argument("--no-long", action="store_true",
                        help="leave out the 4 times longer rollout (drift, long error) and the "
                             "futures (energy, spread)")
    add_vbench(parser)
    args = parser.parse_args(argv)
    require(min(args.clips, *(args.steps or [1])) >= 1, "--clips and --steps must be positive")
    steps = args.steps[0] if args.steps and len(args.steps) == 1 else args.steps
    check_device(args.device)
    if args.vbench:
        require(len(args.folders) == 1, "--vbench takes one folder: that of a Wan student")
        return make_videos(args, args.folders[0])
    rows, unsaved = [], []
    for folder in map(Path, args.folders):
        require(folder.is_dir(), f"{folder} is not a folder: name a stage such as out/toy/stage3, "
                "or a folder of videos")
        if not (folder / "config.json").is_file():
            rows.append(folder_scores(folder))
            continue
        scores = stage_scores(folder, args.clips, steps, not args.no_long, args.held_out,
                              args.device)
        rows.append(scores)
        if rows[0]["stage"] != "real":
            rows.insert(0, real_row(folder, args.clips, args.held_out))
        metrics = folder / "metrics.json"
        if args.steps or args.no_long:  # scores of another kind than those in metrics.json
            continue
        before = read_json(metrics) if metrics.is_file() else {}  # the minutes
        unsaved.append((metrics, {**before, **scores}))
    print(table(rows))
    for metrics, scores in unsaved:  # the table first: a full disk must not cost it
        write_json(metrics, scores)


def add_vbench(parser):
    """Flags of --vbench."""
    add = parser.add_argument
    add("--vbench", metavar="DIR", help="make the videos that VBench-I2V reads, of a Wan student")
    add("--vbench-info", metavar="FILE", help="VBench's vbench2_i2v_full_info.json")
    add("--vbench-images", metavar="DIR", help="VBench's cropped images, such as data/crop/16-9")
    add("--wan", help="folder of a download of Wan 2.1: its VAE and its text encoder")
    add("--vae", help="Wan's VAE alone: folder or file")
    add("--text-encoder", help="Wan's text encoder alone")
    add("--preset", help="shape of official weights: wan-1.3b or wan-14b")
    add("--size", help="height x width; default: 480x832")
    add("--device", default=cuda_or_cpu(), help="cuda, mps or cpu")


def real_row(folder, clips, which):
    """The scores of real clips, the same for every stage of a run; kept in real/metrics.json."""
    path, settings = folder.parent / "real" / "metrics.json", read_json(folder / "config.json")
    known = read_json(path) if path.is_file() else {}
    asked = {"clips": clips, "held_out": which, **{name: settings[name] for name in WORLD}}
    if known.items() >= asked.items():
        return known
    scores = real_scores(folder, clips, which=which)
    try:
        write_json(path, scores)
    except WriteError as error:  # only the time to compute them again
        print(error, file=sys.stderr)
    return scores


def finish_stage(stage, folder, clips, minutes, device=""):
    """What train.py asks for at the end of a stage: its scores on held-out clips, made on the
    stage's device and printed beside those of real clips. Writes metrics.json, which marks the
    stage as finished. clips 0: no scores."""
    scores = {}
    if clips:
        try:
            scores = stage_scores(folder, clips, device=device)
            print(table([real_row(folder, clips, "search"), scores]))
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise UsageError(
                f"stage {stage} is trained, but scoring it failed ({reason}): python "
                f"experiments/evaluate.py {folder} shows where; the same command with "
                "--eval-clips 0 goes on without") from error
    write_json(folder / "metrics.json", {**scores, "minutes": minutes})


if __name__ == "__main__":
    with friendly_errors():
        main()
