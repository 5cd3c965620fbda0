"""The evaluator, calibrated on clips whose scores are known."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
from experiments import ablations, evaluate
from utils import media
from utils.errors import UsageError
from utils.files import write_json


@pytest.fixture(scope="module")
def scored():
    """Scores of real toy clips, and of what can be wrong with them."""
    torch.manual_seed(0)
    world = data.ToyWorld(32, 16, 0)
    state = world.state(data.held_out_ids(48))
    real = world.render(state)
    later = torch.tensor([0.0] + [1.0] * 15)[None, :, None]  # the image stays where it is
    wobble = world.centres(state) + torch.randn(48, 16, 2) * later
    blur = F.avg_pool2d(real.flatten(0, 1), 5, 1, 2, count_include_pad=False).view_as(real)
    fade = torch.linspace(0, 1, 16)[:, None, None, None]
    wrong_way = world.render({**state, "velocity": -state["velocity"]})
    videos = {"real": real, "frozen": real[:, :1].expand_as(real),
              "blurred": torch.cat([real[:, :1], blur[:, 1:]], 1),
              "colour": real * (1 - fade) + real.flip(2) * fade,
              "noisy": torch.cat([real[:, :1], real[:, 1:] + torch.randn_like(real[:, 1:]) / 2], 1),
              "jitter": world.render(state, wobble.clamp(world.radius, 32 - world.radius)),
              "wrong way": wrong_way,
              "broken": torch.cat([real[:, :1], torch.randn_like(real[:, 1:])], 1)}
    return {name: evaluate.exact_scores(world, state, video) for name, video in videos.items()}


def test_real_clips_score_perfectly(scored):
    s = scored["real"]
    assert s["quality_error"] < 0.002 and abs(s["dynamic_degree"] - 1) < 0.02
    assert abs(s["displacement"] - 1) < 0.02
    assert s["caption_agreement"] == 1 and s["jitter"] < 0.5 and s["ghosts"] == 0
    for name in ("imaging_quality", "subject_consistency", "background_consistency", "i2v_subject",
                 "i2v_background", "motion_smoothness"):
        assert s[name] > 94, name


def test_wrong_clips_lose_where_they_are_wrong(scored):
    real = scored["real"]
    assert scored["frozen"]["dynamic_degree"] < 0.02 and scored["frozen"]["quality_error"] < 0.002
    assert scored["frozen"]["caption_agreement"] < 0.3 and scored["frozen"]["displacement"] < 0.02
    assert scored["blurred"]["quality_error"] > 0.03
    assert scored["blurred"]["i2v_subject"] < real["i2v_subject"] - 1
    assert abs(scored["blurred"]["displacement"] - 1) < 0.05
    assert scored["colour"]["error_growth"] > 0.1
    assert scored["colour"]["subject_consistency"] < real["subject_consistency"] - 5
    assert scored["noisy"]["imaging_quality"] < 60
    assert scored["noisy"]["i2v_background"] < real["i2v_background"] - 10
    assert scored["jitter"]["jitter"] > 3 * real["jitter"]
    assert scored["jitter"]["motion_smoothness"] < real["motion_smoothness"] - 10
    assert scored["jitter"]["quality_error"] < 0.01 and scored["jitter"]["ghosts"] == 0
    assert scored["wrong way"]["caption_agreement"] < 0.2
    assert scored["wrong way"]["quality_error"] < 0.002


def test_a_caption_is_compared_with_the_last_frame():
    """Another kind of shape on the same path counts if it is there at the end, not if it was before
    it; the given image always shows the right one."""
    world = data.ToyWorld(32, 10, 0)
    state = world.state(range(8))
    real = world.render(state)
    other = world.render({**state, "kind": (state["kind"] + 1) % 3})
    for last, agreement in ((other[:, -1:], 0), (real[:, -1:], 1)):
        video = torch.cat([real[:, :1], other[:, 1:-1], last], 1)
        assert evaluate.exact_scores(world, state, video)["caption_agreement"] == agreement


def test_broken_frames_do_not_count_as_motion(scored):
    s = scored["broken"]
    assert s["dynamic_degree"] < 0.05 and s["displacement"] < 0.05 and s["imaging_quality"] < 5
    assert s["caption_agreement"] == 0
    assert s["ghosts"] == 1


def test_real_clips_that_turn_are_as_good_but_less_smooth():
    world = data.ToyWorld(32, 10, turns=0.2)
    state = world.state(data.held_out_ids(32))
    s = evaluate.exact_scores(world, state, world.render(state))
    assert s["quality_error"] < 0.002 and s["ghosts"] == 0 and s["caption_agreement"] == 1
    assert abs(s["displacement"] - 1) < 0.02
    assert s["jitter"] == pytest.approx(0.53, abs=0.08)


def test_one_broken_frame_makes_a_clip_a_ghost():
    world = data.ToyWorld(32, 6, 0)
    state = world.state(data.held_out_ids(4))
    video = world.render(state)
    video[2, 4] = world.layers(state)[0][2]  # no object
    video[3, 0] = 0  # the image is given, not judged
    s = evaluate.exact_scores(world, state, video)
    assert s["ghosts"] == 0.25 and s["quality_error"] == pytest.approx(1 / 20, abs=0.002)


def test_energy_of_known_clouds():
    """Two images: {0, 2} against {0, 1} is (2 * 1 - 2 - 1) / 1, {3, 3} against {0, 1} is (2 * 2.5 -
    0 - 1) / 1."""
    ours, theirs = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    ours[0, 1, 0, 0], ours[1, :, 0, 0], theirs[:, 1, 0, 0] = 2, 3, 1
    assert evaluate.energy_distance(ours.flatten(2), theirs.flatten(2)).tolist() == [-1, 4]
    s = evaluate.future_scores(ours, theirs)
    # variances 2 and 0 against 0.5 twice
    assert s["energy"] == 1.5 and s["spread"] == pytest.approx(2**0.5)
    assert evaluate.chunk_ends(10, 1, 3) == [3, 6, 9] and evaluate.chunk_ends(6, 0, 3) == [2, 5]


def test_energy_and_spread_tell_what_became_of_the_futures():
    images, ends = data.held_out_ids(evaluate.IMAGES), [3, 6, 9]
    world, g = data.ToyWorld(32, 10, turns=0.2), torch.Generator().manual_seed(0)
    theirs = world.futures(images, evaluate.FUTURES)
    own = evaluate.future_paths(None, None, vars(train.TrainConfig()), images)
    assert own.shape == (64, 16, 10, 2)

    # other draws than those that they are compared with: speeds in an image have nothing in common
    one, two = (paths[:, :16, 1] - paths[:, :16, 0] for paths in (own, theirs))
    one, two = (x.norm(dim=-1) - x.norm(dim=-1).mean(1, keepdim=True) for x in (one, two))
    assert F.cosine_similarity(one.flatten(), two.flatten(), 0).abs() < 0.15

    def scores(paths):
        return evaluate.future_scores(paths[:, :, ends], theirs[:, :, ends])

    itself, one = scores(own), scores(own[:, :1].expand_as(own))
    frozen = scores(own[:, :, :1].expand_as(own))
    ragged = scores(own + 3 * torch.randn(own.shape, generator=g))
    assert abs(itself["energy"]) < 0.02 and abs(itself["spread"] - 1) < 0.05
    assert one["spread"] == 0 and one["energy"] > 0.5
    assert frozen["spread"] == 0 and frozen["energy"] > 1.5
    assert ragged["spread"] > 1.15 and ragged["energy"] > 0.1


def test_seams_of_known_paths():
    """Only the turn where chunks meet counts, and only those between generated chunks."""
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    def seam(*steps):  # of a clip of 1 + 3 + 3 frames
        path = torch.cat([torch.zeros(1, 2), torch.stack(steps).cumsum(0)])
        return evaluate.seam_score(path[None, None], 1, 3)

    assert seam(*[east] * 6) == 1
    assert seam(north, east, east, east, north, north) == 1
    assert seam(*[east] * 3, *[north] * 3) == 0
    world = data.ToyWorld(32, 10, 0.2)
    assert 0.65 < evaluate.seam_score(world.futures(range(32), 32, 10), 1, 3) < 0.8


def test_drift_and_long_error_are_of_clips_four_times_as_long(quick_scores, monkeypatch):
    """Clips that are right for as long as was trained and then empty: 27 of 36 frames are as wrong
    as can be."""

    def make(net, codec, settings, clips, frames, steps, seed=0):
        world = data.ToyWorld(32, frames, 0)
        state = world.state(clips)
        video = world.render(state)
        video[:, 10:] = world.layers(state)[0][:, None]
        return video, [{"state": state}], world

    monkeypatch.setattr(evaluate, "make", make)
    s = evaluate.scores_of("a student", None, vars(train.TrainConfig(stage=1)), 8)
    assert s["quality_error"] < 0.002 and s["long_error"] == pytest.approx(0.75, abs=0.002)
    assert s["spread"] == 0
    assert s["long_quality"] == pytest.approx(25, abs=0.2)
    assert s["drift"] == pytest.approx(np.std([100, 80] + [0] * 6), abs=0.2)


def test_every_score_is_of_the_set_that_was_named(quick_scores, monkeypatch):
    """--held-out report: the clips, the long ones, the images and the world's futures of them."""
    seen, futures = [], data.ToyWorld.futures

    def make(net, codec, settings, clips, frames, steps, seed=0):
        seen.append(clips)
        world = data.ToyWorld(32, frames, 0)
        state = world.state(clips)
        return world.render(state), [{"state": state}], world

    monkeypatch.setattr(evaluate, "make", make)
    monkeypatch.setattr(data.ToyWorld, "futures", lambda world, clips, *more:
                        seen.append(clips) or futures(world, clips, *more))
    settings, report = vars(train.TrainConfig(stage=1)), data.held_out_ids(100, "report")
    assert evaluate.scores_of("a student", None, settings, 1, which="report")["energy"]
    assert len(seen) == 5 and all(set(clips) <= set(report) for clips in seen)


