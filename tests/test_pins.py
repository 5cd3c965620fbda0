"""The numbers of short runs, pinned: whoever changes what training or sampling computes learns it
here, also where no property says which number is right.

    python -m tests.test_pins      after a change that is meant to move them: writes pins.json

A property test says why a number is right, and comes first; this file notices the rest: an argument
at the wrong place, a level drawn from the wrong key, a rate that never falls. Networks start with
random output layers, not at zero: else text, mask and past would hardly reach a number.
"""
import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

from tests.common import SMALL, command, logs

import pytest
import torch
from safetensors.torch import load_file

import model
import sample
import train
from experiments import evaluate

PINS = Path(__file__).with_name("pins.json")
PARTS = "--batch-size 4 --micro-batch 2"
STAGES = {  # a stage with switches that no recipe of the default run sets
    "teacher": (0, f"--guidance 2 --text-drop 0.5 --weight-decay 0.1 {PARTS}"),
    "ode": (1, "--guidance 2 --ode-context noisy --ode-points 2 --ode-point-weights 0.5 0.2 0.3 "
               f"--betas 0.5 0.9 --muon-lr 0 {PARTS}"),
    "dmd": (2, f"--guidance 2 --score-shift 3 --fake-updates 2 --dmd-diff-weight 2 {PARTS}"),
    "gan": (3, "--gan-loss relativistic --r1r2-every 2 --gan-t-max 0.5 "
               f"--disc-granularity chunk {PARTS}"),
    "interval": (3, "--student-steps 2 --gan-interval --ode-anchor 0 --disc-causal "
                    "--disc-granularity frame --sink 2 --window 3"),
    "both terms": (3, "--dmd-weight 1 --gan-weight 2 --gan-ratio 0.5 --context-level 0.2 "
                      "--no-cache-grad"),
    # the settings that are left, each away from its default
    "teacher, rest": (0, "--teacher-forcing 1 --train-shift 2 --ema 0.5 --lr-warmup 2 --lr-decay "
                         "0.9 --muon-lr 0 --betas 0.5 0.9 --grad-clip 0.1 --turns 0.5"),
    "ode, rest": (1, "--ode-context clean --ode-steps 4 --ode-point-weights 0.2 0.3 0.2 0.3 0 "
                     "--shift 3 --muon-lr 0.1 --window 3"),
    "dmd, rest": (2, "--frames 10 --student-steps 3 2 --grad-chunks 1 --cache-grad --fake-lr 3e-3 "
                     "--context-level 0.2 --fake-betas 0.5 0.9 --score-shift 0.3 --student-start 1 "
                     "--ode-anchor 0"),
    "gan, rest": (3, "--frames 10 --grad-chunks 1 --gan-shift 0.5 --gan-t-max 1 --r1r2-weight 5 "
                     "--r1r2-sigma 0.3 --disc-queries 1 --disc-layers 1 --disc-betas 0.3 0.8 "
                     "--backbone-lr 1e-3 --disc-lr 3e-3 --disc-updates 3 --ode-anchor 0 "
                     "--weight-decay 0.1"),
}
RECIPES = {  # the stages that a relative changes; each starts from the run
    "self-forcing": [2], "causvid": [2], "one-forcing": [2], "asd": [2], "diagonal": [2],
    "causal-teacher": [0], "consistency": [1], "no-context": [2, 3], "published": [1, 2],
}
EXITS = ["--frames", "10", "--seed", "3"]  # three chunks that leave after different passes
VIDEOS = {  # name: (stage of the run, sample.py's flags)
    "video, one pass": (3, "--frames 13 --seed 3"),
    "video, passes": (3, "--steps 3 2 1"),
    "video, times": (3, "--times 1.0 0.4 --shift 3"),
    "video, absolute positions": (3, "--absolute-positions --window 3 --frames 13"),
    "video, second caption": (3, "--prompt-at 5 red --frames 10"),
    "video, futures": (2, "--futures 3"),
    "video, noisy context": (3, "--context-level 0.3 --frames 13"),
    "video, no context pass": (3, "--context-level -1 --frames 13"),
    "video, teacher": (0, "--guidance 3 --steps 4"),
    "video, student of many": (3, "--steps 4 1 --frames 13 --prompt-at 4 blue"),
}


# ---------------------------------------------------------------- fingerprints

def print_of(tensors):
    """Two numbers of named tensors: their norm, and a projection that depends on every place."""
    flat = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
    wave = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 0.7 + 0.3)
    return [flat.norm().item(), (flat * wave).sum().item() / wave.norm().item()]


def stage_prints(folder):
    """Of a stage's folder: every number of its log, and of its weights the norm and projection."""
    found = {}
    for row in logs(folder):
        step = row.pop("step")
        found |= {f"step {step}: {name}": [value] for name, value in row.items()
                  if name != "minutes"}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found[file.stem] = print_of(load_file(file))
    return found


