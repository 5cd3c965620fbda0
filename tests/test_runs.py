"""Runs: folders, resume, signals, bad flags and damaged files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import losses as L
import sample
import train
from experiments import evaluate, plan
from scale import parallel, state
from scale.clips import make_trajectories, open_dataset, quarters
from scale.run import Run, prepare
from tests.common import (HERE, SMALL, Known, colour_clip, command, flow_to, largest_difference,
                          logs, recorded, rehearsal, several_processes, small_config, timeless,
                          weights)
from utils import files, media, runs
from utils.errors import UsageError, catch_signals, check_device, friendly_errors


def test_every_stage_leaves_its_files_and_learns(small_run, capsys):
    for stage in range(4):
        folder = small_run / f"stage{stage}"
        names = {p.name for p in folder.iterdir()}
        assert {"weights.safetensors", "ema.safetensors", "codec.safetensors", "config.json",
                "log.jsonl", "metrics.json", "state"} <= names
        # stage 3 is the adversarial loss alone
        assert (folder / "fake.safetensors").is_file() == (stage >= 2)
        assert len(logs(folder)) == 3
        assert json.loads((folder / "config.json").read_text())["stage"] == stage
        if stage:
            before = f"stage{stage - 1}" if stage > 1 else "stage0-causal-teacher"
            before = load_file(folder.parent / before / "ema.safetensors")
            after = weights(folder)
            assert max((after[k] - before[k]).abs().max() for k in after) > 0
    # the same command again keeps all of it
    train.main(["--out", str(small_run), "--iters", "3", *SMALL])
    assert capsys.readouterr().out.count("is finished and kept") == 5


def test_a_later_fake_score_goes_on_where_it_was(small_run, tmp_path):
    """With --dmd in stage 3, or stage 2 trained on, it starts from stage 2's, which has followed
    this student; else as the teacher."""

    def fake(stage, start):
        flags = ("--init", start, "--teacher", small_run / "stage0", "--out", tmp_path)
        run = Run(small_config(stage, "--dmd-weight", 1, *flags), train.new_network)
        prepare(run, train.networks(run.cfg))
        return run.nets["fake"].state_dict()

    followed = load_file(small_run / "stage2" / "fake.safetensors")
    teacher = load_file(small_run / "stage0" / "ema.safetensors")
    for found, expected in ((fake(3, small_run / "stage2"), followed),
                            (fake(2, small_run / "stage2"), followed),
                            (fake(2, small_run / "stage1"), teacher)):
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert max((followed[k] - teacher[k]).abs().max() for k in teacher) > 0


def test_a_failed_score_costs_no_training(small_run, tmp_path, monkeypatch, capsys):
    """What has been trained is kept, the sentence says how to see more and how to go on, and the
    same command goes on."""
    flags = command(small_run, 2, "--out", tmp_path, "--iters", 2)
    monkeypatch.setattr(evaluate, "stage_scores", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--eval-clips", "2"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "division by zero" in said and "evaluate.py" in said
    assert "--eval-clips 0" in said
    trained = weights(tmp_path / "stage2")
    train.main(flags)
    assert all(torch.equal(trained[k], w) for k, w in weights(tmp_path / "stage2").items())
    assert json.loads((tmp_path / "stage2" / "metrics.json").read_text()).keys() == {"minutes"}


def start(out, *flags, launcher=(sys.executable,)):
    """A training run in a process of its own, with its output in a file."""
    with open(f"{out}.txt", "a") as file:
        return subprocess.Popen([*launcher, str(HERE / "train.py"), "--out", str(out), *flags],
                                stdout=file, stderr=file, cwd=HERE)


def wait_for_step(folder, step, seconds=60):
    """Until a step is in a stage's log."""
    log, deadline = folder / "log.jsonl", time.time() + seconds
    while time.time() < deadline and not (
            log.is_file() and len(log.read_text().splitlines()) >= step):
        time.sleep(0.02)


def test_every_clip_of_a_stage_is_a_new_one():
    """Over micro-batches, steps, processes, and a stage that is trained on."""
    run, seen = rehearsal(2, "--micro-batch", 3), []
    run.clips_per_rank, run.world = 2, 2
    for run.past_steps in (0, 2):
        for run.step in range(2):
            for run.rank in range(2):
                seen += [clip for batch in run.batches("roll") for clip in batch.clip_ids]
    assert seen == list(range(seen[0], seen[0] + 4 * 4))  # 4 steps of 4 clips


def test_trajectories_are_guided_and_have_their_own_captions(tmp_path):
    """A teacher whose clip has the mean of its caption, guided by 2: a trajectory goes from noise
    to twice the mean of the caption in its file, and keeps its image."""
    run = rehearsal(1, "--guidance", 2, "--micro-batch", 3, "--ode-context", "clean")
    run.dir, run.data = tmp_path, SimpleNamespace(latent=False)

    def answer(x, t, text):
        return flow_to(L.expand_t(text.mean((1, 2))[:, None]))(x, t, text)

    run.nets["teacher"] = Known(run.cfg, answer)
    make_trajectories(run)
    assert len(run.trajectories) == 4
    for file in run.trajectories:
        states, text = (load_file(file)[name] for name in ("states", "text"))
        assert states[0, 1:].std().item() == pytest.approx(1, abs=0.05)
        assert torch.allclose(states[-1, 1:], 2 * text.mean(), atol=1e-5)
        assert (states[:, 0] == states[-1, 0]).all()