def test_drift_is_the_spread_over_segments():
    steady, falling = torch.full((3, 60), 80.0), torch.linspace(100, 0, 60).expand(3, -1)
    assert evaluate.drift(steady) == 0 and evaluate.drift(falling) == pytest.approx(30, abs=2)
    assert evaluate.drift(steady + torch.randn(3, 60)) < 1
    last = torch.zeros(1, 36)
    last[:, -1] = 80  # of four or five frames in its segment: a segment of its own would count 26
    assert evaluate.drift(last) == pytest.approx(20 * 7**0.5 / 8, abs=1e-4)
    assert evaluate.drift(torch.rand(1, 3)) < 50  # fewer frames than segments


def test_general_scores_without_knowledge_of_the_scene():
    real = data.ToyWorld(32, 16, 0).batch(data.held_out_ids(16))["video"]
    frozen, noisy = real[:, :1].expand_as(real), real + 0.5 * torch.randn_like(real)
    r, f, n = (evaluate.general_scores(v, real) for v in (real, frozen, noisy))
    assert r["dynamic_degree"] == pytest.approx(1) and f["dynamic_degree"] == 0
    assert f["i2v_fidelity"] == pytest.approx(100, abs=1e-3)
    noisy[:, 0] = real[:, 0]
    assert n["motion_smoothness"] < r["motion_smoothness"] - 5
    assert (evaluate.sharpness(noisy)[:, 1:].mean() > evaluate.sharpness(real)[:, 1:].mean()).item()


