"""Official weights, latents, captions, the Wan presets."""

import os
from dataclasses import fields
from types import SimpleNamespace

import imageio.v2 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import losses as L
import model as M
import sample
import train
from scale import encode, parallel, wan
from scale.run import Run
from tests.common import (WAN, colour_clip, inputs, largest_difference, network, relative,
                          several_processes, small_vae_and_text_encoder, small_wan, tiny, weights,
                          write_official)
from utils import files, media
from utils.errors import UsageError
from utils.weights import load_into, open_weights


def test_misuse_of_the_network_is_explained():
    net, (x, t, text) = network(tiny()), inputs(tiny())
    with pytest.raises(ValueError, match="patches"):
        net(x[..., :3], t, text)
    with pytest.raises(ValueError, match="tokens"):
        net(x, t, text.repeat(1, 2, 1))
    for more in (dict(mask=torch.ones(7, 7, dtype=torch.bool)), dict(positions=range(7))):
        with pytest.raises(ValueError, match="a cache has its own positions"):
            net(x, t, text, cache=M.KVCache(), **more)
    with pytest.raises(UsageError, match="lacks .*head.modulation"):
        load_into(net, {k: v for k, v in net.state_dict().items() if k != "head.modulation"},
                  "here")


@pytest.mark.parametrize("preset, keys", [("wan-1.3b", 825), ("wan-14b", 1095)])
def test_parameter_names_are_wans(preset, keys):
    with torch.device("meta"):
        net = M.build(M.Config(**M.PRESETS[preset]))
    names, d = {k: tuple(v.shape) for k, v in net.state_dict().items()}, net.cfg.dim
    assert len(names) == keys == 27 * net.cfg.num_layers + 15
    assert names["patch_embedding.weight"] == (d, 16, 1, 2, 2)
    assert names["head.modulation"] == (1, 2, d) and names["blocks.7.modulation"] == (1, 6, d)
    assert names["blocks.0.self_attn.norm_q.weight"] == (d,)
    assert names["blocks.3.ffn.0.weight"] == (net.cfg.ffn_dim, d)
    assert names["text_embedding.0.weight"] == (d, 4096)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["single", "sharded", "bfloat16", "generator", "generator_ema"])
def test_official_checkpoints_load_strictly(tmp_path, kind):
    cfg = tiny(precondition=False)
    net, (x, t, text) = network(cfg), inputs(cfg)
    loaded = load_into(M.build(cfg), open_weights(write_official(tmp_path / "wan", kind, net)),
                       tmp_path)
    error = relative(loaded(x, t, text), net(x, t, text))
    assert 0 < error < 2e-2 if kind == "bfloat16" else error == 0


def test_a_published_student_can_be_sampled_from(tmp_path, monkeypatch):
    cfg = tiny(precondition=False)
    shape = {f.name: getattr(cfg, f.name) for f in fields(M.Config)}
    monkeypatch.setitem(M.PRESETS, "wan-1.3b", shape)
    path = write_official(tmp_path, "generator_ema", network(cfg))
    net, codec, settings = sample.load_stage(path, preset="wan-1.3b")
    assert codec is None and settings["student_steps"] == 4 and settings["frames"] == cfg.frames
    x, _, text = inputs(cfg, b=1)
    with torch.no_grad():
        video = sample.generate(net, settings, x[:, :1], text,
                                lambda f: torch.randn(1, f, *x.shape[2:]), 7)
    assert video.shape == x.shape and video.isfinite().all()
    with pytest.raises(UsageError, match="add --preset"):
        sample.load_stage(path)