def test_training_on_draws_new_clips_and_noise(small_run, tmp_path):
    """Stage 2 from stage 2 goes on in its data, else a control would see the same clips and noise
    twice. Stage 3 does not."""

    def run(stage, start, out):
        flags = ("--init", start, "--teacher", small_run / "stage0", "--out", out, "--iters", 2)
        return Run(small_config(stage, *flags), train.new_network)

    assert run(2, small_run / "stage1", tmp_path).past_steps == 0
    assert run(3, small_run / "stage2", tmp_path).past_steps == 0
    again = run(2, small_run / "stage2", tmp_path)
    assert again.past_steps == 3  # what the stage before was trained
    (tmp_path / "stage1").symlink_to(small_run / "stage1")  # which has the trajectories
    assert not torch.equal(again.draws([0], "roll").randn(4),
                           run(2, small_run / "stage1", tmp_path).draws([0], "roll").randn(4))
    train.main(command(small_run, 2, "--init", small_run / "stage2", "--out", tmp_path,
                       "--tag", "on", "--iters", 2))
    assert run(2, tmp_path / "stage2-on", tmp_path).past_steps == 5


@pytest.mark.slow
def test_killed_run_goes_on(small_run, tmp_path):
    """SIGKILL in the middle of stage 3 on two processes; one process goes on. SIGTERM saves first.
    Damage falls back."""
    flags = command(small_run, 3, "--iters", 30, "--save-every", 5)
    train.main(["--out", str(tmp_path / "a"), *flags])
    folder = tmp_path / "b" / "stage3"
    torchrun = "torchrun --nproc_per_node 2 --master_port 29515".split()
    run = start(tmp_path / "b", *flags, launcher=torchrun)
    wait_for_step(folder, 12)
    # by name: torchrun gives its processes groups of their own
    subprocess.run(["pkill", "-KILL", "-f", f"out {tmp_path / 'b'}"])
    run.wait()
    assert len(runs.saved_states(folder)) == 2 and not (folder / "weights.safetensors").exists()

    newest = runs.saved_states(folder)[0]
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    run = start(tmp_path / "b", *flags)
    before = len((folder / "log.jsonl").read_text().splitlines())
    time.sleep(1)
    wait_for_step(folder, before + 2)
    run.terminate()
    assert run.wait() in (143, 0, -15)  # 0 or -15: its last step was over
    train.main(["--out", str(tmp_path / "b"), *flags])
    said = Path(f"{tmp_path / 'b'}.txt").read_text()
    assert f"{newest} is damaged" in said and "goes on at step" in said and "Traceback" not in said
    assert largest_difference(weights(tmp_path / "a" / "stage3"), weights(folder)) < 1e-4
    assert [line["step"] for line in logs(folder)] == list(range(1, 31))
    minutes = [line["minutes"] for line in logs(folder)]  # they go on as well
    assert minutes == sorted(minutes)
    assert json.loads((folder / "metrics.json").read_text())["minutes"] >= minutes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stage, more", [
    (0, ""), (1, ""), (2, ""), (3, ""), (0, "--compile clips --teacher-forcing 0.5")])
def test_kill_at_a_random_moment_is_bit_for_bit(small_run, tmp_path, stage, more):
    """SIGKILL twice, whenever it comes: while starting, stepping or saving. The run that goes on
    ends as if nothing had been, compiled for clips of two lengths too."""
    flags = command(small_run, stage, "--iters", 40, "--save-every", 3, *more.split())
    began = time.time()
    assert start(tmp_path / "a", *flags).wait() == 0
    whole = time.time() - began
    moment = np.random.default_rng(stage)
    for _ in range(2):
        run = start(tmp_path / "b", *flags)
        time.sleep(moment.uniform(0.3, 0.9) * whole)
        run.kill()
        run.wait()
    assert start(tmp_path / "b", *flags).wait() == 0
    one, two = (tmp_path / name / f"stage{stage}" for name in "ab")
    uncut, resumed = weights(one), weights(two)
    assert all(torch.equal(uncut[k], resumed[k]) for k in uncut)
    assert timeless(one) == timeless(two)


@pytest.mark.parametrize("flags", [
    "--context-level -1", "--context-level 0.1 --dmd-diff-weight 1 --student-steps 2"])
def test_relatives_are_switches(small_run, tmp_path, flags):
    """Diagonal Forcing and flow distribution matching train, and change what is learnt."""
    usual = command(small_run, 2, "--iters", 3)
    train.main(["--out", str(tmp_path / "a"), *usual])
    train.main(["--out", str(tmp_path / "b"), *usual, *flags.split()])
    assert largest_difference(weights(tmp_path / "a/stage2"), weights(tmp_path / "b/stage2")) > 1e-6
    sample.main(["--weights", str(tmp_path / "b/stage2"), "--from-data", "--frames", "10",
                 "--context-level", "0.1", "--out", str(tmp_path / "v.gif")])


@pytest.mark.slow
def test_compiled_blocks_train_alike(small_run, tmp_path):
    flags = command(small_run, 2, "--iters", 3)
    train.main(["--out", str(tmp_path / "a"), *flags])
    train.main(["--out", str(tmp_path / "b"), *flags, "--compile", "all"])
    one, two = weights(tmp_path / "a/stage2"), weights(tmp_path / "b/stage2")
    assert largest_difference(one, two) < 1e-3  # Adam amplifies rounding


