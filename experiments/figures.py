"""The README's pictures, made into assets/. matplotlib draws them, and nothing else needs it.

    pip install -r requirements-figures.txt          once
    python experiments/figures.py masks              who sees whom: teacher, student, discriminator
    python experiments/figures.py recipe             the four stages and what they hand on
    python experiments/figures.py cache              what a stream keeps in its KV cache
    python experiments/figures.py example            a first frame for sample.py --image
    python experiments/figures.py curves out/toy     training curves of a run, from its logs
    python experiments/figures.py fan out/toy        where clips of one image go, stage by stage
    python experiments/figures.py drift out/toy      error over ten clip lengths; or name stages
    python experiments/figures.py front out/table    error against energy of ablations.py's rows
    python experiments/figures.py family out/toy     last frames of all relatives, and a GIF of each
    python experiments/figures.py gifs out/toy       the samples of every stage, copied
    python experiments/figures.py all out/toy        all that this run allows

NAME.png is written, to assets/ or the folder of --assets. A README shows it 900 pixels wide, which
are 9 inches here: lengths are in hundredths of an inch.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from data import HELD_OUT, ToyWorld, dataset, held_out_ids
from experiments.ablations import TABLES
from experiments.evaluate import future_paths, locate, make, states
from losses import schedule
from model import Config, KVCache, block_causal_mask, chunk_bounds
from sample import load_stage
from scale.recipes import FAMILY
from train import RECIPES, TrainConfig
from utils.errors import UsageError, friendly_errors, require
from utils.files import atomic_write, read_json, read_text
from utils.media import to_uint8, video_writer
from utils.settings import Parser

INK, GREY, RULE, FAINT = "#262b33", "#666e79", "#c9ced6", "#eceff3"
BLUE, ORANGE, MID_BLUE, MID_ORANGE = "#2f6db0", "#cf5f2e", "#7ba4cf", "#e39a6f"
PALE_BLUE, PALE_ORANGE = "#dbe7f4", "#f8dfd0"
STAGES = ["stage 0: teacher", "stage 1: ODE initialisation", "stage 2: DMD", "stage 3: adversarial"]
STYLE = {"font.size": 8, "axes.titlesize": 8.5, "axes.edgecolor": RULE, "axes.labelcolor": GREY,
         "xtick.color": GREY, "ytick.color": GREY, "axes.axisbelow": True, "axes.grid": True,
         "grid.color": FAINT, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "mathtext.fontset": "cm", "figure.constrained_layout.use": True}
try:
    import matplotlib
    from matplotlib import colors, patches
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    matplotlib.rcParams.update(STYLE)
except ImportError:  # said when a picture is asked for; the tests read this file without it
    matplotlib = None


def board(height):
    """A page with one drawing area of 900 x `height`, y downwards, to lay things out by hand."""
    page = Figure(figsize=(9, height / 100), layout="none")
    ax = page.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(height, 0))
    ax.axis("off")
    return page, ax


def say(ax, x, y, words, size=8.0, colour=INK, **more):
    """Words around the height y."""
    ax.text(x, y, words, size=size, color=colour, **{"va": "center", **more})


def box(ax, x, y, width, height, fill, edge="none", radius=6, line=1.2):
    """A rectangle with round corners."""
    style = f"round,pad=0,rounding_size={radius}"
    ax.add_patch(patches.FancyBboxPatch((x, y), width, height, style, fc=fill, ec=edge, lw=line))


def arrow(ax, points, colour=INK, width=1.4):
    """A line along `points` with a head at its end."""
    look = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.plot(*zip(*points[:-1]), color=colour, lw=width, solid_joinstyle="miter")
    ax.annotate("", points[-1], points[-2], arrowprops=look)


def key(ax, y, entries):
    """What colours mean: [(x, fill, edge, meaning)]."""
    for x, fill, edge, meaning in entries:
        box(ax, x, y - 7, 13, 13, fill, edge, 2, 2)
        say(ax, x + 20, y, meaning, 8.5)


def save(page, assets, name):
    """Write a picture, sharp on fine screens, in 256 colours: a third of the size."""
    path = Path(assets) / f"{name}.png"
    with atomic_write(path) as temporary:
        page.savefig(temporary, dpi=160)
        drawn = Image.open(temporary).convert("RGB")
        drawn.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2).save(temporary, optimize=True)
    print(f"wrote {path}")


# ---------------------------------------------------------------- the method, laid out by hand

CELL, TOP = 22, 56  # side of a matrix element, upper edge of the matrices


def draw_mask(ax, x, mask, bounds, outlined):
    """The matrix [query, key] with its axes; chunk starts are the ticks."""
    side, edges = CELL * len(mask), np.arange(len(mask) + 1) * CELL
    image = torch.arange(len(mask)) < bounds[0][1]
    kind = mask * (1 + (image | image[:, None]).int())  # 0 hidden, 1 seen, 2 with the image in it
    shades = colors.ListedColormap([FAINT, MID_BLUE, MID_ORANGE])
    ax.pcolormesh(x + edges, TOP + edges, kind, cmap=shades, clim=(0, 2), ec="white", lw=1.3)
    for start, end in bounds:
        middle, span = (start + 0.5) * CELL, (end - start) * CELL
        say(ax, x + middle, TOP + side + 11, start, colour=GREY, ha="center")
        say(ax, x - 7, TOP + middle, start, colour=GREY, ha="right")
        if outlined:
            box(ax, x + start * CELL, TOP + start * CELL, span, span, "none", INK, 3)
    say(ax, x + side / 2, TOP + side + 28, "key frame (is seen)", colour=GREY, ha="center")
    say(ax, x - 30, TOP + side / 2, "query frame (sees)", colour=GREY, ha="center", rotation=90)


def masks(assets, _):
    """In use no frame can see later ones; the discriminator works in training, on whole clips."""
    cfg = Config()
    causal = block_causal_mask(cfg.frames, cfg.first, cfg.chunk)
    bounds = chunk_bounds(cfg.frames, cfg.first, cfg.chunk)
    side, every = CELL * cfg.frames, torch.ones_like(causal)
    page, ax = board(TOP + side + 82)
    for i, (name, what, mask) in enumerate([
            ("teacher", "bidirectional: sees the whole clip", every),
            ("student", "block-causal: its chunk and the past", causal),
            ("discriminator", "bidirectional: sees the whole clip", every)]):
        x = 54 + i * (side + 56)
        say(ax, x, 17, name, 11, weight="bold")
        say(ax, x, 38, what, 8.5, GREY)
        draw_mask(ax, x, mask, bounds, mask is causal)
    right, middle = x + side + 6, TOP + side / 2
    for end in (TOP + 1, TOP + side - 1):  # the two halves of a bracket
        arrow(ax, [(right, end), (right + 6, end), (right + 6, middle), (right + 22, middle)])
    box(ax, right + 22, middle - 20, 44, 40, PALE_ORANGE, INK)
    say(ax, right + 44, middle, "one\nlogit", ha="center", weight="bold")
    key(ax, TOP + side + 64, [
        (54, MID_ORANGE, "none", "the image's row and column"),
        (264, MID_BLUE, "none", "frames see each other"),
        (448, "none", INK, "a chunk, written at once"), (640, FAINT, "none", "hidden")])
    save(page, assets, "masks")


LEVELS = r",\,".join(f"{t:.2g}" for t in schedule(TrainConfig.ode_points, Config.shift))
DISTANCE = r"\|\,G(\epsilon, 1) - x_{\mathrm{end}}\,\|^2"
ANCHOR = rf"$+\;{RECIPES['toy'][2]['ode_anchor']:g}\;{DISTANCE}$"
RECIPE = [  # of every stage its networks, data and [(loss, formula)]
    (["teacher trained", "causal teacher trained"],
     "clips with captions, whole, or\nin chunks after a clean past",
     [("flow matching", r"$\|\,v(x_t, t) - (\epsilon - x_0)\,\|^2$"),
      ("where", r"$x_t = (1 - t)\,x_0 + t\,\epsilon$")]),
    (["student trained", "causal teacher frozen"],
     "the teacher's ODE paths, of\nchunks that follow real clips",
     [("regression to the path's end", r"$\|\,G(x_t, t) - x_{\mathrm{end}}\,\|^2$"),
      ("own level a chunk, clean past", rf"$t \in \{{{LEVELS}\}}$")]),
    (["student trained", "fake score trained", "real score frozen"], "the student's rollouts $x$",
     [("student moves against", r"$(x_{\mathrm{fake}} - x_{\mathrm{real}})\,/\,\mathrm{mean}"
       r"|x - x_{\mathrm{real}}|$"), ("anchor: a small regression", ANCHOR),
      ("fake score: flow matching", r"$\|\,v(x_t, t) - (\epsilon - x)\,\|^2$")]),
    (["student trained", "discriminator $D$ trained", "fake score trained",
      "real score frozen"],
     "rollouts $x$, and real clips\nof the same first frames",
     [("student", r"$\mathrm{softplus}(-D(x))$"),
      ("and against, as in stage 2", rf"${RECIPES['toy'][3]['dmd_weight']:g}\;"
       r"(x_{\mathrm{fake}} - x_{\mathrm{real}})\,/\,\mathrm{mean}|x - x_{\mathrm{real}}|$"),
      ("discriminator", r"$\mathrm{softplus}(-D(\mathrm{real}))$" "\n"
       r"$+\;\mathrm{softplus}(D(x)) + \lambda (R_1 + R_2)$")])]
COLUMN, GAP, FLOOR = 190, 43, 372  # width of a stage's box, space between two, lower edge


def draw_stage(ax, x, title, networks, data, losses):
    """One stage: what is trained, on what, by which loss."""
    box(ax, x, 8, COLUMN, FLOOR - 8, "white", RULE, 8)
    say(ax, x + 10, 26, title, 8.3, weight="bold")
    ax.plot([x, x + COLUMN], [43, 43], color=RULE, lw=1)
    for y, heading in ((57, "networks"), (167, "data"), (219, "loss")):
        say(ax, x + 10, y, heading, 7.5, GREY, weight="bold")
    for y, words in zip((66, 88, 110, 132), networks):
        name, state = words.rsplit(" ", 1)
        box(ax, x + 7, y, COLUMN - 14, 20, PALE_ORANGE if state == "trained" else PALE_BLUE)
        say(ax, x + 14, y + 10, name)
        say(ax, x + COLUMN - 14, y + 10, state, colour=GREY, ha="right")
    say(ax, x + 10, 177, data, va="top", linespacing=1.35)
    for y, (name, formula) in zip((237, 281, 325), losses):
        say(ax, x + 10, y, name, 7.5, GREY)
        say(ax, x + 10, y + 10, formula, 8.8, va="top", linespacing=1.2)


def draw_bus(ax, y, start, word, ends, colour):
    """What one stage hands to several others: a line below the boxes, an arrow up to each."""
    say(ax, start + 7, y - 10, word, 7.5, colour)
    for end, word in ends:
        arrow(ax, [(start, FLOOR), (start, y), (end, y), (end, FLOOR + 1)], colour)
        say(ax, end + 7, y - 10, word, 7.5, colour)


def recipe(assets, _):
    """Four stages, their networks, data and losses, and what each hands on."""
    page, ax = board(FLOOR + 60)
    left = [5 + i * (COLUMN + GAP) for i in range(4)]
    for x, title, stage in zip(left, STAGES, RECIPE):
        draw_stage(ax, x, title, *stage)
    for x, handed in zip(left[2:], (["student"], ["fake score", "student"])):
        arrow(ax, [(x - GAP + 3, 80), (x - GAP + 4, 80), (x - 3, 80)], width=2)
        for i, name in enumerate(handed):
            say(ax, x - GAP / 2, 69 - 12 * i, name, 6, ha="center")
    anchors = [(left[2] + 100, "for the anchor")]
    draw_bus(ax, FLOOR + 24, left[1] + 100, "ODE paths", anchors, ORANGE)
    starts = ["causal: the student's start", "real score, fake score's start",
              "real score, backbone's start"]
    starts = zip([x + 20 for x in left[1:]], starts)
    draw_bus(ax, FLOOR + 50, left[0] + 20, "the teachers' weights", starts, BLUE)
    save(page, assets, "recipe")


def cache(assets, _):
    """What a stream sees. Neither memory nor positions grow, however long it becomes."""
    cfg, chunks = Config(), 5
    bounds = chunk_bounds(cfg.first + chunks * cfg.chunk, cfg.first, cfg.chunk)
    world, kept = ToyWorld(32, bounds[-1][1], turns=0.2), KVCache(cfg.sink, cfg.window)
    frames = to_uint8(world.batch([HELD_OUT + 700_004])["video"][0])
    page, ax = board(chunks * 66 + 42)
    for y, (start, end) in zip(range(-56, 900, 66), bounds):
        positions = dict(zip([*kept.kept, *range(start, end)], kept.positions(end - start)[1]))
        for n in range(end if start else 0):  # the image itself is given
            x, seen, alpha = 150 + 46 * n, n in positions, 1 if n in positions else 0.2
            role = INK if n >= start else RULE if not seen else ORANGE if n < kept.sink else BLUE
            ax.imshow(frames[n], extent=(x, x + 40, y + 40, y), aspect="auto", alpha=alpha)
            box(ax, x - 1, y - 1, 42, 42, "none", role, 3, 2)
            say(ax, x + 4, y + 9, n, 6.5, "white" if seen else GREY)
            say(ax, x + 20, y + 49, positions.get(n, ""), 7, role, ha="center")
        say(ax, 10, y + 20, f"writes {start} to {end - 1}", 9, weight="bold")
        say(ax, 10, y + 49, "position in the cache", 7, GREY)
        kept.present = [[torch.zeros(1, end - start, 1, 1, 1)] * 2]  # what is in it does not matter
        kept.commit()
    key(ax, chunks * 66 + 26, [
        (150, "none", ORANGE, "sink: kept for ever"), (320, "none", BLUE, "window: latest frames"),
        (530, "none", INK, "the chunk that is written"), (735, "none", RULE, "forgotten")])
    save(page, assets, "cache")


# ---------------------------------------------------------------- what runs did

LONG = {"stage1": (STAGES[1], GREY), "stage2": (STAGES[2], BLUE), "stage3": (STAGES[3], ORANGE),
        "stage2-control": ("control: stage 2 goes on", MID_BLUE)}
NAMES = {(row.folder, row.steps): row.name for table in TABLES.values() for row in table}
PANELS = [  # (stage, title, keys, reference line)
    (0, "loss", ["loss"], None), (1, "loss", ["loss"], None),
    (2, "distance to real score", ["distance"], None),
    (2, "how far seeds differ", ["probe_spread"], None),
    (2, "motion (real clips: 1)", ["motion"], 1.0), (3, "pairs told apart", ["d_pairs"], 0.5),
    (3, "mean logits", ["d_real", "d_fake"], 0.0),
    (3, "how far seeds differ", ["probe_spread"], None)]


def curves(assets, folders):
    """What the logs say: raw numbers faint, their moving average over a twelfth bold."""
    page = Figure(figsize=(9, 4.2))
    for ax, (stage, title, keys, reference) in zip(page.subplots(2, 4).flat, PANELS):
        lines = read_text(Path(folders[0]) / f"stage{stage}" / "log.jsonl").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # not half a line
        require(rows, f"{folders[0]}: the log of stage {stage} is empty, wait for its first step")
        ax.axvspan(0, sum("grad" not in row for row in rows), color=FAINT, lw=0)
        if reference is not None:
            ax.axhline(reference, color=GREY, lw=1, ls=(0, (4, 3)))
        for name, colour in zip(keys, (BLUE, ORANGE)):
            numbers = [(r["step"], np.array(r.get(name), float)) for r in rows]  # null: NaN
            points = [(step, float(value)) for step, value in numbers if np.isfinite(value)]
            steps, values = np.array(points or [(0, np.nan)]).T
            kernel = np.ones(len(steps) // 12 | 1)
            mean = np.convolve(values, kernel, "same") / np.convolve(steps * 0 + 1, kernel, "same")
            ax.plot(steps, values, color=colour, alpha=0.3, lw=0.8)
            ax.plot(steps, mean, color=colour, lw=1.7, label=name)
        ax.set(yscale="log" if keys == ["loss"] else "linear", xlim=(0, len(rows)),
               ylim=(0, 1.2 * np.nanmax([0.1, *values])) if keys == ["probe_spread"] else None)
        ax.set_title(f"stage {stage}: {title}", loc="left")
        if len(keys) > 1:
            ax.legend(labelcolor="linecolor", handlelength=0)
    page.supxlabel("step; grey: the student does not move yet", color=GREY, size=8)
    save(page, assets, "curves")


def fan(assets, folders):
    """16 clips of an image. A loss that forgets futures draws one line where the world has many."""
    stages = [load_stage(Path(folders[0]) / f"stage{n}") for n in range(4)]
    world, settings = dataset(SimpleNamespace(**stages[0][2])), stages[0][2]
    require(not settings["data"] and settings["first"],
            f"{folders[0]} was not trained on the toy world's images, whose futures are known")
    clips = [held_out_ids(400, "report")[n] for n in (145, 278, 340)]  # start far from all walls
    images = to_uint8(world.batch(clips)["video"][:, 0])
    size, edge = world.size, world.size / 8  # nearer to an edge no shape's middle comes
    page = Figure(figsize=(9, 5.6))
    networks = zip(["the world", *STAGES], [(None, None, settings), *stages])
    for column, (title, network) in zip(page.subplots(len(clips), 5).T, networks):
        column[0].set_title(title)
        for ax, image, paths in zip(column, images, future_paths(*network, clips)):
            ax.imshow(image // 2 + 20, extent=(0, size, size, 0))
            ax.plot(*paths.permute(2, 1, 0), color="white", lw=0.8, alpha=0.75)
            ax.plot(*paths[:, -1].T, "o", ms=3.4, mfc="#ffb27a", mec="white", mew=0.5)
            ax.plot(*paths[:, 0].mean(0), "o", ms=5, mfc="none", mec="white")
            ax.set(xlim=(edge, size - edge), ylim=(size - edge, edge))
            ax.axis("off")
    save(page, assets, "fan")


def drift(assets, folders):
    """Mean over 32 clips and its standard error. A run stands for stages 1 to 3 and the control."""
    stages = []
    for run in map(Path, folders):
        done = [run / name for name in LONG if (run / name / "ema.safetensors").is_file()]
        stages += done or [run]
    page = Figure(figsize=(9, 5))
    top, foot = page.subfigures(2, 1, height_ratios=(3, 2))
    ax, places = top.subplots(), foot.subplots(1, len(stages) + 1)
    for place, stage in zip(places[1:], stages):
        net, codec, settings = load_stage(stage)
        first, length = settings["first"], settings["frames"] - settings["first"]
        require(settings["stage"] and first and not settings["data"],
                f"{stage} does not animate the toy world's images as a stream: name stages 1 to 3")
        clips = held_out_ids(32, "report")
        video, raws, world = make(net, codec, settings, clips, first + 10 * length, None)
        error = locate(world, states(raws), video)[0][:, first:].numpy()
        mean, half = error.mean(0), error.std(0) / len(error) ** 0.5
        title, colour = LONG.get(stage.name, (stage.name, None))
        line, = ax.plot(range(1, len(mean) + 1), mean, color=colour, lw=1.5, label=title)
        colour, steps = line.get_color(), line.get_xdata()
        ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        faces = to_uint8(F.pad(video[:4, [0, -1]], (1, 1, 1, 1), value=1.0))  # with a white rim
        faces = rearrange(faces, "(r k) n h w c -> n (r h) (k w) c", r=2)
        place.imshow(faces[1])
        place.set_title(f"{title}\nframe {len(mean)}", color=colour, size=7.5)
    places[0].imshow(faces[0])
    places[0].set_title("images\nframe 0", size=7.5)
    for place in places:
        place.axis("off")
    ax.axvline(length, color=GREY, lw=1, ls=(0, (4, 3)), label="length of a training clip")
    ax.set(xlabel="frame", ylabel="error", xlim=(1, len(mean)), ylim=(0, None))
    ax.legend(loc="upper left", bbox_to_anchor=(0.1, 1))
    save(page, assets, "drift")


def rows_of(out):
    """{(folder, passes): (error, energy)}, means over seeds; passes are () where as trained."""
    found, out = {row: [] for row in NAMES}, Path(out)
    reports = sorted(out.glob("seed*/*/scores-report*.json"))
    for path in reports or [*out.glob("seed*/*/metrics.json"), *out.glob("*/metrics.json")]:
        scores, passes = read_json(path), path.stem.partition("-steps")[2].replace("-", " ").split()
        passes = tuple(map(int, passes))
        if {"quality_error", "energy"} <= scores.keys():
            row = found.setdefault((path.parent.name, passes), [])
            row.append((scores["quality_error"], scores["energy"]))
    require(any(found.values()), f"{out} holds no scores with futures: name ablations.py's folder")
    return {row: np.mean(points, 0) for row, points in found.items() if points}


LABELS = {  # what front() names: (folder, passes) -> words, and where they stand, in points
    ("real", ()): ("real clips through the codec", 7, -2, "left"),
    ("stage0", ()): ("teacher", 7, -3, "left"),
    ("stage0-causal-teacher", ()): ("causal teacher", 7, -3, "left"),
    ("stage1", ()): ("stage 1", 7, -3, "left"),
    ("stage1-one-teacher", ()): ("stage 1, one teacher", 2, -11, "left"),
    ("stage1-consistency", ()): ("consistency", 0, 7, "right"),
    ("stage2", ()): ("stage 2", 3, 7, "left"),
    ("stage2-control", ()): ("+ 150 steps", -4, -12, "right"),
    ("stage2-minutes", ()): ("stage 2 + 360 steps", -6, -8, "right"),
    ("stage2-pure", ()): ("stage 2 without anchor", -2, 7, "right"),
    ("stage2-lowa0", ()): ("stage 2, low levels, no anchor", 7, -3, "left"),
    ("stage2-nocache", ()): ("stage 2, no cache gradient", 4, -11, "right"),
    ("stage2-one-teacher", ()): ("stage 2, one teacher", -7, -3, "right"),
    ("stage3-one-teacher", ()): ("stage 3, one teacher", -2, 7, "center"),
    ("stage2-causvid", (1,)): ("CausVid, 1 pass", 7, -3, "left"),
    ("stage3", ()): ("stage 3", 7, -6, "left"),
    ("stage3", (4,)): ("stage 3 at 4 passes", 4, 7, "right"),
    ("stage3-alone", ()): ("adversarial loss alone", 7, 1, "left"),
    ("stage3-framewise", ()): ("a logit a frame", 7, -2, "left"),
    ("stage3-causal", ()): ("causal discriminator", -8, -12, "left"),
    ("stage3-from1", ()): ("stage 3 from stage 1", 5, 7, "center"),
    ("stage3-hinge", ()): ("hinge loss", 7, 0, "left"),
    ("stage3-lambda0", ()): ("no R1, R2", 7, -3, "left")}


def front(assets, folders):
    """Two axes, and never one alone: error falls when futures are forgotten, energy does not. All
    rows, the best known named, and the crowd around the stages once more, enlarged."""
    rows = rows_of(folders[0])
    page = Figure(figsize=(9, 3.9))
    whole, near = page.subplots(1, 2)
    low, high = (0.0142, 0.035), (0.0211, 0.12)
    for ax in (whole, near):
        for row, point in rows.items():
            hue, named = hue_of(row), row in LABELS
            ax.plot(*point, "o", color=hue, ms=5.5 if named else 3, alpha=1 if named else 0.45)
            inside = all(low < point) and all(point < high)
            if named and inside == (ax is near):
                words, *spot, side = LABELS[row]
                ax.annotate(words, point, spot, ha=side, color=hue, size=7.5,
                            textcoords="offset points", zorder=5)
    whole.add_patch(patches.Rectangle(low, *np.subtract(high, low), fc="none", ec=GREY, lw=0.8))
    near.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title="the box, enlarged")
    seeds = ", ".join(sorted(folder.name[4:] for folder in Path(folders[0]).glob("seed*")))
    whole.set(ylabel="energy: do clips go where they might?", title=f"all rows, seed {seeds}")
    for ax in (whole, near):
        ax.set_xlabel("error: are frames true?")
    kinds = (INK, "real, teachers"), (GREY, "stage 1"), (BLUE, "DMD"), (ORANGE, "adversarial")
    marks = [Line2D([], [], ls="", marker="o", color=hue, label=kind) for hue, kind in kinds]
    page.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=7)
    save(page, assets, "front")
    numbered_rows(assets, rows)


def hue_of(row):
    """A stage's colour; black for real clips and teachers."""
    return LONG.get(row[0][:6], ("", INK))[1]


