"""The README's pictures, made into assets/.

    python experiments/figures.py masks                who sees whom: teacher, student, critics       masks.png
    python experiments/figures.py recipe               the four stages and what they hand on          recipe.png
    python experiments/figures.py example              a first frame for sample.py --image            example.png
    python experiments/figures.py curves out/toy       training curves of a run, from its logs        curves.png
    python experiments/figures.py gifs out/toy         the samples of every stage, copied             stageN.gif, stageN.png
    python experiments/figures.py all out/toy          all of these

Lengths are in pixels of the finished picture, which is drawn at twice its size and scaled down for smooth edges. Pillow's
own font has ASCII letters only: x_{t} and x^{2} stand for what is set lower and higher.
"""
import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import HELD_OUT, Flags, ToyWorld, explain, to_uint8, written_whole
from model import Config, UsageError, block_causal_mask, chunk_bounds, require

INK, GREY, RULE, FAINT, WHITE = "#262b33", "#666e79", "#c9ced6", "#eceff3", "#ffffff"
BLUE, ORANGE, PALE_BLUE, PALE_ORANGE = "#7ba4cf", "#f0a34f", "#dbe7f4", "#fbe0bd"
CURVES = [("#2f6db0", "#c0d3e8"), ("#cf5f2e", "#f1cfc0")]  # (smoothed, raw)
STAGES = ["stage 0: teacher", "stage I: ODE initialisation", "stage II: DMD warm-up", "stage III: adversarial"]


# ---------------------------------------------------------------- a canvas

font = functools.cache(lambda size: ImageFont.load_default(size=size))