def test_wrong_official_checkpoints_are_one_sentence(tmp_path):
    net = network(tiny(precondition=False))
    folder = write_official(tmp_path / "wan", "single", net)
    for cfg, message in ((tiny(num_layers=3), r"lacks blocks.2.*, blocks.2.* \.\.\. \(27 in all\)"),
                         (tiny(num_layers=1), r"has unknown blocks.1.* \.\.\. \(27 in all\)"),
                         (tiny(ffn_dim=32),
                          r"has another shape of blocks.0.ffn.0.bias.*\(6 in all\)")):
        with pytest.raises(UsageError, match=message):
            load_into(M.build(cfg), open_weights(folder), folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        open_weights(folder)
    with pytest.raises(UsageError, match="does not exist"):
        open_weights(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no weights"):
        open_weights(tmp_path / "empty")


def test_processes_read_only_their_rows(monkeypatch):
    class Sharded:
        def __init__(self, whole, part):
            self.shape, self.part = whole.shape, part

        def to_local(self):
            return self.part

    for rows, size in ((10, 4), (8, 4), (3, 4), (1, 2)):
        whole = torch.arange(rows * 2).view(rows, 2)
        parts = list(torch.chunk(whole, size)) + [whole[:0]] * size
        for rank in range(size):
            monkeypatch.setattr(parallel, "world", lambda: (rank, size))
            target, own = parallel.local_shard(Sharded(whole, parts[rank]))
            assert torch.equal(whole[own], target)


def test_stages_from_official_weights_and_latents(tmp_path):
    """The Wan presets at a small size: no stage 0, no pictures, the same stages; and on two
    processes the same numbers."""
    names = small_wan(tmp_path).state_dict().keys()
    flags = ["--teacher", str(tmp_path / "wan"), "--data", str(tmp_path / "latents"), *WAN]
    train.main(["--out", str(tmp_path / "a"), *flags])
    assert not (tmp_path / "a" / "stage0").exists()
    assert weights(tmp_path / "a/stage3").keys() == names
    several_processes(2, tmp_path, "--stage", "1", "--out", str(tmp_path / "b"), *flags)
    one, two = weights(tmp_path / "a/stage1"), weights(tmp_path / "b/stage1")
    assert largest_difference(one, two) < 1e-5


def test_captions_alone_are_enough_for_two_stages(tmp_path, capsys):
    """Stage 1 lets the teacher make image and clip, stage 2 takes its images from there; stage 3
    needs real clips."""
    small_wan(tmp_path)
    (tmp_path / "texts" / "negative").mkdir(parents=True)
    for name in ("0", "1", "negative/text"):
        save_file({"text": torch.randn(4, 8)}, tmp_path / "texts" / f"{name}.safetensors")
    flags = ["--teacher", str(tmp_path / "wan"), "--out", str(tmp_path / "out"), *WAN,
             "--latent-size", "4", "6", "--data"]
    for stage in "12":
        train.main(["--stage", stage, *flags, str(tmp_path / "texts")])
        (tmp_path / "texts" / ".2.99.tmp.safetensors").write_bytes(b"a file that is being written")
    train.main(["--stage", "2", "--init", str(tmp_path / "out/stage2"), "--tag", "longer", *flags,
                str(tmp_path / "texts")])  # trained on
    states = load_file(tmp_path / "out/stage1/trajectories/000000.safetensors")["states"]
    # the image is made, too
    assert states.shape == (5, 9, 4, 4, 6) and (states[0] - states[-1])[0].abs().max() > 0.1
    with pytest.raises(SystemExit):
        train.main(["--stage", "3", *flags, str(tmp_path / "texts")])
    assert "a caption alone" in capsys.readouterr().err
    train.main(["--stage", "3", *flags, str(tmp_path / "latents")])
    run = Run(train.make_config(train.parse([*flags, str(tmp_path / "texts")]), 2),
              train.new_network)
    for n, length in enumerate((2, 4)):  # captions of another length in another pass
        save_file({"states": torch.randn(5, 9, 4, 4, 6), "text": torch.randn(length, 8)},
                  run.dir.parent / f"stage1/trajectories/{n:06d}.safetensors")
    states, text, _ = run.trajectory(run.batch(list(range(8)), "x").draws)
    assert states.shape[0] == 8 and text.shape == (8, 4, 8)
    assert run.negative.shape == (4, 8) and run.data.paths[0].parent.name == "trajectories"


def test_guidance_keeps_away_from_the_negative_prompt():
    cfg = tiny()
    net, (x, t, text) = network(cfg), inputs(cfg)
    negative = torch.randn(2, cfg.text_dim)
    padded = F.pad(negative, (0, 0, 0, text.shape[1] - 2)).expand_as(text)
    with torch.no_grad():
        expected = L.guide(net(x, t, text), net(x, t, padded), 3.0)
        assert relative(sample.with_cfg(net, text, 3.0, negative)(x, t), expected) < 1e-5


@pytest.mark.parametrize("latents, text, message", [
    ((11, 5, 4, 6), (4, 8), "the network takes 4 channels"),
    ((11, 4, 4, 5), (4, 8), "sides that divide by 2"), ((11, 4, 4, 6), (4, 9), "text up to 4 x 8"),
    ((8, 4, 4, 6), (4, 8), "8 latent frames, a clip needs 9"), ((4, 4), (4, 8), "holds no clip")])
def test_bad_latents_are_one_sentence(tmp_path, capsys, latents, text, message):
    small_wan(tmp_path / "good")
    save_file({"latents": torch.zeros(latents), "text": torch.zeros(text)},
              tmp_path / "0.safetensors")
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", "1", "--teacher", str(tmp_path / "good" / "wan"), "--data",
                    str(tmp_path), "--out", str(tmp_path / "out"), *WAN])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def encode_clips(tmp_path):
    """Encode a folder of clips, some of them bad, by a VAE and a text encoder of the real kinds;
    returns the command's words."""
    small_vae_and_text_encoder(tmp_path)
    (tmp_path / "clips").mkdir()
    for name, frames in (("a.mp4", 23), ("b.gif", 9), ("short.mp4", 5)):
        colour_clip(tmp_path / "clips", name, frames=frames)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "clips" / "captions.csv").write_text("file,caption\na.mp4,red disc\n")
    command = ["--videos", str(tmp_path / "clips"), "--out", str(tmp_path / "latents"), "--vae",
               str(tmp_path / "vae"), "--text-encoder", str(tmp_path / "umt5"), "--size", "32x48",
               "--frames", "9", "--fps", "0"]
    encode.main(command)
    return command


