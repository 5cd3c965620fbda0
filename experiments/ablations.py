"""The tables of docs/results.md: the recipe, its controls and one change at a time, over several
training seeds.

    python experiments/ablations.py --table stages --seeds 0 1 2   train what is missing, print it
    python experiments/ablations.py --table parts                  another table of the same runs
    python experiments/ablations.py --table parts --print          print what is there

A row is one training run of a stage, in <out>/seedN/stageN-TAG, and its scores on the held-out
clips that no setting was chosen by (--held-out report). A row is printed as soon as it is known.
Rows that several tables share are trained once; give the same command again and it goes on where it
was stopped.

    stages          real clips, teacher, stages 1 to 3, controls, 2 and 4 passes, without anchor
    context         stage 1 on real, clean or noisy earlier chunks, and what follows
    parts           terms of stages 2 and 3, cache gradient, low noise levels
    discriminators  causal or bidirectional, a logit a clip or a frame (the paper's table 3)
    lambda          the weight of R1 and R2 (figure 9)
    warmup          stage 3 from stage 1 and from stage 2 (table 2)
    noise           the levels at which the discriminator looks
    backbone        its backbone's learning rate
    steps           how long stages 2 and 3 are trained
    family          AAD-1's relatives at 1, 2 and 4 passes, also with 4 passes for the first chunk
"""

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import torch

from data import HELD_OUT_SETS
from sample import generate_chunks, load_stage, per_chunk
from utils.errors import UsageError, friendly_errors, require
from utils.files import read_json, write_json
from utils.settings import Parser


@dataclass
class Row:
    """One line of a table: a stage trained with some flags, scored at some number of passes."""

    name: str  # what the table calls it
    folder: str  # stageN or stageN-TAG, or "real"
    flags: str = ""  # of train.py, beside --stage and --tag; {out} is the folder of the seed
    after: str = ""  # the row's folder that must be finished before this one starts
    steps: tuple = ()  # network passes a chunk at scoring; (): as trained


REAL = Row("real clips through the codec", "real")
TEACHER = Row("teacher, 8 passes a clip", "stage0")
CAUSAL = Row("causal teacher, 8 passes a chunk", "stage0-causal-teacher",
             "--recipe causal-teacher", "stage0")
STAGE1 = Row("stage 1", "stage1", after="stage0-causal-teacher")
STAGE2 = Row("stage 2", "stage2", after="stage1")
STAGE3 = Row("stage 3", "stage3", after="stage2")
RECIPE = [REAL, TEACHER, CAUSAL, STAGE1, STAGE2, STAGE3]
ON = "--student-start 0 --stop-spread 0 --init {out}/stage2"
CONTROL = Row("control: stage 2 trained on, as many steps", "stage2-control", f"--iters 150 {ON}",
              "stage2")
# in default runs on two cores stage 3 takes as long as 322 to 357 steps of stage 2
LONGER = Row("control: stage 2 trained on, as many minutes", "stage2-minutes", f"--iters 360 {ON}",
             "stage2")
LONGEST = Row("stage 2 trained on, 480 steps", "stage2-longer", f"--iters 480 {ON}", "stage2")
PURE2 = Row("stage 2 without anchor", "stage2-pure", "--ode-anchor 0", "stage1")
ALONE = Row("stage 3, the adversarial loss alone", "stage3-alone",
            "--dmd-weight 0", "stage2")


def started(context, flags=""):
    """The recipe from a stage 1 whose chunks saw something else of earlier ones."""
    one, two, start = f"stage1-{context}", f"stage2-{context}", f"from {context} context"
    return [Row(f"stage 1, {context} context", one, f"--ode-context {context} {flags}", "stage0"),
            Row(f"stage 2 {start}", two, f"--init {{out}}/{one}", one),
            Row(f"stage 3 {start}", f"stage3-{context}", f"--init {{out}}/{two}", two),
            Row(f"control {start}", f"{two}-control", f"--iters 150 {ON}-{context}", two)]