def numbered_rows(assets, rows):
    """The same points, every one with a number, and the rows beside it."""
    hues = [hue_of(row) for row in rows]
    names = {**{row: words for row, (words, *_) in LABELS.items()}, **NAMES}
    columns = 3 if len(rows) > 30 else 2
    page = Figure(figsize=(9, 4.5 + 0.14 * len(rows) / columns))
    points = np.array([*rows.values()])
    ax = page.subplots()
    students = sorted(tuple(point) for point, hue in zip(points, hues) if hue != INK)
    best = [p for i, p in enumerate(students) if all(p[1] < other[1] for other in students[:i])]
    ax.plot(*zip(*best), "o-", color=RULE, lw=4, ms=9, label="front: none beats these on both")
    for i, (row, point, hue) in enumerate(zip(rows, points, hues)):
        ax.plot(*point, "o", color=hue, ms=4, zorder=4, label=f"{i + 1}  {names.get(row, row[0])}")
    ax.set(xlabel="error: are frames true?", ylabel="energy: do clips go where they might?")
    page.legend(loc="outside lower left", ncols=columns, fontsize=6.5)
    page.draw_without_rendering()  # only now is it known where the points are
    taken = ax.transData.transform(points) @ (1, 1j) * 72 / page.dpi
    spots = np.outer((8, 13, 19, 26), np.exp(1j * np.pi * (0.25 + np.arange(16) / 8))).ravel()
    line = {"arrowstyle": "-", "lw": 0.3}
    for i, (point, hue) in enumerate(zip(points, hues)):
        space = abs(taken[i] + spots[:, None] - np.delete(taken, i)).min(1, initial=99)
        spot = spots[np.minimum(space, 9.5).argmax()]  # the nearest where its number is legible
        taken = np.append(taken, taken[i] + spot)
        ax.annotate(i + 1, point, (spot.real, spot.imag), textcoords="offset points", color=hue,
                    size=7, ha="center", va="center", arrowprops=line)
    save(page, assets, "front-rows")