def test_videos_and_captions_become_latents(tmp_path, capsys):
    """Unreadable files are listed; a second call has nothing left to do."""
    command = encode_clips(tmp_path)
    said = capsys.readouterr().out
    complaints = ("3 clips", "broken.mp4 cannot be read",
                  "short.mp4 is shorter than a clip of 9 frames")
    assert all(part in said for part in complaints)
    assert load_file(tmp_path / "latents/negative/text.safetensors")["text"].shape[1] == 8
    clips = {p.stem: load_file(p) for p in (tmp_path / "latents").glob("*.safetensors")}
    assert clips.keys() == {"a.mp4-0000", "a.mp4-0001", "b.gif-0000"}
    assert clips["a.mp4-0001"]["latents"].shape == (3, 4, 4, 6)
    assert clips["a.mp4-0000"]["text"].shape == (2, 8)
    assert torch.equal(clips["a.mp4-0000"]["text"], clips["a.mp4-0001"]["text"])
    codec = wan.WanCodec(tmp_path / "vae")
    whole = media.read_video(tmp_path / "clips" / "a.mp4", (32, 48))[None, :9].float() / 127.5 - 1
    assert torch.allclose(codec.encode(whole)[0], clips["a.mp4-0000"]["latents"], atol=1e-6)
    latents, part = codec.encode(whole), codec.decoder()
    back = codec.vae.decode(latents.transpose(1, 2) * codec.std + codec.mean).sample.transpose(1, 2)
    assert back.shape == whole.shape and relative(codec.decode(latents), back) < 1e-5
    # a stream is the whole
    assert relative(torch.cat([part(latents[:, :1]), part(latents[:, 1:])], 1), back) < 1e-5
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "latents").glob("*.safetensors")}
    encode.main(command)
    said = capsys.readouterr().out
    assert all(part in said for part in complaints)  # they are said again
    assert times == {p: p.stat().st_mtime_ns for p in times}
    with pytest.raises(UsageError, match="was made with 32x48 9 frames"):
        encode.main([*command, "--size", "48x48"])
    (tmp_path / "prompts.txt").write_text("red disc\n\na blue square\n")
    encode.main(["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "texts"),
                 "--text-encoder", str(tmp_path / "umt5")])
    assert torch.equal(load_file(tmp_path / "texts/000000.safetensors")["text"],
                       clips["a.mp4-0000"]["text"])


