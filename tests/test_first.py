"""The first minute: a video without training, futures side by side, captions that change."""
import json
import re
import shutil

import pytest
import torch

import data
import sample
from experiments import evaluate, ship
from scale import serve
from tests.common import HERE
from utils import media
from utils.errors import UsageError, friendly_errors
from utils.files import read_tensors, write_json
from utils.runs import SHIPPED


def shipped():
    """(network, settings, image latents, text) of the shipped student and a toy clip."""
    net, codec, settings = sample.load_stage(SHIPPED)
    clip = data.ToyWorld(32, 10, 0).batch([data.held_out_ids(1)[0]])
    text = data.WordEncoder(settings["text_len"], settings["text_dim"]).encode(clip["text"])
    return net, settings, codec.encode(clip["video"][:, :1]), text


def test_a_video_where_nothing_was_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main([])
    said = capsys.readouterr().out
    assert "4 futures side by side: one image, seeds 0 to 3" in said and "assets/student" in said
    video = media.read_video("sample.mp4", (256, 4 * 256 + 3 * 16))
    assert len(video) == 25
    panels = [video[..., i * (256 + 16):][..., :256].float() for i in range(4)]
    first = [(panel[0] - panels[0][0]).abs().mean() for panel in panels[1:]]
    last = [(panel[-1] - panels[0][-1]).abs().mean() for panel in panels[1:]]
    assert max(first) < 3 and min(last) > 5  # one image, several futures


def test_futures_have_a_seed_each():
    net, settings, first, text = shipped()
    rows = [sample.generate(net, settings, first.expand(n, -1, -1, -1, -1), text.expand(n, -1, -1),
                            serve.seeded_noise(first.expand(n, -1, -1, -1, -1), seed), 7)
            for n, seed in ((3, 5), (1, 7))]
    assert torch.allclose(rows[0][2], rows[1][0], atol=1e-4)
    assert (rows[0][0] - rows[0][1]).abs().max() > 0.1