def test_full_disk_keeps_the_old_state(small_run, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    flags = " ".join(command(small_run, 2, "--out", tmp_path, "--iters", 6, "--save-every", 2))
    out = subprocess.run(["bash", "-c", f"ulimit -f 100; exec python train.py {flags}"], cwd=HERE,
                         capture_output=True, text=True)
    assert out.returncode == 2 and "cannot write" in out.stderr and "Traceback" not in out.stderr
    assert not runs.saved_states(tmp_path / "stage2")
    assert not (tmp_path / "stage2/state/new").exists()


@pytest.mark.parametrize("stage, more", [
    (0, "--muon-lr 0.02"), pytest.param(3, "--context-parallel 2", marks=pytest.mark.slow),
    pytest.param(3, "--activation-checkpointing", marks=pytest.mark.slow)])
def test_several_processes_in_half_precision(small_run, tmp_path, stage, more):
    """Gathered in bfloat16, under autocast, with Muon and a paired loss: the same losses up to that
    precision."""
    flags = command(small_run, stage, "--iters", 3, "--dtype", "bfloat16", "--gan-loss",
                    "relativistic", "--gan-ratio", 0.3)
    train.main(["--out", str(tmp_path / "a"), *flags])
    several_processes(2, tmp_path, "--out", str(tmp_path / "b"), *flags, *more.split())
    for a, b in zip(*(logs(tmp_path / name / f"stage{stage}") for name in "ab")):
        for name in {"loss", "fake_loss", "dmd", "distance", "motion", "anchor"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=0.02)


@pytest.mark.parametrize("flags, message", [
    ("--stage 0 --preset huge", "--preset huge is unknown"),
    ("--stage 7", "--stage 7 is unknown"),
    ("--no-such-flag 3", "unrecognized arguments"),
    ("--stage 0 --frames 15", "use --frames 16"),
    ("--stage 0 --size 33", "use --size 32"),
    ("--stage 0 --data nowhere", "nowhere is not a folder of videos"),
    ("--stage 2", "stage1 does not exist: check the path, or train the stage first"),
    ("--stage 3 --dmd-weight 0 --gan-weight 0", "nothing to learn from"),
    ("--chunk 0", "--chunk takes 1 or more"),
    ("--ode-points 0", "--ode-points 0 does not work: it has to be at least 1"),
    ("--num-heads 3", "does not divide into --num-heads"),
    ("--in-dim 8", "must be the same"),
    ("--seed 100", "held-out"),
    ("--tag mine", "belong to one stage"),
    ("--device tpu", "choose cuda, mps or cpu"),
    ("--device mps", "is not available"),
    ("--context-parallel 0", "--context-parallel 0 does not work"),
    ("--context-parallel 3", "heads"),
    ("--stage 0 --context-parallel 2", "does not divide 1 processes"),
    ("--latent-size 5 6", "divide by 2"),
    ("--betas 0.5", "two numbers"),
    ("--window 0", "--window 0 does not work"),
    ("--shift nan", "--shift nan does not work"),
    ("--lr inf", "--lr inf does not work: it has to be at least 0, and finite"),
    ("--freq-dim 63", "must be even"),
    ("--in-dim 100 --out-dim 100", "has only 48 components"),
    ("--ode-point-weights 0 0 0 0 0", "from 0 up"),
    ("--frames 2 --chunk 1", "at least 3"),
    ("--lr -1", "--lr -1.0 does not work"),
    ("--preset wan-1.3b --stage 0", "--teacher"),
    ("--gpus 8", "unrecognized arguments: --gpus"),
    ("--recompute", "--recompute is now --activation-checkpointing"),
    ("--dmd 1", "--dmd is now --dmd-weight"),
    ("--first 2 --frames 8", "--sink 1 is below --first 2"),
    ("--stage 3 --disc-granularity pixel", "--disc-granularity pixel is unknown"),
    ("--stage 0 --batch-size 0", "--batch-size 0 does not work"),
    ("--stage 3 --disc-layers 9", "--disc-layers 9 does not work"),
    ("--stage 3 --disc-layers 1 1", "different blocks"),
    ("--stage 2 --gan-weight 1 --disc-layers 9", "--disc-layers 9 does not work"),
    ("--betas 0.9 1", "below 1"),
    ("--dim 0", "--dim 0 does not work"),
    ("--stage 3 --iters 20 --student-start 20", "--iters 20 end before --student-start 20"),
    ("--stage 2 --control", "--control is for the whole recipe"),
    ("--turns 1.5", "--turns 1.5 does not work: it has to be between 0 and 1"),
    ("--stop-spread 2", "--stop-spread 2.0 does not work"),
    ("--weight-decay -1", "--weight-decay -1.0 does not work"),
    ("--ode-anchor -1", "--ode-anchor -1.0 does not work"),
    ("--probe-every -1", "--probe-every -1 does"),
    ("--stage 3 --gan-loss hinge", "--gan-loss hinge is unknown"),
    ("--stage 1 --ode-point-weights 1 2", "--ode-point-weights needs 5"),
    ("--stage 1 --ode-point-weights .4 .1 .1 .1 .3", "end --ode-point-weights with 0"),
    ("--stage 1 --ode-steps 9", "no multiple of --ode-points"),
    ("--stage 0 --dtype float8", "--dtype float8 is unknown"),
    ("--ema 2", "--ema 2.0 does not work: it has to be between 0 and 1"),
    ("--guidance nan", "--guidance nan does not work"),
    ("--tag a/b --stage 0", "--tag a/b becomes part"),
    ("--context-level 3", "--context-level 3.0 does not work"),
    ("--stage 2 --fake-updates -1", "--fake-updates -1 does not work"),
    ("--latent-size -60 104", "--latent-size -60 104 does not work"),
    ("--latent-size 0 104", "--latent-size 0 104 does not work")])
def test_bad_flags_are_one_sentence(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert error.count("\n") <= 1


def test_weights_that_changed_since_are_noticed(small_run, tmp_path, capsys):
    """A finished stage is not kept in silence when what it started from has been trained again."""
    teacher = tmp_path / "stage0-causal-teacher"
    for name in (teacher.name, "stage1"):
        shutil.copytree(small_run / name, tmp_path / name)
    train.main(["--out", str(tmp_path), "--stage", "1", "--iters", "3", *SMALL])
    assert "is finished and kept" in capsys.readouterr().out
    save_file({k: v + 1 for k, v in load_file(teacher / "ema.safetensors").items()},
              teacher / "ema.safetensors")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--stage", "1", "--iters", "3", *SMALL])
    assert "was started from other weights" in capsys.readouterr().err


def test_a_state_of_an_unknown_run_is_not_gone_on_from(small_run, tmp_path, capsys):
    shutil.copytree(small_run / "stage0", tmp_path / "stage0")
    (tmp_path / "stage0" / "config.json").unlink()
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--stage", "0", "--iters", "3", *SMALL])
    assert "no config.json" in capsys.readouterr().err and runs.saved_states(tmp_path / "stage0")
    train.main(["--out", str(tmp_path), "--stage", "0", "--iters", "3", *SMALL, "--no-resume"])


def test_what_is_finished_is_not_lost(small_run, tmp_path, capsys):
    """The whole recipe again trains only what is out of date; --no-resume removes nothing before
    all has been checked."""
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "stage0" / "metrics.json").unlink()  # killed while it was scored
    train.main(["--out", str(tmp_path), "--iters", "3", *SMALL])
    assert capsys.readouterr().out.count("is finished and kept") == 4
    assert (tmp_path / "stage0" / "metrics.json").is_file()
    for flags in (["--data", "nowhere"], ["--in-dim", "100", "--out-dim", "100"]):
        with pytest.raises(SystemExit):
            train.main(["--out", str(tmp_path), "--stage", "0", "--no-resume", *SMALL, *flags])
    assert (tmp_path / "stage0" / "weights.safetensors").is_file()
    train.main(["--out", str(tmp_path), "--stage", "0", "--no-resume", "--iters", "3", *SMALL,
                "--lr", "1e-3"])
    # as if trained with these settings
    shutil.copy(small_run / "stage0" / "config.json", tmp_path / "stage0")
    (tmp_path / "stage0" / "metrics.json").unlink()
    before = weights(tmp_path / "stage1")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--iters", "3", *SMALL])
    # nobody said that they may go
    assert "stage0-causal-teacher was started from other weights" in capsys.readouterr().err
    assert all(torch.equal(before[k], w) for k, w in weights(tmp_path / "stage1").items())
    (tmp_path / "stage2" / "fake.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--stage", "3", "--no-resume", "--iters", "3", *SMALL])
    assert "fake.safetensors cannot be read" in capsys.readouterr().err
    assert (tmp_path / "stage3" / "weights.safetensors").is_file()