def test_scores_of_a_run_begin_with_real_clips(small_run, quick_scores, tmp_path, monkeypatch,
                                               capsys):
    """They are scored once for a run, and again for other clips; every stage's row says which clips
    it was."""
    for name in ("stage0", "stage1", "stage2"):
        shutil.copytree(small_run / name, tmp_path / name)
    calls, real_scores = [], evaluate.real_scores
    monkeypatch.setattr(evaluate, "real_scores",
                        lambda *args, **more: calls.append(args) or real_scores(*args, **more))

    def read(name):
        return json.loads((tmp_path / name / "metrics.json").read_text())

    for which, number in (("search", 1), ("search", 1), ("report", 2)):
        evaluate.main([*(str(tmp_path / name) for name in ("stage1", "stage2")), "--clips", "2",
                       "--held-out", which])
        rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
        assert rows[2:] == ["| real", "| 1", "| 2"] and len(calls) == number
        assert [(read(name)["clips"], read(name)["held_out"])
                for name in ("real", "stage1", "stage2")] == [(2, which)] * 3
    real, one = read("real"), read("stage1")
    assert real["quality_error"] < 0.05 < one["quality_error"]
    assert real["long_error"] < 0.05 < one["long_error"] and "minutes" in one
    before = read("stage2")
    evaluate.main([str(tmp_path / "stage2"), "--clips", "2", "--held-out", "report", "--steps", "2",
                   "--no-long"])
    assert read("stage2") == before  # of a question of its own
    capsys.readouterr()
    evaluate.summary(tmp_path)
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()
            if line.startswith("| ")][1:] == ["| real", "| 0", "| 1", "| 2"]


