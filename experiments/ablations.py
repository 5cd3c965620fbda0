"""The tables of the README: the recipe and its controls over several training seeds, scored on the same held-out clips.

    python experiments/ablations.py --out out/table --seeds 0 1 2             train, score, print (hours on a laptop, resumable)
    python experiments/ablations.py --out out/table --seeds 0 --print          print what is there
    python experiments/ablations.py --out out/table --judges                   also GAN alone, with the four judges of the paper's table 3

    stage0 .. stage3       the recipe
    stage2-longer          a control of stage 3: stage 2 goes on for as long as stage 3 takes
    stage3-no-gan          the other control: all of stage 3 but its discriminator
    stage3-no-warmup       stage 3 from stage 1, without stage 2 (the paper's table 2; fewer steps in all)
    stage3-gan-alone       the adversarial term without DMD at its side, as in the paper
    stage3-<judge>         the same with another judge, causal or bidirectional, frame-wise or video-wise (the paper's table 3)
"""
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from data import Flags, explain, read_json
from model import require

RECIPE = [("stage0", "--stage 0"), ("stage1", "--stage 1"), ("stage2", "--stage 2"), ("stage3", "--stage 3")]
CONTROLS = [("stage2-longer", "--stage 2 --tag longer --init {out}/stage2 --iters 195 --stop-motion 0 --critic-warmup 0"),
            ("stage3-no-gan", "--stage 3 --tag no-gan --gan 0"),
            ("stage3-no-warmup", "--stage 3 --tag no-warmup --init {out}/stage1")]
ALONE = "--dmd 0 --gan 1 --lr 1e-4 --betas 0 0.99 --warmup 15 --critic-lr 1e-3 --critic-warmup 40 --disc-updates 3 --iters 160"
JUDGES = [("stage3-gan-alone", f"--stage 3 --tag gan-alone {ALONE}"),
          ("stage3-bidirectional-framewise", f"--stage 3 --tag bidirectional-framewise {ALONE} --disc-framewise"),
          ("stage3-causal-video", f"--stage 3 --tag causal-video {ALONE} --disc-causal"),
          ("stage3-causal-framewise", f"--stage 3 --tag causal-framewise {ALONE} --disc-causal --disc-framewise")]
COLUMNS = {"quality_error": "error", "first_error": "first", "last_error": "last", "error_growth": "growth", "drift": "drift", "dynamic_degree": "dynamic",
           "displacement": "displ.", "jitter": "jitter", "path_px": "path px", "caption_agreement": "caption",
           "subject_consistency": "subject", "i2v_subject": "i2v subject", "i2v_background": "i2v backgr."}


def run_seed(out, seed, plan, clips, threads, extra):
    """Train and score every row of the plan for one seed; what is finished is kept. Returns the seed if a row fails, and says so at once."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    folder = Path(out) / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.log", "a") as log:
        for _, flags in plan:
            command = [sys.executable, str(HERE / "train.py"), "--out", str(folder), "--seed", str(seed), "--eval-clips", str(clips),
                       *(word.format(out=folder) for word in flags.split()), *extra]
            if subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode:
                print(f"seed {seed} failed: see the end of {folder / 'output.log'}", file=sys.stderr, flush=True)
                return seed


def collect(out, seeds, rows):
    """{row: {score: [one per seed]}} of what has been finished."""
    scores = {}
    for row in rows:
        found = {s: read_json(p) for s in seeds if (p := Path(out) / f"seed{s}" / row / "metrics.json").is_file()}
        if found:
            scores[row] = {name: [f[name] for f in found.values() if name in f] for name in COLUMNS} | {"seeds": list(found)}
    return scores


def table(scores):
    """Mean and spread (largest minus smallest, in brackets) over seeds as a Markdown table."""
    def cell(values):
        if not values:
            return ""
        spread = f" ({max(values) - min(values):.2g})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3g}{spread}"

    lines = ["| | seeds | " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row, values in scores.items():
        lines.append(f"| {row} | {len(values['seeds'])} | " + " | ".join(cell(values[name]) for name in COLUMNS) + " |")
    return "\n".join(lines)


def ratios(scores, a, b, names=("quality_error", "last_error", "error_growth", "drift", "jitter", "displacement")):
    """One line: the means of row a over those of row b."""
    if a not in scores or b not in scores or scores[a]["seeds"] != scores[b]["seeds"]:
        return ""
    parts = [f"{COLUMNS[n]} {statistics.mean(scores[a][n]) / statistics.mean(scores[b][n]):.2f}" for n in names
             if scores[a][n] and scores[b][n] and statistics.mean(scores[b][n])]
    return f"{a} / {b}: " + ", ".join(parts)


def main(argv=None):
    """Train what is missing, print the table and the ratios."""
    parser = Flags(__doc__)
    parser.add_argument("--out", default="out/table", help="folder; a folder per seed goes there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--clips", type=int, default=256, help="held-out clips behind every score")
    parser.add_argument("--jobs", type=int, default=2, help="seeds trained side by side, one thread each; 1: one seed on all cores")
    parser.add_argument("--judges", action="store_true", help="also the adversarial term alone, with each of the four judges")
    parser.add_argument("--print", action="store_true", help="train nothing, print the table of what is finished")
    args, extra = parser.parse_known_args(argv)
    if {"--seed", "--stage", "--tag", "--init"} & set(extra):
        parser.error("--seed, --stage, --tag and --init are chosen by this script")
    plan = RECIPE + CONTROLS + JUDGES * args.judges
    if not args.print:
        threads = 1 if args.jobs > 1 else os.cpu_count()
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = [seed for seed in pool.map(lambda seed: run_seed(args.out, seed, plan, args.clips, threads, extra), args.seeds) if seed is not None]
        require(not failed, f"seeds {failed} failed: mend what their output.log says, and give the same command again; what is finished is kept")
    scores = collect(args.out, args.seeds, [name for name, _ in RECIPE + CONTROLS + JUDGES])
    require(scores, f"nothing finished in {args.out}: run this command without --print")
    print(table(scores))
    for a, b in (("stage2", "stage1"), ("stage3", "stage2"), ("stage3", "stage2-longer"), ("stage3", "stage3-no-gan"),
                 ("stage3-no-warmup", "stage3"), ("stage3-gan-alone", "stage2")):
        print(ratios(scores, a, b))


if __name__ == "__main__":
    with explain():
        main()