def test_the_shipped_networks_tell_nothing_of_their_machine():
    for name, stage in (("student", 3), ("teacher", 0)):
        folder = HERE / "assets" / name
        settings = json.loads((folder / "config.json").read_text())
        assert settings["stage"] == stage and "/" not in json.dumps(settings)
        weights = read_tensors(folder / "ema.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}
        assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6


@pytest.mark.slow
def test_the_shipped_networks_are_good():
    for name in ("student", "teacher"):
        scores = evaluate.stage_scores(HERE / "assets" / name, 32, long=False)
        assert scores["quality_error"] < 0.04 and scores["caption_agreement"] > 0.9


def test_shipping(small_run, tmp_path, capsys):
    """One command makes the folders again, from any run; an unfinished run replaces nothing."""
    ship.main([str(small_run), "--assets", str(tmp_path)])
    for stage, name in ship.NAMES.items():
        ours = read_tensors(tmp_path / name / "ema.safetensors")
        theirs = read_tensors(small_run / stage / "ema.safetensors")
        assert all(torch.equal(ours[k], theirs[k].bfloat16()) for k in theirs)
        assert sample.load_stage(tmp_path / name)[2]["stage"] == int(stage[-1])
    kept = (tmp_path / "teacher" / "ema.safetensors").read_bytes()
    run = tmp_path / "run"
    shutil.copytree(small_run / "stage0", run / "stage0")
    with pytest.raises(UsageError, match="stage3 holds no finished stage"):
        ship.main([str(run), "--assets", str(tmp_path)])
    shutil.copytree(small_run / "stage3", run / "stage3")
    settings = json.loads((run / "stage3" / "config.json").read_text())
    write_json(run / "stage3" / "config.json", {**settings, "data": "clips"})
    with pytest.raises(UsageError, match="does not come with the repository"):
        ship.main([str(run), "--assets", str(tmp_path)])
    assert (tmp_path / "teacher" / "ema.safetensors").read_bytes() == kept


def test_captions_that_change():
    """Every pass sees its chunk's text, the context pass that of the chunk it closes."""
    net, settings, first, text = shipped()
    seen = []

    def see(_, args, named):
        seen.append(int([*args[2:], *named.values()][0][0, 0, 0]))

    hook = net.register_forward_pre_hook(see, with_kwargs=True)
    texts = {0: 0, 1: 1, 4: 2, 7: 3}
    randn = serve.seeded_noise(first, 0)
    list(sample.generate_chunks(net, settings, first, lambda frame: 0 * text + texts[frame], randn,
                                10, 2))
    hook.remove()
    assert seen == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    with torch.no_grad():
        same = [sample.generate(net, settings, first, words, serve.seeded_noise(first, 0), 7)
                for words in (text, lambda frame: text)]
    assert torch.equal(*same)


def test_a_prompt_at_a_frame(tmp_path, capsys, monkeypatch):
    """The chunks before it stay bit for bit, those after it do not."""
    clips, chunks = [], sample.generate_chunks

    def kept(*args):
        clips.append(list(chunks(*args)))
        return clips[-1]

    monkeypatch.setattr(sample, "generate_chunks", kept)
    flags = ["--weights", str(SHIPPED), "--image", str(HERE / "assets" / "example.png"), "--prompt",
             "cyan disc moving left", "--frames", "13", "--out", str(tmp_path / "a.mp4")]
    sample.main(flags)
    sample.main([*flags, "--prompt-at", "6", "red square moving up", "--prompt-at", "10", ""])
    assert '"cyan disc moving left", from frame 6 "red square moving up", from frame 10 ""' in (
        capsys.readouterr().out)
    same = [torch.equal(a, b) for a, b in zip(*clips)]
    assert same == [True, True, True, False, False]  # chunks begin at 0, 1, 4, 7, 10


def test_where_a_caption_begins_in_latent_frames(monkeypatch):
    """Wan: latent n > 0 is video frames 4 n - 3 to 4 n; a caption waits for the next whole one."""
    args = serve.arguments(["--prompt", "0", *"--prompt-at 1 1 --prompt-at 6 2".split()], "")
    first = torch.zeros(1, 1, 4, 2, 2)
    made = type("Codec", (), {"ratio": 4})(), first, lambda c: torch.full((1, 1, 1), int(c)), "0"
    monkeypatch.setattr(serve, "wan_inputs", lambda *_: made)
    text = serve.inputs(args, None, {"first": 1, "stage": 2, "frames": 7, "chunk": 3}, "")[2]
    assert [int(text(n)) for n in range(5)] == [0, 1, 1, 2, 2]  # latent 3 begins with frame 9


@pytest.mark.parametrize("flags, message", [
    (["--prompt-at", "x", "b"], "--prompt-at x does not work"),
    (["--prompt-at", "9" * 5000, "b"], "does not work"),
    (["--prompt-at", "4", "b", "--prompt-at", "4", "c"], "each frame once, in rising order"),
    (["--weights", str(HERE / "assets/teacher"), "--prompt-at", "4", "b"], "is a teacher"),
    (["--text", "a.safetensors", "--prompt-at", "4", "b"], "--text is one embedded prompt: for "),
    (["--text", "a.safetensors", "--prompt", "b"], "--text is an embedded prompt: leave out"),
    (["--weights", str(SHIPPED), "--guidance", "0"], "is a student, whose guidance is trained in"),
    (["--weights", str(SHIPPED), "--text-device", "cpu"], "leave out --text-device"),
    (["--futures", "0"], "--futures 0 does not work"),
    (["--futures", "x"], "invalid int value")])
def test_bad_captions_and_futures_are_one_sentence(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop, friendly_errors():
        sample.main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("error:") == 1
    assert not re.search("Traceback", said) and not list(tmp_path.iterdir())