def test_two_runs_do_not_meet_in_a_folder(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--stage", "0", "--iters", "2", *SMALL]
    with runs.locked(tmp_path / "stage0"), pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and "another run is training" in capsys.readouterr().err
    train.main(flags)
    assert len(logs(tmp_path / "stage0")) == 2


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def none_here(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", none_here)
    train.main(["--out", str(tmp_path), "--stage", "0", "--iters", "1", *SMALL])
    assert (tmp_path / "stage0" / "metrics.json").is_file()


def test_a_damaged_trajectory_is_named(small_run, tmp_path, capsys):
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "stage1" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "stage1" / "state")
    for path in (tmp_path / "stage1" / "trajectories").iterdir():
        path.write_bytes(b"damaged")
    flags = ["--out", str(tmp_path), "--stage", "1", "--iters", "3", *SMALL]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "remove it, and run the command that made it again" in capsys.readouterr().err
    for path in (tmp_path / "stage1" / "trajectories").iterdir():
        path.unlink()
    train.main(flags)


def test_a_teacher_of_frames_takes_no_latents(small_run, tmp_path, capsys):
    save_file({"latents": torch.zeros(9, 8, 8, 8), "text": torch.zeros(4, 32)},
              tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "out"), "--stage", "1", "--teacher",
                    str(small_run / "stage0"), "--data", str(tmp_path), *SMALL])
    assert "was trained on frames" in capsys.readouterr().err


def test_settings_that_are_none(tmp_path, capsys):
    (tmp_path / "stage0").mkdir()
    (tmp_path / "stage0" / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="config.json is damaged"):
        runs.read_settings(tmp_path / "stage0")
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", "0", "--out", str(tmp_path), *SMALL])
    assert stop.value.code == 2
    assert "config.json is damaged: --no-resume trains the stage again" in capsys.readouterr().err


def test_the_folder_of_the_clips_is_no_folder_for_results(tmp_path, capsys):
    colour_clip(tmp_path, "a.mp4")
    for flags, message in ((["--out", str(tmp_path)], "is the folder of the clips"),
                           (["--out", str(tmp_path / "b"), "--fps", "1"], "or raise --fps")):
        with pytest.raises(SystemExit):
            train.main(["--data", str(tmp_path), "--stage", "0", *SMALL, "--iters", "1", *flags])
        assert message in capsys.readouterr().err


def test_the_same_folder_by_another_name_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    colour_clip(tmp_path / "clips", "a.mp4")
    for name in ("clips", "./clips/", str(tmp_path / "clips")):
        train.main(["--data", name, "--out", "b", "--stage", "0", "--iters", "1", *SMALL])
    assert capsys.readouterr().out.count("is finished and kept") == 2
    monkeypatch.chdir(tmp_path / "clips")  # and the stage finds it from elsewhere
    sample.main(["--weights", "../b/stage0", "--from-data", "--out", "a.gif"])
    assert Path("a.gif").is_file()