class Canvas:
    """A white picture and the few shapes that the figures need."""

    def __init__(self, width, height, scale=2):
        self.scale, self.size = scale, (width, height)
        self.image = Image.new("RGB", (width * scale, height * scale), WHITE)
        self.draw = ImageDraw.Draw(self.image)

    def up(self, *values):
        return [round(v * self.scale) for v in values]

    def text(self, x, y, text, size=18, colour=INK, align="l", bold=False):
        """One line around the height y that starts (l), is centred (m) or ends (r) at x."""
        parts = [(p[0], p[2:-1]) if p[:2] in ("_{", "^{") else ("", p) for p in re.split(r"([_^]\{.*?\})", text)]
        fonts = [font(round(size * self.scale * (0.72 if kind else 1))) for kind, _ in parts]
        widths = [f.getlength(part) / self.scale + 0.08 * size * bool(kind) for f, (kind, part) in zip(fonts, parts)]
        x -= {"l": 0, "m": 0.5, "r": 1}[align] * sum(widths)
        for (kind, part), f, width in zip(parts, fonts, widths):
            base = y + size * {"": 0.35, "_": 0.53, "^": 0}[kind]
            self.draw.text(self.up(x, base), part, colour, f, anchor="ls", stroke_width=self.scale // 2 if bold else 0)
            x += width

    def upright(self, x, y, text, size, colour):
        """One line that reads upwards, centred at (x, y)."""
        label = Canvas(round(font(size).getlength(text)) + 8, 2 * size, self.scale)
        label.text(label.size[0] / 2, size, text, size, colour, "m")
        self.image.paste(label.image.rotate(90, expand=True), self.up(x - size, y - label.size[0] / 2))

    def box(self, x0, y0, x1, y1, fill=None, outline=None, width=1, radius=0):
        self.draw.rounded_rectangle(self.up(x0, y0, x1, y1), radius * self.scale, fill, outline, round(width * self.scale))

    def line(self, points, colour=INK, width=1.0):
        self.draw.line([tuple(self.up(*p)) for p in points], colour, round(width * self.scale), joint="curve")

    def arrow(self, points, colour=INK, width=2.0, head=9):
        """A line along `points` with a head at its end; the last part must be level or upright."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = head * np.sign(x - x0), head * np.sign(y - y0)
        self.line([*points[:-1], (x - dx, y - dy)], colour, width)
        wings = [(x - dx + s * dy, y - dy + s * dx) for s in (-0.6, 0.6)]
        self.draw.polygon([tuple(self.up(*p)) for p in ((x, y), *wings)], colour)

    def save(self, path):
        with written_whole(path) as temporary:
            self.image.resize(self.size, Image.Resampling.LANCZOS).save(temporary, optimize=True)
        print(f"wrote {path}")


# ---------------------------------------------------------------- who sees whom

def draw_mask(canvas, x, y, cell, mask, bounds, outlined):
    """The matrix [query, key] with its axes; chunk starts are the ticks."""
    side, image = cell * len(mask), bounds[0][1]
    for q, row in enumerate(mask.tolist()):
        for k, seen in enumerate(row):
            colour = FAINT if not seen else BLUE if min(q, k) >= image else ORANGE
            canvas.box(x + k * cell + 1, y + q * cell + 1, x + (k + 1) * cell - 1, y + (q + 1) * cell - 1, colour, radius=3)
    for start, end in bounds:
        canvas.text(x + (start + 0.5) * cell, y + side + 14, str(start), 16, GREY, "m")
        canvas.text(x - 9, y + (start + 0.5) * cell, str(start), 16, GREY, "r")
        if outlined:
            canvas.box(x + start * cell - 1, y + start * cell - 1, x + end * cell + 1, y + end * cell + 1, None, INK, 2, 4)
    canvas.text(x + side / 2, y + side + 38, "key frame (is seen)", 17, GREY, "m")
    canvas.upright(x - 48, y + side / 2, "query frame (sees)", 17, GREY)


def masks(assets, run=None):
    """masks.png: one network, two visibilities."""
    cfg, top, left = Config(), 86, 80
    cell = 290 // cfg.frames  # of room for the words above
    causal, bounds = block_causal_mask(cfg.frames, cfg.first, cfg.chunk), chunk_bounds(cfg.frames, cfg.first, cfg.chunk)
    side = cell * cfg.frames
    canvas = Canvas(left + 3 * (side + 106) + 20, top + side + 112)
    for i, (name, what, mask) in enumerate([("teacher", "bidirectional: sees the whole clip", torch.ones_like(causal)),
                                            ("student", "block-causal: its own chunk and the past", causal),
                                            ("critics", "bidirectional: judge the whole clip", torch.ones_like(causal))]):
        x = left + i * (side + 106)
        canvas.text(x, 26, name, 25, bold=True)
        canvas.text(x, 57, what, 18, GREY)
        draw_mask(canvas, x, top, cell, mask, bounds, outlined=mask is causal)
    right, middle = x + side + 8, top + side / 2
    canvas.line([(right, top + 2), (right + 9, top + 2), (right + 9, top + side - 2), (right, top + side - 2)], INK, 2)
    canvas.arrow([(right + 9, middle), (right + 34, middle)])
    canvas.box(right + 36, middle - 34, right + 104, middle + 34, PALE_ORANGE, INK, 2, 10)
    for dy, word in ((-11, "one"), (11, "logit")):
        canvas.text(right + 70, middle + dy, word, 18, align="m", bold=True)
    canvas.text(right + 104, middle + 54, "discriminator", 15, GREY, "r")
    x, y = left, top + side + 84
    for fill, outline, text in ((ORANGE, None, "the image frame sees, or is seen"), (BLUE, None, "other frames see each other"),
                                (FAINT, None, "hidden"), (WHITE, INK, "a chunk, written at once")):
        canvas.box(x, y - 9, x + 18, y + 9, fill, outline, 2, 3)
        canvas.text(x + 28, y, text, 18)
        x += 78 + font(18).getlength(text)
    canvas.save(assets / "masks.png")


# ---------------------------------------------------------------- the recipe

RECIPE = [  # a stage's [(network, what happens to it)], data, [(loss, formula)]
    ([("teacher", "trained")], ["real clips and captions"],
     [("flow matching", "|| v(x_{t}, t) - (eps - x_{0}) ||^{2}"), ("where", "x_{t} = (1 - t) x_{0} + t eps")]),
    ([("student", "trained"), ("teacher, draws the paths", "frozen")],
     ["the teacher's ODE paths from", "first frames and captions"],
     [("regression, a noise level per chunk", "|| G(x_{t}, t) - x_{end} ||^{2}"),
      ("where", "x_{end} ends the path through x_{t}")]),
    ([("student", "trained"), ("fake score", "trained"), ("real score = teacher", "frozen")],
     ["the student's own rollouts x from", "first frames and captions"],
     [("student moves against", "(x_{fake} - x_{real}) / mean|x - x_{real}|"), ("fake score", "flow matching on x")]),
    ([("student", "trained"), ("discriminator's heads", "trained"), ("its backbone", "frozen *")],
     ["the student's own rollouts x, and", "real clips with the same first frame"],
     [("student", "softplus(-D(x))"), ("discriminator; plus R1 and R2", "softplus(-D(real)) + softplus(D(x))")]),
]
HANDED_ON = [["weights", "and", "ODE paths"], ["student's", "weights"], ["student's", "weights"]]


def draw_stage(canvas, x, width, title, networks, data, losses):
    """One box of the recipe, from y = 20 to 480."""
    canvas.box(x, 20, x + width, 480, WHITE, RULE, 2, 12)
    canvas.line([(x + 1, 72), (x + width - 1, 72)], RULE, 1.5)
    canvas.text(x + 16, 47, title, 22, bold=True)
    for y, caption in ((94, "networks"), (250, "data"), (340, "loss")):
        canvas.text(x + 16, y, caption, 15, GREY, bold=True)
    for i, (name, state) in enumerate(networks):
        y = 110 + i * 38
        canvas.box(x + 12, y, x + width - 12, y + 32, PALE_ORANGE if state == "trained" else PALE_BLUE, radius=7)
        canvas.text(x + 22, y + 16, name, 17)
        canvas.text(x + width - 22, y + 16, state, 16, GREY, "r")
    for i, line in enumerate(data):
        canvas.text(x + 16, 275 + i * 24, line)
    for i, (name, formula) in enumerate(losses):
        canvas.text(x + 16, 365 + i * 56, name, 16, GREY)
        canvas.text(x + 16, 389 + i * 56, formula)


def recipe(assets, run=None):
    """recipe.png: four stages, their networks, data and losses, and what each hands on."""
    width, gap, left, bus, blue = 316, 98, 20, 516, CURVES[0][0]
    canvas = Canvas(2 * left + 4 * width + 3 * gap, 596)
    xs = [left + i * (width + gap) for i in range(4)]
    for x, title, stage in zip(xs, STAGES, RECIPE):
        draw_stage(canvas, x, width, title, *stage)
    for x, lines in zip(xs, HANDED_ON):
        canvas.arrow([(x + width + 8, 160), (x + width + gap - 8, 160)], INK, 3, 12)
        for i, line in enumerate(lines):
            canvas.text(x + width + gap / 2, 160 - 20 * (len(lines) - i), line, 16, align="m")
    start = xs[0] + width / 2
    canvas.text(start + 12, bus + 20, "the teacher's weights", colour=blue)
    for x, text in ((xs[2], "the real score, and the fake score's start"), (xs[3], "the discriminator's backbone")):
        end = x + width / 2
        canvas.arrow([(start, 482), (start, bus), (end, bus), (end, 484)], blue, 2.5, 12)
        canvas.text(end, bus + 20, text, 18, blue, "m")
    note = "* at preset toy, which also keeps stage II's term; trained at the Wan presets, as in the paper"
    canvas.text(xs[3] + width, 576, note, 16, GREY, "r")
    canvas.save(assets / "recipe.png")


# ---------------------------------------------------------------- training curves

PLOTS = [  # (stage, title, keys, logarithmic, reference line)
    (0, "flow matching loss", ["loss"], True, None), (0, "gradient norm", ["grad"], True, None),
    (1, "regression loss", ["loss"], True, None), (1, "gradient norm", ["grad"], True, None),
    (2, "distance to the real score's x_{0}", ["distance"], False, None), (2, "fake score's loss", ["fake_loss"], True, None),
    (2, "motion, real clips = 1", ["motion"], False, 1.0), (2, "gradient norm", ["grad"], True, None),
    (3, "mean logits: ", ["d_real", "d_fake"], False, 0.0), (3, "pairs judged right, chance = 0.5", ["d_pairs"], False, 0.5),
    (3, "motion, real clips = 1", ["motion"], False, 1.0), (3, "gradient norm", ["grad"], True, None),
]


def read_log(run, stage):
    """A stage's log as a list of dicts, a step each."""
    path = Path(run) / f"stage{stage}" / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        raise UsageError(f"{path} is missing or damaged: train stage {stage}, or name the folder of another run") from None


def smooth(y):
    """Centred moving average over a twelfth of the curve, shorter at its ends."""
    kernel = np.ones(len(y) // 12 | 1)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def ticks(low, high, logarithmic=False):
    """A few round numbers between low and high."""
    for digits in ((1,), (1, 3), (1, 2, 5)) if logarithmic else ():
        values = [d * 10.0 ** e for e in range(-9, 10) for d in digits if low <= d * 10.0 ** e <= high]
        if len(values) >= 3:
            return values[::math.ceil(len(values) / 5)]
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if 5 * m * unit >= high - low)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_plot(canvas, x, y, width, height, rows, title, keys, logarithmic, reference):
    """Lines over training steps, the raw numbers faint behind the smoothed ones."""
    lines = [np.array([(r["step"], r[k]) for r in rows if math.isfinite(r.get(k, math.nan))]).reshape(-1, 2).T for k in keys]
    canvas.text(x, y - 15, title + "  (log)" * logarithmic, 16)
    canvas.box(x, y, x + width, y + height, None, RULE)
    if not all(line.size for line in lines):
        canvas.text(x + width / 2, y + height / 2, "not logged", 16, GREY, "m")
        return
    scale, back = (lambda v: np.log(np.maximum(v, 1e-9)), np.exp) if logarithmic else (np.asarray, np.asarray)
    ends = [q for _, values in lines for q in np.percentile(values, (0.5, 99.5))]  # rare spikes are cut off
    ends = scale(ends if reference is None else [*ends, reference])
    pad, last = 0.06 * np.ptp(ends) or 0.1, max(rows[-1]["step"], 2)
    low, high = min(ends) - pad, max(ends) + pad
    to_x = lambda step: x + width * (step - 1) / (last - 1)
    to_y = lambda v: y + height * (high - np.clip(scale(v), low, high)) / (high - low)
    for v in ticks(back(low), back(high), logarithmic):
        canvas.line([(x + 1, to_y(v)), (x + width - 1, to_y(v))], FAINT)
        canvas.text(x - 7, to_y(v), f"{v:.6g}", 14, GREY, "r")
    canvas.text(x, y + height + 13, "step", 14, GREY)
    for step in ticks(0, last):
        if step == int(step) and to_x(step) > x + 50:
            canvas.text(to_x(step), y + height + 13, f"{step:.0f}", 14, GREY, "m")
    if reference is not None:
        canvas.line([(x, to_y(reference)), (x + width, to_y(reference))], GREY, 1.5)
    for (_, faint), (steps, values) in zip(CURVES, lines):
        canvas.line([*zip(to_x(steps), to_y(values))], faint)
    for i, (key, (colour, _), (steps, values)) in enumerate(zip(keys, CURVES, lines)):
        canvas.line([*zip(to_x(steps), to_y(smooth(values)))], colour, 2.5)
        if len(keys) > 1:
            canvas.text(x + 98 + 62 * i, y - 15, key, 16, colour, bold=True)


def curves(assets, run):
    """curves.png: what the logs of all four stages say."""
    logs, done, pitch_x, pitch_y = [read_log(run, stage) for stage in range(4)], set(), 350, 258
    canvas = Canvas(4 * pitch_x + 20, math.ceil(len(PLOTS) / 4) * pitch_y + 8)
    for i, (stage, *plot) in enumerate(PLOTS):
        x, y = 72 + i % 4 * pitch_x, i // 4 * pitch_y
        if stage not in done:
            canvas.text(x, y + 24, STAGES[stage], 21, bold=True)
        done.add(stage)
        draw_plot(canvas, x, y + 72, 272, 146, logs[stage], *plot)
    canvas.save(assets / "curves.png")


# ---------------------------------------------------------------- samples, and the command

def gifs(assets, run):
    """stageN.gif and stageN.png: the samples that training left; all must be there before one is copied."""
    names = [(Path(run) / f"stage{n}" / f"samples.{end}", assets / f"stage{n}.{end}") for n in range(4) for end in ("gif", "png")]
    for source, _ in names:
        require(source.is_file(), f"{source} does not exist: finish that stage first, or name the folder of another run")
    for source, target in names:
        with written_whole(target) as temporary:
            shutil.copyfile(source, temporary)
        print(f"wrote {target}")


def example(assets, run=None):
    """A picture to animate: the first frame of a toy clip that is not trained on, drawn large."""
    world = ToyWorld(128, 1)
    frame = to_uint8(world.batch([HELD_OUT + 700_000])["video"][0, 0])
    with written_whole(assets / "example.png") as temporary:
        Image.fromarray(frame).save(temporary)


def main(argv=None):
    """Draw the pictures asked for."""
    figures = {"masks": masks, "example": example, "recipe": recipe, "curves": curves, "gifs": gifs}
    parser = Flags(__doc__)
    parser.add_argument("what", choices=[*figures, "all"], help="picture to make")
    parser.add_argument("run", nargs="?", help="folder of a run, such as out/toy; for curves, gifs and all")
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parents[1] / "assets", help="folder to write to")
    args = parser.parse_args(argv)
    require(args.run or args.what in ("masks", "example", "recipe"), f"{args.what} needs the folder of a run: python experiments/figures.py {args.what} out/toy")
    for name in figures if args.what == "all" else [args.what]:
        figures[name](args.assets, args.run)


if __name__ == "__main__":
    with explain():
        main()