def differences(found, pinned):
    """What moved by more than rounding on another machine can move it: 0.2 % of a number, 1e-5 of
    the norm that a projection belongs to, 3e-4 of differences of large numbers."""
    assert found.keys() == pinned.keys()

    def same(name, a, b):
        large = name.endswith(("d_real", "d_fake", "error_growth"))
        least = 3e-4 if large else 1e-5 * abs(found[name][0])
        return math.isclose(a, b, rel_tol=2e-3, abs_tol=least)

    return [f"{name}: {pinned[name]} -> {found[name]}" for name in found
            if not all(same(name, *pair) for pair in zip(found[name], pinned[name], strict=True))]


# ---------------------------------------------------------------- what is pinned

def train_stage(run, out, stage, flags):
    """The prints of three steps of a stage that starts from the run."""
    train.main([*command(run, stage, *flags.split()), "--iters", "3", "--out", str(out)])
    return {f"{folder.name}, {name}": value for folder in sorted(Path(out).glob("stage*"))
            for name, value in stage_prints(folder).items()}


@contextlib.contextmanager
def lively_networks():
    """Networks whose output layer starts at random."""
    init = model.DiT.init_weights

    def lively(net):
        init(net)
        g = torch.Generator().manual_seed(7)
        net.head.head.weight.data.normal_(std=0.05, generator=g)
        return net

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.DiT, "init_weights", lively)
        yield


def make_run(out):
    """All four stages with a tiny network, 3 steps each."""
    with lively_networks():
        train.main(["--out", str(out), "--iters", "3", *SMALL])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run that every case starts from."""
    return make_run(tmp_path_factory.mktemp("pins"))


def of_the_run(run, out):
    """All stages as they are by default."""
    return {f"stage {n}, {name}": value for n in ("0", "0-causal-teacher", "1", "2", "3")
            for name, value in stage_prints(run / f"stage{n}").items()}


def of_a_stage(stage, flags):
    """A stage with other switches."""
    return lambda run, out: train_stage(run, out, stage, flags)


def of_a_recipe(name, stages):
    """A relative's stages, from the run and from each other."""
    def prints(run, out):
        for n in ("0", "0-causal-teacher", "1", "2", "3"):
            if n != f"0-{name}":
                (out / f"stage{n}").symlink_to(run / f"stage{n}")
        for stage in stages:
            more = EXITS if name == "diagonal" else []
            train.main(["--recipe", name, "--stage", str(stage), "--out", str(out), *SMALL,
                        "--iters", "3", *more])
        return {f"{folder.name}, {key}": value for folder in sorted(out.glob(f"stage*-{name}"))
                for key, value in stage_prints(folder).items()}

    return prints


def of_a_video(stage, flags):
    """What sample.py writes, frame by frame."""
    def prints(run, out):
        frames = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "video_writer", lambda *_: contextlib.nullcontext(frames.extend))
            sample.main(["--weights", str(run / f"stage{stage}"), "--from-data", "--device", "cpu",
                         "--out", str(out / "video.gif"), *flags.split()])
        return {f"frame {n}": print_of({"": torch.as_tensor(frame)})
                for n, frame in enumerate(frames)}

    return prints


def of_the_scores(run, out):
    """What evaluate.py measures, on few clips."""
    with pytest.MonkeyPatch.context() as patch:
        paths = evaluate.future_paths
        patch.setattr(evaluate, "IMAGES", 2)
        patch.setattr(evaluate, "future_paths", lambda *args: paths(*args, seeds=3))
        rows = evaluate.stage_scores(run / "stage3", 4), evaluate.real_scores(run / "stage0", 4)
    return {f"{row['stage']}, {name}": [value] for row in rows for name, value in row.items()
            if isinstance(value, (int, float))}


CASES = {
    "recipe": of_the_run,
    **{name: of_a_stage(*case) for name, case in STAGES.items()},
    **{name: of_a_recipe(name, stages) for name, stages in RECIPES.items()},
    **{name: of_a_video(*case) for name, case in VIDEOS.items()},
    "scores": of_the_scores,
}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_that_were_pinned(name, run, tmp_path):
    with lively_networks():
        found = CASES[name](run, tmp_path)
    moved = differences(found, json.loads(PINS.read_text())[name])
    assert not moved, (f"{len(moved)} numbers moved, first {moved[0]}: if that was meant, run "
                       "python -m tests.test_pins and say why in the commit")


def write():
    """Pin the numbers of this code."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run, pinned = make_run(Path(folder) / "run"), {}
        for number, (name, prints) in enumerate(CASES.items()):
            out = Path(folder) / str(number)
            out.mkdir()
            with lively_networks():
                found = prints(run, out)
            pinned[name] = {key: [float(f"{x:.6g}") for x in values]
                            for key, values in found.items()}
    rows = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in pinned.items()]
    PINS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    write()