def family(assets, folders):
    """The last frames of the same ten clips, from every relative that a run holds; a GIF each."""
    run, rows = Path(folders[0]), []
    own = [run / f"stage{n}-{name}" for name, stages in FAMILY["toy"].items() for n in stages if n]
    own = [run / "stage1", run / "stage2", run / "stage3", *own]
    for stage in [folder for folder in own if (folder / "ema.safetensors").is_file()]:
        net, codec, settings = load_stage(stage)
        clips = held_out_ids(10, "report")
        video, raws, _ = make(net, codec, settings, clips, settings["frames"], None)
        if not rows:
            rows.append(("real", torch.cat([raw["video"] for raw in raws])))
        rows.append((stage.name.removeprefix("stage"), video))
        if "-" in stage.name:
            path = Path(assets) / f"family-{stage.name.partition('-')[2]}.gif"
            with video_writer(path, zoom=2) as write:
                write(rearrange(video, "k f c h w -> f c h (k w)"))
            print(f"wrote {path}")
    require(rows, f"{run} holds no finished stage: train a recipe first")
    page = Figure(figsize=(9, 0.75 * len(rows)))
    for ax, (name, video) in zip(page.subplots(len(rows), 1), rows):
        ax.imshow(to_uint8(rearrange(video[:, -1], "k c h w -> c h (k w)")[None, None])[0, 0])
        ax.set_ylabel(name, rotation=0, ha="right", va="center", color=INK, size=7.5)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    save(page, assets, "family")


