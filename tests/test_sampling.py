"""The sampling command."""

import os
import shutil
import signal

import imageio.v2 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import losses as L
import sample
from model import KVCache
from tests.common import inputs, network, recorded, rolled, tiny
from utils import media
from utils.errors import UsageError, friendly_errors


def test_sampling_command(small_run, tmp_path):
    photo = tmp_path / "photo.png"
    iio.imwrite(photo, (np.random.default_rng(0).random((60, 80, 3)) * 255).astype(np.uint8))
    for flags, frames in ((["--image", str(photo), "--prompt", "red disc moving left"], 7),
                          (["--from-data", "--frames", "20"], 20),
                          (["--from-data", "--steps", "4", "1", "--frames", "8"], 8)):
        out = tmp_path / f"{frames}.gif"
        sample.main(["--weights", str(small_run / "stage3"), *flags, "--out", str(out)])
        assert len(media.read_video(out, 32)) == frames
    sample.main(["--weights", str(small_run / "stage0"), "--from-data", "--out",
                 str(tmp_path / "teacher.mp4")])
    assert len(media.read_video(tmp_path / "teacher.mp4", 32)) == 7


def test_an_interrupted_stream_is_kept(small_run, tmp_path, monkeypatch, capsys):
    """And --from-data --seed N is the clip that evaluate.py calls N."""

    def interrupted(net, settings, first, *args):
        yield first
        os.kill(os.getpid(), signals.pop())
        yield first.expand(-1, 3, -1, -1, -1)
        pytest.fail("went on after Ctrl-C")

    monkeypatch.setattr(sample, "generate_chunks", interrupted)
    signals = [signal.SIGTERM, signal.SIGINT]
    for ending in ("mp4", "gif"):
        sample.main(["--weights", str(small_run / "stage3"), "--from-data", "--seed", "3", "--out",
                     str(tmp_path / f"3.{ending}")])
        assert len(media.read_video(tmp_path / f"3.{ending}", 32)) == 4
    clip = data.ToyWorld(32, 7, 0).batch([data.held_out_ids(1)[0] + 3])
    assert clip["text"][0] in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ("--weights nowhere --from-data", "nowhere does not exist"),
    ("--from-data --out x.avi", "mp4 or .gif"),
    ("--image none.png", "none.png is not a file"),
    ("--from-data --steps 0", "--steps 0 does not work"),
    ("--from-data --what", "unrecognized arguments"),
    ("--from-data --zoom -2", "--zoom -2 does not work"),
    ("--from-data --zoom 1000", "use 0 to 100"),
    ("--from-data --window -1", "--window -1 does not work"),
    ("--prompt circle", "animates an image"),
    ("--from-data --device tpu", "choose cuda, mps or cpu"),
    ("--weights stage1/ema.safetensors --from-data", "name its folder"),
    ("--weights stage0 --from-data --chunk 2", "is a teacher"),
    ("--weights stage0 --from-data --steps 4 1", "is a teacher"),
    ("--from-data --out file/x.gif", "cannot write"),
    ("--weights nowhere --out file/x.gif", "cannot write"),
    ("--weights nowhere --out x.gif --fps 60", "--fps 60 does not work for x.gif"),
    ("--from-data --frames 7 --prompt-at 5 blue", "--prompt-at 5: no chunk begins there or later"),
    ("--from-data --prompt red\udcff", "is no text in UTF-8"),
    ("--from-data --prompt-at 4 red\udcff", "is no text in UTF-8"),
    ("--weights bare --from-data", "bare has lost its codec.safetensors")])