PUBLISHED = [Row(f"stage {n} as published", f"stage{n}-published", "--recipe published",
                 f"stage{n - 1}-published" if n > 1 else "stage0") for n in (1, 2, 3)]
FROM1 = Row("stage 3 from stage 1", "stage3-from1", "--init {out}/stage1", "stage1")


def stage3(name, tag, flags):
    """Stage 3 with something changed."""
    return Row(name, f"stage3-{tag}", flags, "stage2")


def relative(recipe, *passes, stage=2, after="stage1", tag="", flags="", name=""):
    """A relative of AAD-1 as it was trained, and at other numbers of passes."""
    folder = f"stage{stage}-{tag or recipe}"
    flags, name = f"--recipe {recipe} {flags}", name or recipe
    return [Row(name, folder, flags, after),
            *(Row(f"{name}, at {' '.join(map(str, steps))}", folder, flags, folder, steps)
              for steps in passes)]


PARTS = [  # of stages 2 and 3, one change at a time
    *(Row(f"stage 2, {name}", f"stage2-{tag}", flags, "stage1") for name, tag, flags in (
        ("no gradient through the cache", "nocache", "--no-cache-grad"),
        ("low levels (shift 0.3)", "low", "--score-shift 0.3 --stop-spread 0"),
        ("low levels, no anchor", "lowa0", "--score-shift 0.3 --ode-anchor 0 --stop-spread 0"),
        ("guidance 1.25", "guided", "--guidance 1.25"),
        ("differences of frames too (weight 4)", "flow", "--dmd-diff-weight 4"))),
    stage3("stage 3, stage 2's anchor in place of DMD", "anchored",
           "--dmd-weight 0 --ode-anchor 0.5"),
    stage3("stage 3, gradient through the cache", "cache", "--cache-grad"),
    ALONE]