def test_a_student_of_encoded_clips_is_sampled(tmp_path):
    """From videos to a stage, and from a photo or a caption alone to a video."""
    encode_clips(tmp_path)
    (tmp_path / "latents").rename(tmp_path / "mine")
    small_wan(tmp_path)
    train.main(["--stage", "1", "--teacher", str(tmp_path / "wan"), "--data",
                str(tmp_path / "mine"), "--out", str(tmp_path / "out"), *WAN, "--frames", "3",
                "--chunk", "2"])
    iio.imwrite(tmp_path / "photo.png", np.zeros((60, 80, 3), np.uint8))
    models = ["--vae", str(tmp_path / "vae"), "--text-encoder", str(tmp_path / "umt5"), "--size",
              "32x48"]
    sample.main(["--weights", str(tmp_path / "out" / "stage1"), "--image",
                 str(tmp_path / "photo.png"), "--prompt", "red disc", "--frames", "30", "--out",
                 str(tmp_path / "sample.mp4"), *models])
    assert media.read_video(tmp_path / "sample.mp4", (32, 48)).shape == (30, 3, 32, 48)
    stream = "--frames 13 --chunk 1 --sink 0 --window 2 --steps 2".split()  # no image: text alone
    sample.main(["--weights", str(tmp_path / "out" / "stage1"), "--prompt", "red disc", *stream,
                 "--out", str(tmp_path / "text.mp4"), *models])
    assert media.read_video(tmp_path / "text.mp4", (32, 48)).shape == (13, 3, 32, 48)


def test_texts_to_encode_are_checked_first(tmp_path):
    """Before minutes of loading; and a file of prompts that has become shorter leaves nothing
    behind."""
    (tmp_path / "prompts.txt").write_text("\n")
    for flags, message in ((["--prompts", str(tmp_path / "prompts.txt")], "has no captions"),
                           (["--videos", "nowhere", "--vae", "v"],
                            "nowhere is not a folder of videos"),
                           (["--videos", str(tmp_path), "--vae", "v", "--size", "0x0"],
                            "multiples of 16")):
        with pytest.raises(UsageError, match=message):
            encode.main(["--out", str(tmp_path / "out"), "--text-encoder", "t", *flags])
    assert not (tmp_path / "out").exists()
    encode.encode_prompts(["one", "two"], SimpleNamespace(encode=lambda caption: torch.zeros(1, 4)),
                          tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in files.clips_in(tmp_path / "out")} == {0o666 & ~umask}
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(UsageError, match="holds 2 files"):
        encode.main(["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"),
                     "--text-encoder", "t"])


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_wan_recipes(preset):
    """What the papers say of these sizes, and what makes a step fit."""
    one, two, three = (train.make_config({"preset": preset, "device": "cpu"}, stage)
                       for stage in (1, 2, 3))
    assert all(cfg.micro_batch == 1 and cfg.activation_checkpointing and cfg.ode_anchor == 0
               for cfg in (one, two, three))
    assert one.betas == (0.9, 0.999) and three.dmd_weight == 0 and three.gan_weight == 1
    assert (two.guidance, two.weight_decay, two.grad_clip, two.ema) == (4.0, 0.01, 10.0, 0.99)


def test_a_video_that_breaks_off_leaves_no_clips(tmp_path, monkeypatch):
    class Nothing:
        length = 512

        def __init__(self, *args, **kwargs):
            pass

        def encode(self, x):
            return torch.zeros(1, 2, 2, 2, 2) if torch.is_tensor(x) else torch.zeros(1, 4)

    def frames(path, size, fps=0.0):
        yield from torch.zeros(7, 3, 16, 16)
        if path.name == "b.mp4":
            raise UsageError(f"{path} cannot be read as a video")

    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    for name, value in (("CaptionEncoder", Nothing), ("WanCodec", Nothing),
                        ("iter_frames", frames)):
        monkeypatch.setattr(encode, name, value)
    encode.main(["--videos", str(tmp_path), "--out", str(tmp_path / "out"), "--vae", "v",
                 "--text-encoder", "t", "--size", "16x16", "--frames", "5"])
    assert [p.name for p in files.clips_in(tmp_path / "out")] == ["a.mp4-0000.safetensors"]