@pytest.mark.parametrize("error, said, status", [
    (OSError(28, "No space left on device", "x/log.jsonl"),
     "x/log.jsonl: No space left on device: check", 2),
    (torch.OutOfMemoryError("CUDA out of memory."), "lower --micro-batch", 2),
    (KeyboardInterrupt(), "interrupted", 130),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
     "lower --micro-batch", 2)])
def test_what_disks_devices_and_people_do_is_one_sentence(error, said, status, capsys):
    with pytest.raises(SystemExit) as stop, friendly_errors():
        raise error
    assert stop.value.code == status and said in capsys.readouterr().err


@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)])
def test_signals_save_first(tmp_path, monkeypatch, number, status):
    """A scheduler's and a terminal's like Ctrl-C; SIGUSR1 and SIGHUP also when they come twice."""
    def step(run):
        if run.step == 1:
            os.kill(os.getpid(), number)
            if number in (signal.SIGUSR1, signal.SIGHUP):
                os.kill(os.getpid(), number)
        return train.teacher_step(run)

    monkeypatch.setitem(train.STEPS, 0, step)
    before = signal.signal(number, signal.default_int_handler)  # nohup ignores it
    try:
        with pytest.raises(SystemExit) as stop:
            train.main(["--out", str(tmp_path), "--stage", "0", "--iters", "9", *SMALL])
    finally:
        signal.signal(number, before)
    assert stop.value.code == status
    assert [p.name for p in runs.saved_states(tmp_path / "stage0")] == ["step-0000002"]


def test_a_lost_terminal_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_does_what_it_always_did():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt), catch_signals(signal.SIGINT) as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_state_is_saved(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise state.CheckpointException("save", {0: (KeyboardInterrupt(), None)})

    monkeypatch.setattr(state.dcp, "save", interrupted)
    monkeypatch.setattr(state, "state_of", lambda run: {})
    with pytest.raises(KeyboardInterrupt):
        state.save_state(SimpleNamespace(dir=tmp_path, step=1, is_main=True))


def test_devices_that_are_not_there(monkeypatch):
    with pytest.raises(UsageError, match="cpu:0: choose cuda, mps or cpu"):
        check_device("cpu:0")
    monkeypatch.setenv("RANK", "99")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with (pytest.raises(UsageError, match="torchrun asks for more processes"),
          parallel.processes("cuda")):
        pytest.fail("there are not 100 GPUs")


def test_every_clip_of_a_folder_has_to_fit(tmp_path):
    """Not only the first: the others are read in the middle of a training."""
    for name, length in (("a", 4), ("b", 5)):
        save_file({"latents": torch.zeros(9, 4, 4, 6), "text": torch.zeros(length, 8)},
                  tmp_path / f"{name}.safetensors")
    cfg = train.TrainConfig(in_dim=4, text_dim=8, text_len=4, patch=2, stage=3, frames=9)
    folder = open_dataset(replace(cfg, data=str(tmp_path)), [])
    with pytest.raises(UsageError, match="b.safetensors has 4 channels, .* text up to 4 x 8"):
        folder.batch(range(20))


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(tensors, path):
        Path(path).write_bytes(b"part")
        raise files.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UsageError, match="cannot write .*No space left on device; free some space"):
        files.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, text", [
    ("config.json", "{"), ("config.json", '{"stage": 1}'), ("codec.safetensors", "")])