def gifs(assets, folders):
    """The samples that training left in stageN, as stageN.gif and stageN.png."""
    sources = sorted(Path(folders[0]).glob("stage[0-3]/samples.*"))
    require(len(sources) == 8, f"{folders[0]} lacks samples: finish all stages, or name another")
    for source in sources:
        target = Path(assets) / f"{source.parent.name}{source.suffix}"
        with atomic_write(target) as temporary:
            temporary.write_bytes(source.read_bytes())
        print(f"wrote {target}")


def example(assets, _):
    """The first frame of a toy clip that is not trained on, drawn large."""
    path = Path(assets) / "example.png"
    frame = to_uint8(ToyWorld(128, 1).batch([HELD_OUT + 700_000])["video"][0, 0])
    with atomic_write(path) as temporary:
        Image.fromarray(frame).save(temporary)
    print(f"wrote {path}")


FIGURES = {f.__name__: f for f in (masks, recipe, cache, example, curves, fan, drift, front, family,
                                 gifs)}


def main(argv=None):
    """Draw the picture asked for, or all that can be drawn."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=[*FIGURES, "all"], help="picture to make")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, such as out/toy")
    parser.add_argument("--assets", default=HERE / "assets", help="folder to write to")
    args = parser.parse_args(argv)
    for run in args.runs:
        require(Path(run).is_dir(), f"{run} is not a folder: name that of a run, such as out/toy")
    for name in FIGURES if args.what == "all" else [args.what]:
        try:
            require(matplotlib or name in ("example", "gifs"),
                    f"{name} is drawn with matplotlib: pip install -r requirements-figures.txt")
            require(args.runs or name in ("masks", "recipe", "cache", "example"),
                    f"{name} needs a run: python experiments/figures.py {name} out/toy")
            FIGURES[name](args.assets, args.runs)
        except UsageError as error:
            if args.what != "all":
                raise
            print(f"left out {name}: {error}")


if __name__ == "__main__":
    with friendly_errors():
        main()