FIRST = (4, 1), (4, 2)  # First-Frame Enhancement
STARTS = [  # the rows of the family that others start from
    started("clean")[0],
    Row("stage 1, one teacher", "stage1-one-teacher",
        "--init {out}/stage0 --teacher {out}/stage0", "stage0"),
    # the teacher continues chunks of three frames, so a frame at a time is learnt from whole clips
    Row("stage 1, frame by frame", "stage1-frame", "--chunk 1 --ode-context clean", "stage0"),
]
ONE_TEACHER = [  # AAD-1 from a stage 1 whose teacher learnt both tasks at once
    Row("stage 2, one teacher", "stage2-one-teacher", "--init {out}/stage1-one-teacher",
        "stage1-one-teacher"),
    Row("stage 3, one teacher", "stage3-one-teacher", "--init {out}/stage2-one-teacher",
        "stage2-one-teacher"),
    Row("control, one teacher", "stage2-one-teacher-control",
        f"--iters 150 {ON}-one-teacher", "stage2-one-teacher"),
]
FRAMES = "--chunk 1 --grad-chunks 7 --no-cache-grad"  # with that gradient it collapses
FAMILY = [
    *RECIPE, *STARTS,
    Row("stage 1, consistency", "stage1-consistency", "--recipe consistency",
        "stage0-causal-teacher"),
    Row("stage 2, at 4 1", "stage2", after="stage2", steps=(4, 1)),
    Row("stage 3, at 4 1", "stage3", after="stage3", steps=(4, 1)),
    *ONE_TEACHER, PURE2, Row("stage 2 without anchor, at 4 1", "stage2-pure", "--ode-anchor 0",
               "stage2-pure", (4, 1)),
    *relative("self-forcing", (1,), (2,), *FIRST),
    *relative("self-forcing", tag="self-forcing-nocache", flags="--no-cache-grad",
              name="self-forcing, no gradient through the cache"),
    *relative("causvid", (1,), (2,), *FIRST),
    *relative("one-forcing", (4, 1)),
    *relative("one-forcing", (4, 1), after="stage1-clean", tag="one-forcing-clean",
              flags="--init {out}/stage1-clean", name="one-forcing, start of whole clips"),
    *relative("one-forcing", (4, 1), tag="one-forcing-frame-chunks", flags=FRAMES,
              name="one-forcing, frame by frame"),
    *relative("one-forcing", (4, 1), after="stage1-frame", tag="one-forcing-frame",
              flags=f"--init {{out}}/stage1-frame {FRAMES}",
              name="one-forcing, frame by frame, start frame by frame"),
    *relative("asd", (1,), (2,), *FIRST), *relative("diagonal", (1,)),
    *relative("no-context", name="no context pass, stage 2"),
    *relative("no-context", (4, 1), stage=3, after="stage2-no-context",
              name="no context pass, stage 3"),
]
TABLES = {
    "stages": [
        *RECIPE, CONTROL, LONGER, LONGEST,
        Row("stage 3 at 2 passes", "stage3", after="stage3", steps=(2,)),
        Row("stage 3 at 4 passes", "stage3", after="stage3", steps=(4,)),
        PURE2, ALONE],
    "context": [*RECIPE, CONTROL, *started("clean"),
                *started("noisy", "--ode-point-weights 0.4 0.1 0.1 0.1 0.3"), *PUBLISHED],
    "parts": [*RECIPE, PURE2, *PARTS],
    "discriminators": [
        *RECIPE, ALONE,
        stage3("bidirectional, a logit a frame", "framewise", "--disc-granularity frame"),
        stage3("causal, a logit a clip", "causal", "--disc-causal"),
        stage3("causal, a logit a frame", "causal-framewise",
               "--disc-causal --disc-granularity frame")],
    "lambda": [
        *RECIPE,
        *(stage3(f"lambda {weight}", f"lambda{weight}", f"--r1r2-weight {weight}")
          for weight in (0, 5, 60, 200))],
    "warmup": [*RECIPE, FROM1],
    "noise": [
        *RECIPE,
        stage3("U[0, 0.3]", "noise-03", "--gan-t-max 0.3"),
        stage3("all levels, U[0, 1]", "noise-all", "--gan-t-max 1"),
        stage3("high levels (shift 3)", "noise-high", "--gan-t-max 1 --gan-shift 3"),
        stage3("lower levels (shift 0.5)", "noise-low", "--gan-t-max 1 --gan-shift 0.5"),
        stage3("no noise", "noise-none", "--gan-t-max 0")],
    "backbone": [
        *RECIPE,
        stage3("backbone frozen", "backbone0", "--backbone-lr 0"),
        *(stage3(f"backbone at {rate}", f"backbone{rate}", f"--backbone-lr {rate}")
          for rate in ("1e-4", "1e-3"))],
    "steps": [
        *RECIPE,
        *(Row(f"stage 2, {n} steps, no anchor", f"stage2-steps{n}",
              f"--ode-anchor 0 --iters {n + 20} --stop-spread 0", "stage1")
          for n in (50, 100, 200, 600)),
        *(stage3(f"stage 3, {n} steps", f"steps{n}", f"--iters {n + 120}")
          for n in (50, 100, 400))],
    "family": FAMILY,
}
COLUMNS = {  # a score -> its heading
    "quality_error": "error", "last_error": "last", "energy": "energy", "spread": "spread",
    "seam": "seam", "drift": "drift", "long_error": "long", "ghosts": "ghosts", "jitter": "jitter",
    "displacement": "displ.", "dynamic_degree": "dynamic", "caption_agreement": "caption",
    "subject_consistency": "subject", "i2v_subject": "i2v subject", "minutes": "minutes",
    "passes": "passes a chunk", "rate": "frames/s"}
RATIOS = ("quality_error last_error jitter subject_consistency i2v_subject displacement drift "
          "long_error energy spread").split()


# ---------------------------------------------------------------- one row


def scores_path(out, seed, row, which):
    """Where the scores of a row are kept."""
    passes = "-steps" + "-".join(map(str, row.steps)) if row.steps else ""
    return Path(out) / f"seed{seed}" / row.folder / f"scores-{which}{passes}.json"