def test_a_recipe_without_a_control_shows_that_of_the_docs(tmp_path, capsys):
    """Marked as such, beside the docs' stage 3; not of a relative, and not beside one's own."""
    def written(name, recipe="aad-1"):
        folder = tmp_path / recipe / name
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", {"stage": 3, "energy": 0.5, "quality_error": 0.25})
        write_json(folder / "config.json", {"recipe": recipe})
        evaluate.summary(tmp_path / recipe)
        return capsys.readouterr().out

    documented = f"| {ablations.CONTROL.name} | 0.0"
    said = written("stage3")
    assert "Not trained here" in said and documented in said and "| 3 | 0.25 |" in said
    assert documented not in written("stage2-control")
    assert documented not in written("stage3", "one-forcing")


def test_a_mask_lies_on_its_object():
    """In what is cut out around an object, its silhouette is centred; a triangle's in width
    only."""
    world = data.ToyWorld(32, 3, 0)
    mask = evaluate.silhouettes(world, torch.arange(3))[:, 0, 0]
    ticks = torch.arange(mask.shape[-1]) - (mask.shape[-1] - 1) / 2
    for sums, kinds in ((mask.sum(1), [0, 1, 2]), (mask.sum(2), [0, 1])):
        assert (sums @ ticks)[kinds].abs().max() < 1e-3 and mask.sum() > 50


def test_a_video_of_one_frame_is_not_scored(tmp_path):
    with media.video_writer(tmp_path / "0.gif") as write:
        write(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UsageError, match="0.gif has 1 frames"):
        evaluate.main([str(tmp_path)])


def test_videos_are_scored_against_the_clips_of_their_numbers(tmp_path, capsys):
    """Of the world that is trained on by default, in which shapes turn."""
    numbers = range(3, 19)
    clips = [data.held_out_ids(1)[0] + n for n in numbers]
    videos = data.dataset(train.TrainConfig()).batch(clips)["video"]
    for n, video in zip(numbers, videos):
        with media.video_writer(tmp_path / f"{n}.gif") as write:
            write(video)
    s = evaluate.folder_scores(tmp_path)
    assert s["clips"] == 16 and s["quality_error"] < 0.01 and s["caption_agreement"] == 1
    assert s["ghosts"] == 0
    assert s["displacement"] == pytest.approx(1, abs=0.03)
    assert s["dynamic_degree"] == pytest.approx(1, abs=0.03)