def test_bad_sampling_is_one_sentence(small_run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("stage0", "stage1"):
        (tmp_path / name).symlink_to(small_run / name)
    (tmp_path / "file").touch()
    without = shutil.ignore_patterns("codec*")
    shutil.copytree(small_run / "stage1", tmp_path / "bare", ignore=without)
    with pytest.raises(SystemExit) as stop, friendly_errors():
        sample.main([*(() if "--weights" in flags else ("--weights", str(small_run / "stage1"))),
                     *flags.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("error:") == 1


def test_more_passes_cost_more_time(small_run):
    """One pass a chunk and four: 2 chunks, and the context passes of image and first chunk."""
    net, codec, settings = sample.load_stage(small_run / "stage3")
    text, first, g = torch.zeros(1, 6, 32), torch.zeros(1, 1, 8, 8, 8), torch.Generator()
    passes = []
    hook = net.register_forward_pre_hook(lambda *_: passes.append(1))
    for steps, expected in ((1, 2 + 2), (4, 8 + 2)):
        passes.clear()
        list(sample.rollout(net, first, text, lambda f: torch.randn(1, f, 8, 8, 8, generator=g), 7,
                            steps))
        assert len(passes) == expected
    hook.remove()


def test_passes_per_chunk_may_be_a_list():
    """4 1: First-Frame Enhancement."""
    _, shown = rolled(tiny(frames=10), steps=[4, 1])
    passes = [call.t[0, 0].item() for call in shown if call.t[0, 0] > 0]
    assert passes == pytest.approx([*L.schedule(4, 12.0), 1.0, 1.0])


@pytest.mark.parametrize("steps, chunks", [
    (2, [2, 2, 2]), ((2, 1), [2, 1, 1]), ([3, 2, 1], [3, 2, 1]), ([2], [2, 2, 2]),
    ((1.0, 0.3), [(1.0, 0.3)] * 3), ([1.0, 0.3], [(1.0, 0.3)] * 3), ((1.0,), [(1.0,)] * 3),
    ([(1.0, 0.3), 1], [(1.0, 0.3), 1, 1])])
def test_numbers_of_passes_and_their_times_are_told_apart(steps, chunks):
    """By their type: a tuple of settings and a list of a config.json mean the same."""
    _, shown = rolled(tiny(frames=10), steps=steps)
    passes = [call.t[0, 0].item() for call in shown if call.t[0, 0] > 0]
    times = [t for chunk in chunks
             for t in (L.schedule(chunk, 12.0) if isinstance(chunk, int) else chunk)]
    assert passes == pytest.approx(times)


@pytest.mark.parametrize("stage, chunks", [
    ({"stage": 0, "guidance": 1}, 1), ({"stage": 0, "teacher_forcing": 1}, 2), ({"stage": 2}, 2)])
def test_passes_that_are_asked_for_replace_those_of_training(stage, chunks):
    """Of a teacher, a causal teacher and a student; without being asked each makes its own."""
    net, (x, _, text) = network(tiny()), inputs(tiny())
    settings = {"ode_steps": 4, "student_steps": 4, "context_level": 0.0, **stage}
    calls = recorded(net)
    for asked, made in ((None, 4), (2, 2)):
        calls.clear()
        sample.generate(net, settings, x[:, :1], text, lambda n: torch.randn(2, n, 4, 4, 4), 7,
                        asked)
        passes = [call.t[0, -1].item() for call in calls if call.t[0, -1] > 0]
        assert passes == pytest.approx(L.schedule(made, 12.0) * chunks)


def test_passes_of_chunks_are_no_times():
    """Of a teacher, say, which has one chunk: the number 4 is not the noise level 4."""
    with pytest.raises(AssertionError, match="numbers of passes, or times"):
        sample.times_of([4], 12.0)


def test_without_context_passes_there_are_none():
    """--context-level below 0: only the image is passed to fill the cache."""
    _, shown = rolled(tiny(), context_level=-1.0)
    assert len(shown) == 3 and (shown[0].t == 0).all()


def test_without_context_passes_gradients_still_end_at_the_chunk():
    """What the exit pass leaves in the cache is detached."""
    net, (x, _, text), noises = network(tiny()), inputs(tiny()), []

    def randn(number):
        noises.append(torch.randn(2, number, 4, 4, 4).requires_grad_())
        return noises[-1]

    *_, last = sample.rollout(net, x[:, :1], text, randn, 7, grad=True, context_level=-1.0)
    reached = torch.autograd.grad(last.sum(), noises, allow_unused=True)
    assert [y is not None for y in reached] == [False, True]


def test_frames_that_are_not_finite_are_no_video(small_run, tmp_path):
    """A network whose weights are damaged: one sentence, and no file."""
    shutil.copytree(small_run / "stage3", tmp_path / "stage3")
    weights = load_file(tmp_path / "stage3" / "ema.safetensors")
    weights["head.head.bias"][0] = 3e38  # finite, but not what comes of it
    save_file(weights, tmp_path / "stage3" / "ema.safetensors")
    out = tmp_path / "a.mp4"
    with pytest.raises(UsageError, match="stage3 gives frames that are not finite"):
        sample.main(["--weights", str(tmp_path / "stage3"), "--from-data", "--out", str(out)])
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["stage3"]


def test_sampling_has_the_context_level_of_training():
    """What samples, scores and sample.py see is the stream that the student was trained in."""
    net, (x, _, text) = network(tiny()), inputs(tiny())
    calls = recorded(net)
    settings = {"stage": 2, "student_steps": 1, "context_level": 0.3}
    sample.generate(net, settings, x[:, :1], text, lambda n: torch.randn(2, n, 4, 4, 4), 7)
    assert [call.t.max().item() for call in calls] == pytest.approx([0.3, 1, 0.3, 1])


def test_absolute_positions_are_frame_numbers_when_frames_have_left():
    """Relative ones stay below sink + window + chunk."""
    for relative, wanted in ((False, ((9, 10), (0, 5, 6, 7, 8, 9, 10))),
                             (True, ((5, 6), (0, 1, 2, 3, 4, 5, 6)))):
        cache = KVCache(sink=1, window=4, relative=relative)
        for frames in (1, 2, 2, 2, 2):
            cache.write([(torch.zeros(1, frames, 1, 1, 1),) * 2])
            cache.commit()
        assert cache.positions(2) == wanted


def test_an_ode_keeps_the_image_and_says_that_it_is_clean():
    """Of every pass the image's frames have t = 0 and are the image; the others have the pass's."""
    image, noise, seen = torch.ones(2, 1, 4, 4, 4), torch.randn(2, 7, 4, 4, 4), []

    def velocity(x, t):
        seen.append((x, t))
        return torch.ones_like(x)

    clip, _ = sample.sample_ode(velocity, noise, image, L.schedule(3, 5.0))
    assert torch.equal(clip[:, :1], image)
    assert torch.allclose(clip[:, 1:], noise[:, 1:] - 1, atol=1e-5)
    for (x, t), level in zip(seen, L.schedule(3, 5.0), strict=True):
        assert torch.equal(x[:, :1], image) and (t[:, 0] == 0).all()
        assert torch.allclose(t[:, 1:], torch.tensor(level))
