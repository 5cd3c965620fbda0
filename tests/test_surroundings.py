"""What surrounds a run: torchrun, terminals, disks, clocks, and numbers that are none."""

import io
import json
import math
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import data
import train
from experiments import bench, evaluate
from scale import parallel
from scale.clips import open_dataset
from scale.run import Run
from tests.common import colour_clip, logs, rehearsal, small_config, small_run
from utils import errors, files, runs
from utils.errors import UsageError, WriteError, friendly_errors


# ---------------------------------------------------------------- the environment of a run

TORCHRUN = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                MASTER_PORT="29533")


@pytest.mark.parametrize("change, message", [
    ({name: "" for name in TORCHRUN if name != "RANK"},
     "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start it with torchrun, or unset RANK"),
    ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "RANK is set and MASTER_ADDR, MASTER_PORT not"),
    ({"LOCAL_RANK": ""}, "RANK is set and LOCAL_RANK not"), ({"RANK": "first"}, "RANK is 'first'"),
    ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"), ({"MASTER_PORT": "a"}, "MASTER_PORT is 'a'")])
def test_part_of_torchruns_environment_is_one_sentence(monkeypatch, change, message):
    for name, value in {**TORCHRUN, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        with parallel.processes("cpu"):
            raise AssertionError("it has begun")


def test_an_empty_rank_is_none(monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "8")  # what some clusters set is no torchrun
    with parallel.processes("cpu"):
        assert parallel.world() == (0, 1)


def test_an_address_that_is_taken_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {**TORCHRUN, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match="do not find each other at 127.0.0.1:"):
            with parallel.processes("cpu"):
                raise AssertionError("it has begun")


def test_many_processes_say_a_sentence_once(monkeypatch):
    """Of all that fail alike one says it; another error is said as well."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(parallel, "connect", lambda cuda: store)
    monkeypatch.setattr(errors, "PATIENCE", 0.01)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)

    def process(error):
        with parallel.processes("cpu"):
            raise error

    with pytest.raises(UsageError, match="no videos"):
        process(UsageError("no videos in x"))
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            process(UsageError("no videos in x"))
        assert stop.value.code == 2
    with pytest.raises(OSError, match="full"):
        process(OSError("full"))


@pytest.mark.parametrize("rank, waits", [("", False), ("0", False), ("1", True)])
def test_a_wrong_flag_is_said_by_the_first_process(monkeypatch, capsys, rank, waits):
    """The others wait until torchrun ends them; if it does not, they say it too."""
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        train.main(["--nonsense"])
    assert stop.value.code == 2 and "--nonsense" in capsys.readouterr().err
    assert waited == [errors.PATIENCE] * waits


def test_a_terminal_without_utf8_shows_a_caption_somehow(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with friendly_errors():
        print("café red")
    screen.flush()
    assert screen.buffer.getvalue() == b"caf\\xe9 red\n"


# ---------------------------------------------------------------- numbers that are none

@pytest.mark.parametrize("name", ["latents", "text"])
def test_clips_that_are_not_finite_are_named(tmp_path, name):
    clip = {"latents": torch.zeros(9, 4, 4, 6), "text": torch.zeros(4, 8)}
    save_file(clip, tmp_path / "0.safetensors")
    clip[name][1, 0] = torch.inf
    save_file(clip, tmp_path / "1.safetensors")
    cfg = train.TrainConfig(in_dim=4, text_dim=8, text_len=4, patch=2, stage=3, frames=9)
    folder = open_dataset(replace(cfg, data=str(tmp_path)), [])
    with pytest.raises(UsageError, match=f"1.safetensors holds {name} that are not finite"):
        folder.batch(range(20))


def test_trajectories_that_are_not_finite_are_named(small_run, tmp_path):
    """When they are read, and when they are written."""
    run = Run(small_config(1, "--init", small_run / "stage0", "--teacher", small_run / "stage0",
                           "--out", tmp_path), train.new_network)
    run.trajectories = [tmp_path / "000000.safetensors"]
    path = {"states": torch.full((2, 7, 8, 8, 8), torch.nan), "text": torch.zeros(4, 8)}
    save_file(path, run.trajectories[0])
    with pytest.raises(UsageError, match="000000.safetensors holds states that are not finite"):
        run.trajectory(data.Draws([0], 0))
    with pytest.raises(UsageError, match="states are not finite .*use float32"):
        files.save_finite(tmp_path / "a.safetensors", path)
    assert not (tmp_path / "a.safetensors").exists()


def test_clips_that_changed_since_a_stage_began_are_said(tmp_path, capsys):
    for name in "ab":
        colour_clip(tmp_path, f"{name}.gif")
    cfg = small_config(0, "--data", tmp_path, "--out", tmp_path.parent / "changed")
    runs.init_stage_dir(cfg, False)
    (runs.stage_dir(cfg) / "metrics.json").write_text("{}")
    assert runs.decide_resume(cfg, train.TrainConfig()) == "train"  # its weights are gone
    (runs.stage_dir(cfg) / "ema.safetensors").touch()
    assert runs.decide_resume(cfg, train.TrainConfig()) == "keep"
    assert "are not those" not in capsys.readouterr().err
    (tmp_path / "b.gif").unlink()
    assert runs.decide_resume(cfg, train.TrainConfig()) == "keep"
    assert "was begun with: clips have other numbers now" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", None])
def test_a_latent_file_that_was_cut_is_found_at_the_start(tmp_path, content):
    for name in ("a", "b", "c"):
        save_file({"latents": torch.zeros(9, 4, 4, 6), "text": torch.zeros(4, 8)},
                  tmp_path / f"{name}.safetensors")
    last = tmp_path / "c.safetensors"
    last.write_bytes(last.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UsageError, match="c.safetensors is not a readable safetensors file"):
        data.LatentFolder(tmp_path, 9)


def test_updates_of_one_step_are_one_bad_step():
    """Five updates of the fake score with one clip of NaN are no five steps in a row."""
    net = torch.nn.Linear(1, 1)
    run = SimpleNamespace(cfg=small_config(0, "--max-bad-steps", 3), nets={"fake": net}, step=0,
                          optimizers={"fake": []}, bad_steps={}, dir=Path("nowhere"))

    def update(value):
        net.weight.grad = torch.full((1, 1), value)
        net.bias.grad = torch.zeros(1)
        Run.update(run, "fake")

    for run.step in range(2):
        for _ in range(5):
            update(torch.nan)
    run.step = 2
    update(1.0)
    for run.step in range(3, 5):
        update(torch.nan)
    run.step = 5
    with pytest.raises(UsageError, match="step 6: 3 non-finite gradients in a row"):
        update(torch.nan)


def test_the_log_is_strict_json(tmp_path):
    """A reader that knows no NaN reads it; a run that goes on has it back."""
    def refuse(word):
        raise AssertionError(word)

    log = runs.StageLog(tmp_path, 0, 2, True)
    log.add(1, 0.5, {"loss": math.nan, "grad": 1.0})
    log.add(2, 0.6, {"loss": math.inf})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["loss"] for line in lines] == [None, None]
    log = runs.StageLog(tmp_path, 2, 2, True)
    log.close()
    assert math.isnan(log.rows[0]["loss"]) and log.rows[0]["grad"] == 1
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines


def test_minutes_of_a_run_that_goes_on_are_added(tmp_path, monkeypatch):
    """After 90 minutes and a pause the next step is made in the 91st."""
    run = rehearsal(0, "--iters", 3, "--save-every", 0)
    run.dir, run.is_main, run.began, run.step = tmp_path, True, time.time(), 2
    rows = [{"step": step, "minutes": 45.0 * step, "loss": 1.0} for step in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(map(runs.as_line, rows)))
    monkeypatch.setitem(train.STEPS, 0, lambda run: {"loss": 1.0})
    train.loop(run)
    *before, last = logs(tmp_path)
    assert before == rows and 90 <= last["minutes"] < 91


def test_a_table_is_printed_before_it_is_kept(small_run, tmp_path, monkeypatch, capsys):
    """On a disk that cannot be written to, scores are not lost."""
    def full(path, value):
        raise WriteError(f"cannot write {path}")

    monkeypatch.setattr(evaluate, "write_json", full)
    for name in ("stage_scores", "real_scores"):
        monkeypatch.setattr(evaluate, name, lambda folder, *args, **more: {"stage": folder.name})
    with pytest.raises(UsageError, match="cannot write .*stage1.*metrics.json"):
        evaluate.main([str(small_run / "stage1"), "--clips", "2"])
    assert "stage1" in capsys.readouterr().out


def test_scores_are_made_on_the_device_that_was_asked_for(small_run, monkeypatch):
    """Also on a machine with CUDA; the end of a stage asks for the stage's own."""
    seen = []
    monkeypatch.setattr(evaluate, "cuda_or_cpu", lambda: "cuda")
    monkeypatch.setattr(evaluate, "load_stage", lambda folder, device: seen.append(device) or 1 / 0)
    for score in (lambda: evaluate.main([str(small_run / "stage1"), "--device", "cpu"]),
                  lambda: evaluate.finish_stage(1, small_run / "stage1", 2, 0.1, "cpu"),
                  lambda: evaluate.stage_scores(small_run / "stage1")):
        with pytest.raises((ZeroDivisionError, UsageError)):
            score()
    assert seen == ["cpu", "cpu", "cuda"]


def test_clips_that_stand_still_have_no_dynamic():
    still = torch.rand(2, 1, 3, 8, 8).expand(2, 6, 3, 8, 8)
    scores = {"stage": 1, **evaluate.general_scores(torch.rand(2, 6, 3, 8, 8), still)}
    assert scores["dynamic_degree"] is None and "nan" not in evaluate.table([scores])
    moving = torch.rand(2, 6, 3, 8, 8)
    assert evaluate.general_scores(moving, moving)["dynamic_degree"] == 1


# ---------------------------------------------------------------- clocks

def test_streams_are_timed_by_two_clocks(monkeypatch):
    """Until both have shown enough: the wall runs faster on a busy host, and CPU seconds of many
    threads faster than the wall."""
    for per_chunk, expected in (((1.0, 0.25), 8), ((0.25, 1.0), 8), ((1.0, 1.0), 4)):
        time = [0.0, 0.0]

        def chunks():
            while True:
                time[0] += per_chunk[0]
                time[1] += per_chunk[1]
                yield

        monkeypatch.setattr(bench, "clocks", lambda device: tuple(time))
        number, wall, cpu = bench.timed_chunks(chunks(), torch.device("cpu"), 4, 2.0)
        assert number == expected and (wall, cpu) == tuple(time)
    words = bench.ratio_in_words([1.6, 8.0, 3.0], [3.1, 3.2, 3.3], gpu=False)
    assert words.startswith("3.20 times the frames by CPU time (3.10 to 3.30 in 3 rounds), which")
    assert bench.ratio_in_words([3.0], [1.0], gpu=True).startswith("3.00 times the frames by the w")
