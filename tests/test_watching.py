"""Watching a stage while it trains: previews, TensorBoard, Weights & Biases."""
import importlib.machinery
import json
import sys
import types

import pytest
import torch

import train
from scale import pictures
from tests.common import (SMALL, WAN, command, logs, several_processes, small_config, small_run,
                          small_wan, weights)
from utils import tracking
from utils.errors import UsageError


@pytest.mark.parametrize("stage", [0, 2])
def test_previews_change_no_weights(small_run, tmp_path, monkeypatch, stage):
    """Real clips and three numbers of passes, a white frame between, every second step; then the
    usual samples.png."""
    sheets, write = [], pictures.write_sheet
    monkeypatch.setattr(pictures, "write_sheet",
                        lambda path, video: sheets.append(video) or write(path, video))
    flags = ["--iters", 3, "--preview-every", 2, "--samples", 2, "--out", tmp_path]
    train.main(command(small_run, stage, *flags))
    ours, theirs = (weights(out / f"stage{stage}") for out in (tmp_path, small_run))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert [tuple(sheet.shape) for sheet in sheets] == [(2, 31, 3, 32, 32), (4, 7, 3, 32, 32)]
    parts = [sheets[0][:, start:start + 7] for start in (0, 8, 16, 24)]
    assert (sheets[0][:, 7::8] == 1).all() and torch.equal(parts[0], sheets[1][:2])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(parts, parts[1:]))
    assert (tmp_path / f"stage{stage}" / "samples.png").is_file()


def test_previews_of_several_processes(small_run, tmp_path):
    """All of them take part, one draws."""
    flags = ["--iters", 2, "--preview-every", 1, "--samples", 2, "--out", tmp_path]
    several_processes(2, tmp_path, *command(small_run, 2, *flags))
    assert (tmp_path / "stage2" / "samples.png").is_file()


def test_nothing_to_preview_is_said(tmp_path, capsys):
    with pytest.raises(UsageError, match="--samples 0 leaves --preview-every nothing"):
        small_config(0, "--preview-every", 5)
    small_wan(tmp_path)
    with pytest.raises(SystemExit):
        train.main([*WAN, "--teacher", str(tmp_path / "wan"), "--data", str(tmp_path / "latents"),
                    "--out", str(tmp_path / "out"), "--stage", "1", "--preview-every", "1"])
    assert "holds latents, which alone cannot be shown" in capsys.readouterr().err


def test_tensorboard_has_what_the_log_has(small_run, tmp_path):
    """Also after a killed run went on from an earlier step; and no weight changes."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    stage = tmp_path / "stage0"
    flags = ["--iters", 3, "--out", tmp_path, "--save-every", 1, "--log", "tensorboard"]
    train.main(command(small_run, 0, *flags))
    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    rows = logs(stage)
    for name in ("loss", "grad", "minutes"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert all(torch.equal(w, weights(small_run / "stage0")[k]) for k, w in weights(stage).items())
    again = tracking.open_tracker("tensorboard", stage, 1)
    again.add(2, {"loss": 7.0})
    again.close()
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")][1:] == [(2, 7.0)]


def test_wandb_has_what_the_log_has(small_run, tmp_path, monkeypatch):
    """A stand-in for the package notes what it is told: one run, also when the stage goes on."""
    told = []

    class Run:
        def log(self, numbers, step):
            told.append((step, numbers))

        def finish(self):
            told.append("finish")

    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.init = lambda **options: told.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", package)
    train.main(command(small_run, 0, "--iters", 3, "--out", tmp_path, "--log", "wandb"))
    first, *rows, last = told
    assert first["config"]["stage"] == 0 and first["name"].endswith("/stage0")
    assert rows == [(row["step"], row) for row in logs(tmp_path / "stage0")] and last == "finish"
    again = tracking.open_tracker("wandb", tmp_path / "stage0", 3)
    assert told[-1]["id"] == first["id"] and told[-1]["resume"] == "allow"
    again.close()


def test_a_missing_package_is_said_before_training(monkeypatch):
    with pytest.raises(UsageError, match="--log mlflow is unknown: choose from tensorboard, wandb"):
        small_config(0, "--log", "mlflow")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        small_config(0, "--log", "wandb")