def run(command, folder, threads):
    """Run one of our programs, its words to output.log. UsageError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.log", "a") as log:
        done = subprocess.run([sys.executable, *command], stdout=log,
                              stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    require(done.returncode == 0,
            f"{' '.join(command[1:])} failed: see the end of {folder / 'output.log'}, and give the "
            "same command again")


def finish(row, seed, args, extra):
    """Train and score a row of one seed unless that has been done; its scores."""
    folder = Path(args.out) / f"seed{seed}"
    path = scores_path(args.out, seed, row, args.held_out)
    threads = 1 if args.jobs > 1 else os.cpu_count()
    if path.is_file():
        return read_json(path)
    if row.folder != "real":
        stage, _, tag = row.folder.removeprefix("stage").partition("-")
        named = ["--tag", tag] if tag else []
        run([str(HERE / "train.py"), "--stage", stage, "--out", str(folder), "--seed", str(seed),
             "--eval-clips", "0", *named, *row.flags.format(out=folder).split(), *extra],
            folder, threads)
    run([str(HERE / "experiments" / "ablations.py"), "--score", str(path),
         "--clips", str(args.clips), "--held-out", args.held_out, "--steps", *map(str, row.steps)],
        folder, threads)
    return read_json(path)


def score(path, number, which, steps):
    """The scores of one row, written to `path` in its stage's folder."""
    from experiments import evaluate

    folder = path.parent
    if folder.name == "real":
        return write_json(path, evaluate.real_scores(folder.parent / "stage0", number, which=which))
    steps = steps[0] if len(steps) == 1 else steps or None
    scores = evaluate.stage_scores(folder, number, steps, which=which)
    minutes = read_json(folder / "metrics.json").get("minutes", 0.0)
    write_json(path, {**scores, "minutes": minutes})


def run_seed(rows, seed, args, extra):
    """All rows of a table for one seed, each printed when it is known; what a row starts from comes
    first."""
    known = {row.folder: row for table in TABLES.values() for row in table if not row.steps}
    done = {}

    def with_origin(row):
        if row.after and row.after not in done:
            with_origin(known[row.after])
        done[row.folder] = finish(row, seed, args, extra) if row.folder != "real" else None

    if any(row.folder == "real" for row in rows):
        with_origin(TEACHER)
    for row in rows:
        try:
            with_origin(row)
            scores = finish(row, seed, args, extra)
        except UsageError as error:  # said at once: the other seeds may run for hours
            print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
            raise
        print(f"seed {seed}: " + line(row.name, {k: [v] for k, v in scores.items()}), flush=True)


# ---------------------------------------------------------------- tables


def collect(rows, args):
    """{row's name: {score: [one per seed]}} of what has been finished."""
    scores = {}
    for row in rows:
        paths = {seed: scores_path(args.out, seed, row, args.held_out) for seed in args.seeds}
        found = {seed: read_json(path) for seed, path in paths.items() if path.is_file()}
        if found:
            columns = {name: [f[name] for f in found.values() if name in f] for name in COLUMNS}
            scores[row.name] = {**columns, "seeds": list(found)}
    return scores


@torch.no_grad()
def add_rates(rows, scores, args, frames=61, turns=3):
    """Add to the scores of every row that streams: network passes a chunk, the context pass
    included, and frames a second of one core's time. The streams take turns, and of their times
    the median counts, for a host is never quiet for long."""
    torch.set_num_threads(1)
    players, times = {}, {}
    for row in rows:
        folder = Path(args.out) / f"seed{args.seeds[0]}" / row.folder
        if row.name in scores and (folder / "ema.safetensors").is_file():
            net, _, settings = load_stage(folder)
            if settings["stage"] > 0:
                steps = per_chunk(row.steps or settings["student_steps"])
                players[row.name] = net, settings, steps
                context = settings["context_level"] >= 0
                scores[row.name]["passes"] = [steps[-1] + context]
    for name, (net, settings, steps) in [*players.items()] * turns:
        side = settings["size"] // settings["codec_patch"]
        shape, text = (settings["in_dim"], side, side), torch.zeros(1, 1, settings["text_dim"])
        began = time.process_time()
        for _ in generate_chunks(net, settings, torch.zeros(1, settings["first"], *shape), text,
                                 lambda n, shape=shape: torch.randn(1, n, *shape), frames, steps):
            pass
        times.setdefault(name, []).append(time.process_time() - began)
    for name, seconds in times.items():
        scores[name]["rate"] = [frames / statistics.median(seconds)]