def test_damaged_files_of_a_stage_are_one_sentence(small_run, tmp_path, capsys, name, text):
    shutil.copytree(small_run / "stage1", tmp_path / "stage1")
    (tmp_path / "stage1" / name).write_text(text)
    with pytest.raises(SystemExit) as stop, friendly_errors():
        sample.main(["--weights", str(tmp_path / "stage1"), "--from-data", "--out",
                     str(tmp_path / "a.gif")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and name in error and error.count("\n") == 1


def test_without_an_image(small_run, tmp_path, capsys):
    """--first 0: a video from the caption alone."""
    flags = ["--out", str(tmp_path), *SMALL, *"--first 0 --frames 6 --iters 2".split()]
    train.main(["--stage", "0", *flags])
    train.main(["--stage", "0", "--recipe", "causal-teacher", *flags])
    train.main(["--stage", "1", *flags])
    sample.main(["--weights", str(tmp_path / "stage1"), "--prompt", "red disc", "--frames", "9",
                 "--out", str(tmp_path / "a.gif")])
    assert len(media.read_video(tmp_path / "a.gif", 32)) == 9
    # nobody told it this clip's background
    scores = evaluate.stage_scores(tmp_path / "stage1", number=2)
    assert "quality_error" not in scores and "motion_smoothness" in scores
    for flags in (["--image", "assets/example.png"], []):
        with pytest.raises(UsageError, match="was trained with(out an image| --first 0).*--prompt"):
            sample.main(["--weights", str(tmp_path / "stage1"), *flags, "--out",
                         str(tmp_path / "a.gif")])


def test_a_checkpoint_of_another_shape_is_explained(small_run, tmp_path, capsys):
    for flags, message in ((["--dim", "64"], "has dim 32, this run 64: use --dim 32"),
                           (["--codec-patch", "8"],
                            "has a codec of 4 pixels a patch, this run 8: use --codec-patch 4")):
        with pytest.raises(SystemExit):
            train.main(["--out", str(tmp_path), "--stage", "1", "--init", str(small_run / "stage0"),
                        *SMALL, *flags])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--out", str(small_run), "--stage", "1", "--iters", "3", *SMALL, "--lr", "0.5"])
    assert "was trained with lr" in capsys.readouterr().err


def test_help_says_what_the_toy_has(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    iters = ", ".join(str(recipe["iters"]) for recipe in train.RECIPES["toy"].values())
    assert stop.value.code == 0 and f"training steps of the stage [stages 0 to 3: {iters}]" in said
    assert "attention heads; dim / num_heads must be even [4]" in said


def test_non_finite_gradients_stop_the_run(tmp_path, capsys, monkeypatch):
    loss = L.flow_matching_loss
    monkeypatch.setattr(L, "flow_matching_loss", lambda *args: loss(*args) * float("nan"))
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--stage", "0", "--iters", "9", "--max-bad-steps", "3",
                    *SMALL])
    assert "stage 0, step 3: 3 non-finite gradients in a row" in capsys.readouterr().err


def test_a_bad_gradient_is_skipped_and_forgotten():
    """Neither the weights nor the next step's gradient have anything of it."""
    run = rehearsal(0)
    weight, average = (next(run.nets[name].parameters()) for name in ("student", "ema"))
    for slope, moves in ((float("nan"), False), (1.0, True)):
        before = weight.detach().clone(), average.detach().clone()
        (slope * sum(p.sum() for p in run.nets["student"].parameters())).backward()
        run.update("student")
        for new, old in zip((weight, average), before):
            assert new.isfinite().all() and torch.equal(new, old) != moves


def test_stage_2_stops_when_futures_are_forgotten():
    past = [{"grad": 1.0}, {"probe_spread": torch.nan}, {"probe_spread": 0.8}, {"grad": 1.0},
            {"probe_spread": 0.41}]
    assert not train.reason_to_stop([], 0.5) and not train.reason_to_stop(past, 0.5)
    past.append({"probe_spread": 0.39})
    assert "0.390" in train.reason_to_stop(past, 0.5) and not train.reason_to_stop(past, 0.0)


def test_stage_two_stops_early_and_stage_three_does_not(small_run, tmp_path, monkeypatch, capsys):
    """Spread is measured every --probe-every steps; a stage that stopped is finished."""
    spreads = iter([1.0, 0.4, 0.1, 1.0, 0.4, 0.1])
    monkeypatch.setattr(train, "probe_spread", lambda run: next(spreads))
    flags = ["--teacher", str(small_run / "stage0"), "--out", str(tmp_path), "--iters", "5",
             "--probe-every", "2", *SMALL]
    for stage, steps in (("2", 3), ("3", 5)):
        if stage == "3":
            assert next(spreads) == 0.1  # which stage 2 did not ask for
        train.main(["--stage", stage, "--init", str(small_run / f"stage{int(stage) - 1}"), *flags])
        log = logs(tmp_path / f"stage{stage}")
        assert [line["step"] for line in log] == list(range(1, steps + 1))
        probed = [line["step"] for line in log if "probe_spread" in line]
        assert probed == list(range(1, steps + 1, 2))
    assert "stops early at step 3: seeds of one image differ by 0.400" in capsys.readouterr().out
    assert (tmp_path / "stage2" / "metrics.json").is_file()


def test_spread_of_a_student_that_ignores_its_noise(monkeypatch):
    """It is 0; if the last chunk is the noise itself, that of the mean of 16 latents."""
    run = plan.Rehearsal(small_config(2))
    for ignores, spread in ((True, 0.0), (False, 0.25)):
        def rolled(model, first, text, randn, *_, **__):
            return [first, first.expand(-1, 3, -1, -1, -1) if ignores else randn(3)]

        monkeypatch.setattr(sample, "rollout", rolled)
        assert train.probe_spread(run) == pytest.approx(spread, abs=0.02)


def test_the_probe_sees_where_things_are_not_how_sharp():
    """Futures of the toy world, sharp and blurred: quarters differ alike from seed to seed, and
    half as much where futures lie half as far apart; whole frames differ less once blurred."""
    world = data.ToyWorld(32, 10, turns=0.2)
    state = world.state(range(8))
    paths = world.futures(range(8), 16, 10)[:, :, -1:]  # (clips, seeds, 1, 2)
    middle = paths.mean(1, keepdim=True)

    def frames(paths):
        return torch.stack([world.render(state, paths[:, seed]) for seed in range(16)])

    def blurred(x):
        return F.avg_pool2d(x.flatten(0, 2), 9, 1, 4, count_include_pad=False).view_as(x)

    def spread(x):
        return x.var(0).mean().sqrt().item()

    sharp, near = frames(paths), frames(middle + (paths - middle) / 2)
    soft = blurred(sharp)
    assert spread(quarters(soft)) == pytest.approx(spread(quarters(sharp)), rel=0.15)
    assert spread(quarters(near)) == pytest.approx(spread(quarters(sharp)) / 2, rel=0.2)
    assert spread(soft) < 0.8 * spread(sharp)


def test_without_the_anchor_nothing_of_it_is_left(small_run, tmp_path, monkeypatch):
    """--ode-anchor 0 trains as if the term did not exist; it takes no noise from the others."""
    flags = command(small_run, 2, "--iters", 2, "--probe-every", 0)
    for name, more in (("with", []), ("without", ["--ode-anchor", "0"]), ("emptied", [])):
        if name == "emptied":
            monkeypatch.setattr(train, "anchor_step", lambda run, batch: {})
        train.main(["--out", str(tmp_path / name), *flags, *more])
    folders = [tmp_path / name / "stage2" for name in ("with", "without", "emptied")]
    there, none, emptied = map(weights, folders)
    assert all(torch.equal(none[k], emptied[k]) for k in none)
    assert timeless(folders[1]) == timeless(folders[2])
    assert largest_difference(there, none) > 1e-6
    # from the student's first step on
    assert ["anchor" in line for line in logs(folders[0])] == [False, True]
    assert not any("anchor" in line for line in logs(folders[1]))


def test_an_anchor_needs_trajectories(small_run, tmp_path, capsys):
    shutil.copytree(small_run / "stage1", tmp_path / "start",
                    ignore=shutil.ignore_patterns("trajectories"))
    flags = command(small_run, 2, "--init", tmp_path / "start", "--out", tmp_path, "--iters", 2)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "needs the teacher's trajectories" in said
    assert "--ode-anchor 0" in said and said.count("\n") == 1
    assert not (tmp_path / "stage2").exists()
    train.main([*flags, "--ode-anchor", "0"])


def test_updates_of_a_step_have_noise_of_their_own():
    """The fake score's and the discriminator's; every third update of the latter has R1 and R2,
    counted over steps of two."""
    flags = ("--dmd-weight", 1, "--fake-updates", 2, "--disc-updates", 2, "--r1r2-every", 3)
    run = rehearsal(3, *flags, "--probe-every", 0, "--student-start", 8)
    fake, disc = (recorded(run.nets[name]) for name in ("fake", "disc"))
    numbers = []
    for run.step in range(3):
        fake.clear()
        disc.clear()
        train.distil_step(run)
        assert not torch.equal(fake[0].x, fake[1].x) and not torch.equal(disc[0].t, disc[-1].t)
        numbers.append(len(disc))
    assert numbers == [4 + 2, 2 + 4, 2 + 2]


def test_the_last_two_states_are_kept(tmp_path):
    """A damaged one has one before it to go back to."""
    run = plan.Rehearsal(small_config(1))
    run.dir, run.is_main = tmp_path, True
    for run.step in (1, 2, 3):
        state.save_state(run)
    assert [path.name for path in runs.saved_states(tmp_path)] == ["step-0000003", "step-0000002"]


def test_a_state_or_a_log_that_was_damaged_is_passed_over(tmp_path):
    (tmp_path / "state/step-9999999").mkdir(parents=True)
    assert not runs.saved_states(tmp_path)
    rows = [{"step": n, "minutes": 0.1 * n, "loss": 1.0} for n in range(1, 6)]
    lines = [json.dumps(row).encode() for row in rows]
    lines[1] += lines[2]  # run into one
    del lines[2]
    lines += [b"\0\0{", b"\xff", b"3", b'{"loss": 1}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert [row["step"] for row in runs.read_log(tmp_path, 4)] == [1, 4]


def test_a_network_of_nan_is_not_exported(tmp_path):
    """Skipped updates may be too few to stop a short stage."""
    run = plan.Rehearsal(small_config(1))
    run.dir, run.is_main, run.codec = tmp_path, True, None
    next(run.nets["student"].parameters()).data.fill_(torch.nan)
    with pytest.raises(UsageError, match="has made the student's .* not finite .*lower --lr"):
        state.export(run)
    assert not list(tmp_path.iterdir())


def test_every_optimizer_has_its_own_betas():
    flags = "--betas 0.1 0.2 --fake-betas 0.3 0.4 --disc-betas 0.5 0.6 --dmd-weight 1".split()
    run = plan.Rehearsal(small_config(3, *flags))
    found = {name: {group["betas"] for optimizer in run.optimizers[name]
                    for group in optimizer.param_groups} for name in ("student", "fake", "disc")}
    assert found == {"student": {(0.1, 0.2)}, "fake": {(0.3, 0.4)}, "disc": {(0.5, 0.6)}}


def test_every_part_has_its_own_learning_rate():
    """Heads on the fake score learn at the discriminator's rate, unless one update trains both."""
    flags = ("--lr 1e-1 --fake-lr 1e-2 --disc-lr 1e-3 --backbone-lr 1e-4 --gan-weight 1 "
             "--lr-warmup 2 --lr-decay 0").split()
    for backbone, wanted in (
            ("own", {"student": 1e-1, "fake": 1e-2, "disc": 1e-4, "disc heads": 1e-3}),
            ("shared", {"student": 1e-1, "fake": 1e-2, "fake heads": 1e-2}),
            ("detached", {"student": 1e-1, "fake": 1e-2, "fake heads": 1e-3})):
        run = rehearsal(2, *flags, "--disc-backbone", backbone, "--student-start", 0)
        run.step, found = 4, set()
        for name, optimizers in run.optimizers.items():
            run.update(name)  # sets the rates of a step
            names = {p: key for key, p in run.nets[name].named_parameters()}
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                for p in group["params"]:
                    head = names[p].startswith(("heads.", "norm.", "out."))
                    found.add((name + " heads" * head, group["lr"]))
        assert found == set(wanted.items())


@pytest.mark.parametrize("shift", [0.2, 1.0, 5.0])
def test_scores_are_compared_away_from_both_ends(shift):
    """From 0.02 to 0.98 after the shift, whatever it is; between them levels are the shifted
    ones."""
    u = torch.linspace(0, 1, 1001)
    levels, shifted = L.score_levels(u, shift), L.shift_time(u, shift)
    assert levels.min().item() == pytest.approx(0.02) and levels.max().item() == pytest.approx(0.98)
    inside = (shifted > 0.02) & (shifted < 0.98)
    assert torch.equal(levels[inside], shifted[inside])


def test_levels_of_the_pass_that_made_the_clip():
    """--gan-interval: between the time of the exit pass and the next; else anywhere."""
    clips, x = data.Draws(range(400), "levels"), torch.zeros(400, 7, 1, 1, 1)
    flags = ("--student-steps", 2, "--shift", 8, "--gan-t-max", 1)
    middle = 16 / 18
    for more, exit_step, low, high in ((["--gan-interval"], 0, middle, 1),
                                       (["--gan-interval"], 1, 0, middle), ([], 0, 0, 1)):
        t = train.disc_level(small_config(3, *flags, *more), clips, x, exit_step)
        assert (t[:, 0] == 0).all() and torch.equal(t[:, 1:], t[:, 1:2].expand(-1, 6))
        assert low <= t[:, 1].min() < low + 0.02 and high - 0.02 < t[:, 1].max() <= high


def test_the_discriminator_is_told_which_pass_it_was(monkeypatch):
    """Student's term and discriminator look at the clip of the same exit step, which both passes
    take their turn at."""
    flags = "--student-steps 2 --gan-interval --ode-anchor 0 --probe-every 0 --student-start 0"
    run, left, judged = plan.Rehearsal(small_config(3, *flags.split())), [], []
    rollout, level = train.rollout, train.disc_level
    monkeypatch.setattr(train, "rollout", lambda *args, **more:
                        left.extend(more["exit_step"]) or rollout(*args, **more))
    monkeypatch.setattr(train, "disc_level",
                        lambda cfg, draws, x, exit_step: judged.append(exit_step)
                        or level(cfg, draws, x, exit_step))
    for run.step in range(6):
        train.distil_step(run)
    # once by the student, once by the discriminator
    assert judged == [exit_step for exit_step in left for _ in range(2)] and set(left) == {0, 1}


def test_every_random_number_of_a_step_has_a_key_of_its_own():
    """Shared noise would couple what is averaged apart: the levels of DMD and the rollout, say."""
    for stage, flags in ((0, ""), (1, ""), (3, "--fake-updates 2 --disc-updates 2"),
                         (2, "--recipe asd --student-steps 3 --fake-updates 2")):
        run = plan.Rehearsal(small_config(stage, *flags.split(), "--student-start", 0,
                                          "--probe-every", 0))
        drawn, keys = run.draws, []
        run.draws = lambda clips, purpose, keys=keys, drawn=drawn: (
            keys.append(purpose) or drawn(clips, purpose))
        for run.step in range(4):
            keys.clear()
            train.STEPS[stage](run)
            assert len(keys) >= 1 and sorted(keys) == sorted(set(keys))
        assert stage < 2 or len(keys) >= 5


def test_each_penalty_is_about_the_logits_of_its_own_clips(monkeypatch):
    """R1 moves real clips and compares with their logits, R2 generated ones; delta has sigma."""
    run = plan.Rehearsal(small_config(3, "--r1r2-sigma", 0.05, "--student-start", 0,
                                      "--probe-every", 0, "--dtype", "float32"))
    torch.nn.init.normal_(run.nets["disc"].out.weight, std=1.0)
    seen = []

    def penalty(judge, x_t, logits, delta):
        seen.append((judge(x_t).detach(), logits.detach(), delta))
        return 0 * logits.mean()

    monkeypatch.setattr(train.L, "approx_r1_r2", penalty)
    train.distil_step(run)
    (real, of_real, delta), (fake, of_fake, _) = seen[:2]
    assert torch.allclose(real, of_real, atol=1e-6) and torch.allclose(fake, of_fake, atol=1e-6)
    assert (real - fake).abs().max() > 1e-4
    assert delta[:, 1:].std().item() == pytest.approx(0.05, rel=0.1) and (delta[:, 0] == 0).all()


def test_every_learning_rate_reaches_its_parameters():
    """Matrices of the student's blocks have Muon's; the rest, and other networks, have AdamW's."""
    flags = ("--muon-lr", 0.5, "--lr", 0.25, "--fake-lr", 0.125, "--disc-lr", 0.0625,
             "--backbone-lr", 0.03125, "--lr-warmup", 0, "--lr-decay", 0, "--student-start", 0)
    run = plan.Rehearsal(small_config(3, *flags, "--probe-every", 0))
    train.distil_step(run)
    rates = {name: [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
             for name, optimizers in run.optimizers.items() if optimizers}
    kinds = [type(optimizer).__name__ for optimizer in run.optimizers["student"]]
    assert kinds == ["Muon", "AdamW"]
    assert rates == {"student": [0.5, 0.25], "fake": [0.125], "disc": [0.0625, 0.03125]}


def test_weight_decay_reaches_every_network_that_is_trained():
    for stage, names in ((0, {"student"}), (2, {"student", "fake"}),
                         (3, {"student", "fake", "disc"})):
        run = plan.Rehearsal(small_config(stage, "--weight-decay", "0.03", "--backbone-lr", "1e-4"))
        assert {name for name, optimizers in run.optimizers.items() if optimizers} == names
        groups = [g for optimizers in run.optimizers.values() for o in optimizers
                  if isinstance(o, torch.optim.AdamW) for g in o.param_groups]
        assert len(groups) >= len(names) and all(g["weight_decay"] == 0.03 for g in groups)


def test_control_trains_stage_two_on_for_as_many_steps(small_run, tmp_path, capsys):
    """After the recipe: from stage 2, whose student makes the steps that stage 3's made; what is
    finished is kept."""
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    train.main(["--out", str(tmp_path), "--control", "--iters", "3", *SMALL])
    settings = json.loads((tmp_path / "stage2-control/config.json").read_text())
    on = logs(tmp_path / "stage2-control")
    three = logs(tmp_path / "stage3")
    assert capsys.readouterr().out.count("is finished and kept") == 5
    assert len(on) == 2 and all("grad" in line for line in on)
    assert sum("grad" in line for line in three) == 2
    assert settings["stage"] == 2 and settings["init"] == str(tmp_path / "stage2")
    assert settings["stop_spread"] == 0 and settings["steps_before"] == 3