def cell(values):
    """Mean and, in brackets, the largest minus the smallest."""
    if not values:
        return ""
    spread = f" ({max(values) - min(values):.2g})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def line(name, values):
    """A row of the table in Markdown."""
    return f"| {name} | " + " | ".join(cell(values.get(column, [])) for column in COLUMNS) + " |"


def table(scores):
    """Mean and spread over seeds as a Markdown table."""
    head = ["| | " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    most = max((len(values.get("seeds", ())) for values in scores.values()), default=0)

    def called(name, seeds):  # a mean of fewer seeds is no mean of all
        plural, listed = "s" * (len(seeds) > 1), ", ".join(map(str, seeds))
        return f"{name} (seed{plural} {listed})" if 0 < len(seeds) < most else name

    return "\n".join(head + [line(called(name, values.get("seeds", ())), values)
                             for name, values in scores.items()])


def ratios(scores, a, b):
    """One line: the means of row a over those of row b, of the same seeds. Jitter as its distance
    from that of real clips. Scores that one row lacks are left out."""
    if a not in scores or b not in scores or scores[a]["seeds"] != scores[b]["seeds"]:
        return ""
    words = []
    for name in RATIOS:
        top, bottom, real = (scores.get(row, {}).get(name) for row in (a, b, REAL.name))
        if not top or not bottom:
            continue
        top, bottom = statistics.mean(top), statistics.mean(bottom)
        if name == "jitter" and real:
            top, bottom = abs(top - statistics.mean(real)), abs(bottom - statistics.mean(real))
        if bottom:
            words.append(f"{COLUMNS[name]} {top / bottom:.3g}")
    return f"{a} / {b}: " + ", ".join(words)


def flags():
    """The parser of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--table", choices=list(TABLES), default="stages", help="which table")
    parser.add_argument("--out", default="out/table", help="folder; a folder per seed goes there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--clips", type=int, default=256, help="held-out clips behind every score")
    parser.add_argument("--held-out", choices=list(HELD_OUT_SETS), default="report",
                        help="which of the two sets of held-out clips")
    parser.add_argument("--jobs", type=int, default=2,
                        help="seeds trained side by side, one thread each; 1: one seed on all "
                             "cores")
    parser.add_argument("--print", action="store_true",
                        help="train nothing, print the table of what is finished")
    parser.add_argument("--score", type=Path,
                        help="score one stage into this file; what a row does when it has been "
                             "trained")
    parser.add_argument("--steps", type=int, nargs="*", default=[],
                        help="with --score: network passes a chunk; none: as trained")
    return parser


def main(argv=None):
    """Train and score what is missing of a table, print it and the ratios that matter."""
    parser = flags()
    args, extra = parser.parse_known_args(argv)
    if args.score:
        return score(args.score, args.clips, args.held_out, args.steps)
    if {"--seed", "--stage", "--tag", "--init"} & set(extra):
        parser.error("--seed, --stage, --tag and --init are chosen by this script")
    rows = TABLES[args.table]
    if not args.print:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: run_seed(rows, seed, args, extra), args.seeds))
    scores = collect(rows, args)
    require(scores, f"nothing finished in {args.out}: run this command without --print")
    if args.table == "family":
        add_rates(rows, scores, args)
    print(table(scores))
    for a, b in ((STAGE2, STAGE1), (STAGE3, CONTROL), (STAGE3, LONGER), (ALONE, CONTROL),
                 (FROM1, STAGE3)):
        words = ratios(scores, a.name, b.name)
        if words:
            print(words)


if __name__ == "__main__":
    with friendly_errors():
        main()
