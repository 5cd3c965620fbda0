"""The toy world, its codec and captions, folders of clips."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import train
from tests.common import colour_clip, relative, small_config, tiny
from utils import media
from utils.errors import UsageError


def test_draws_do_not_depend_on_the_layout():
    both, second = data.Draws([3, 4], 0, "a"), data.Draws([4], 0, "a")
    assert torch.equal(both.randn(2, 3)[1:], second.randn(2, 3))
    assert torch.equal(both.rand(1)[1:], second.rand(1))
    assert not torch.equal(data.Draws([4], 1, "a").randn(3), data.Draws([4], 0, "a").randn(3))
    assert torch.equal(both.stratified_uniform()[1:], second.stratified_uniform())
    assert not torch.equal(data.Draws([4], 1, "a").stratified_uniform(),
                           data.Draws([4], 0, "a").stratified_uniform())
    # 16 clips anywhere: no two levels next to each other, no gap; over the steps a clip's place is
    # uniform
    for step in range(5):
        levels = data.Draws(range(16 * step, 16 * step + 16), step).stratified_uniform()
        gaps = levels.flatten().sort().values.diff()
        assert 0.4 / 16 < gaps.min() and gaps.max() < 1.7 / 16
    places = torch.cat([data.Draws([7], step).stratified_uniform() for step in range(400)])
    places = places.flatten().sort().values
    assert (places - torch.linspace(0, 1, 400)).abs().max() < 0.1
    often = data.Draws(range(200), "c").choice((0.0, 0.9, 0.1), 10)
    assert 0.85 < (often == 1).float().mean() < 0.95 and (often > 0).all()


def test_toy_world_is_what_it_says():
    world = data.ToyWorld(32, 16, 0)
    one, many = world.batch([7]), world.batch([3, 7])
    assert torch.equal(one["video"][0], many["video"][1]) and one["text"][0] == many["text"][1]
    video, state = many["video"], many["state"]
    assert video.shape == (2, 16, 3, 32, 32) and video.min() >= -1 and video.max() <= 1
    centres = world.centres(state, 200)
    assert centres.min() >= world.radius - 1e-4 and centres.max() <= 32 - world.radius + 1e-4
    steps = centres[:, 1:] - centres[:, :-1]
    # no wall in three steps
    assert torch.allclose(steps[:, :3], state["velocity"][:, None].expand(-1, 3, -1), atol=1e-4)
    colour, kind, _, *direction = many["text"][0].split()
    assert colour in data.COLOURS and kind in data.KINDS and "-".join(direction) in data.DIRECTIONS
    with pytest.raises(UsageError, match="--size"):
        data.ToyWorld(16)


def test_without_turns_the_shape_goes_straight_between_elastic_walls():
    """Against a path that is walked step by step. With turns the first four frames are the same; a
    longer path begins with the shorter."""
    straight, turning = data.ToyWorld(32, 40, 0), data.ToyWorld(32, 40, turns=0.2)
    state = straight.state(range(100))
    path, turned = straight.centres(state), turning.centres(state)
    at, velocity = state["start"].clone(), state["velocity"].clone()
    low, high = straight.radius, 32 - straight.radius
    for n in range(1, 40):
        at = at + velocity
        velocity = torch.where((at < low) | (at > high), -velocity, velocity)
        at = torch.where(at < low, 2 * low - at, torch.where(at > high, 2 * high - at, at))
        assert torch.allclose(path[:, n], at, atol=1e-3)
    assert torch.equal(turned[:, :4], path[:, :4]) and (turned[:, 4:] - path[:, 4:]).abs().max() > 5
    assert torch.allclose(turning.centres(state, 10), turned[:, :10], atol=1e-5)


def test_turns_of_a_known_path():
    """At frames 5 and 7, one way and back; what is drawn for frames 0 to 3 does not count."""
    u = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.05, 0.5, 0.15, 0.5])
    path = data.ToyWorld(32, 9, turns=0.2).walk(torch.tensor([16.0, 16.0]),
                                                torch.tensor([1.0, 0.0]), u)
    expected = [[16, 16], [17, 16], [18, 16], [19, 16], [20, 16], [20, 15], [20, 14], [21, 14],
                [22, 14]]
    assert torch.allclose(path, torch.tensor(expected).float(), atol=1e-4)


def test_the_shape_turns_by_quarters_and_keeps_its_speed():
    """Of what happens away from walls: one step in five after frame 3 is a quarter turn, to both
    sides alike."""
    world = data.ToyWorld(32, 14, turns=0.2)
    state = world.state(range(1500))
    path, speed = world.centres(state), state["velocity"].norm(dim=1)[:, None]
    # no wall in the steps to and from here
    step, free = path.diff(dim=1), ((path - 16).abs() < world.span / 2 - 2).all(-1)[:, 1:-1]
    one, two = step[:, :-1] / speed[..., None], step[:, 1:] / speed[..., None]
    assert (one.norm(dim=-1) - 1)[free].abs().max() < 1e-3
    assert (two.norm(dim=-1) - 1)[free].abs().max() < 1e-3
    # cosine and sine of the turn at frame 2, 3, ...
    straight, side = (one * two).sum(-1), one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0]
    assert (straight[:, :2][free[:, :2]] - 1).abs().max() < 1e-3
    straight, side = straight[:, 2:][free[:, 2:]], side[:, 2:][free[:, 2:]]
    assert torch.minimum(straight.abs(), (straight - 1).abs()).max() < 1e-3
    assert (straight < 0.5).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert abs(side.mean().item()) < 0.02


def test_futures_are_drawn_from_the_worlds_own_law():
    """They begin as the clip does. The clip's speed is one more draw: its rank among those of its
    futures is uniform, also of clips that start close before a wall, where only slow ones fit
    (speeds drawn as if there were no wall are 0.3 off)."""
    world, clips = data.ToyWorld(32, 10, turns=0.2), range(1500)
    state, paths = world.state(clips), world.futures(clips, 63)
    assert paths.shape == (1500, 63, 10, 2) and torch.equal(world.futures([7], 63)[0], paths[7])
    assert torch.allclose(paths[:, :, 0], state["start"][:, None].expand(-1, 63, -1), atol=1e-5)
    assert paths[0, :, -1].std(0).min() > 1
    steps, heading = paths[:, :, :4].diff(dim=2), world.directions[state["direction"]]
    speeds = (steps * heading[:, None, None]).sum(-1)
    # frames 0 to 3 go where the clip goes
    assert (steps - speeds[..., None] * heading[:, None, None]).abs().max() < 1e-4
    speeds, own = speeds.mean(2), state["velocity"].norm(dim=1)
    rank = (speeds < own[:, None]).float().mean(1)
    near = ((state["start"] + 3 * world.speeds[1] * heading - 16).abs() > world.span / 2).any(1)
    for rows, tolerance in ((torch.ones_like(near), 0.04), (near, 0.12)):
        found = rank[rows].sort().values
        assert len(found) > 80
        assert (found - torch.linspace(0, 1, len(found))).abs().max() < tolerance


def test_futures_are_as_fast_as_clips_that_start_there(monkeypatch):
    """Clips are drawn by speed first, then a start that leaves room for three steps: near the
    middle, among starts of all speeds, fast ones are denser (by 0.0095 pixels a frame here)."""
    world, heading, g = data.ToyWorld(32, 4, 0), 1, torch.Generator().manual_seed(0)
    middle = {**world.state([0]), "start": torch.full((1, 2), 16.0),
              "direction": torch.tensor([heading])}  # down-right
    monkeypatch.setattr(world, "state", lambda clip_ids: middle)
    found = world.futures([0], 40_000)[0].diff(dim=1)[:, 0].norm(dim=1).mean()
    low, high = world.speeds
    speed = low + (high - low) * torch.rand(1_000_000, generator=g)
    room = world.span - 3 * speed[:, None] * world.directions[heading]
    start = world.radius + room * torch.rand(1_000_000, 2, generator=g)
    clips = speed[((start - 16).abs() < 1.5).all(1)].mean()
    assert found.item() == pytest.approx(clips.item(), abs=0.004)


def test_word_encoder():
    words = data.WordEncoder(4, 8)
    a, b = words.encode(["red disc", "disc"])
    assert torch.equal(a[1], b[0]) and a[2:].abs().sum() == 0
    assert words.encode([""]).abs().sum() == 0
    assert words.encode(["one two three four five six"]).shape == (1, 4, 8)


def test_codec_inverts_and_survives_a_file(tmp_path, monkeypatch):
    video = data.ToyWorld(32, 4, 0).batch(range(32))["video"]
    full, part = data.PatchCodec.fit(video, 4, 48), data.PatchCodec.fit(video, 4, 24)
    assert relative(full.decode(full.encode(video)), video) < 0.02  # the ridge's part
    monkeypatch.setattr(data.PatchCodec, "ridge", 1e-9)
    exact = data.PatchCodec.fit(video, 4, 48)
    assert relative(exact.decode(exact.encode(video)), video) < 1e-3
    z = part.encode(video)
    assert z.shape == (32, 4, 24, 8, 8) and z.square().mean().item() == pytest.approx(1, abs=0.05)
    assert relative(part.decode(z), video) < 0.05
    part.save(tmp_path / "codec.safetensors")
    back = data.PatchCodec.load(tmp_path / "codec.safetensors")
    assert torch.equal(back.encode(video), z) and torch.equal(back.decode(z), part.decode(z))
    tensors = load_file(tmp_path / "codec.safetensors")
    # of an older version
    save_file({k: v for k, v in tensors.items() if k != "kernel"}, tmp_path / "codec.safetensors")
    with pytest.raises(UsageError, match="holds no codec"):
        data.PatchCodec.load(tmp_path / "codec.safetensors")
    (tmp_path / "codec.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match="not a readable"):
        data.PatchCodec.load(tmp_path / "codec.safetensors")


def test_the_decoder_reads_its_neighbours():
    """On clips it was not fitted to it makes at most 0.6 of the error of the linear inverse of the
    encoder; it is one convolution, so a latent reaches the 3 x 3 patches around it; frames are
    decoded one by one, so a stream is the whole."""
    world = data.ToyWorld(32, 10, turns=0.2)
    codec = data.PatchCodec.fit(world.batch(range(64))["video"], 4, 12)
    video = world.batch(data.held_out_ids(16))["video"]
    z = codec.encode(video)
    # (b, f, h, w, 3 * 4 * 4)
    patches = (z.movedim(2, -1) * codec.scale) @ codec.basis.T + codec.mean
    patches = patches.unflatten(-1, (3, 4, 4)).permute(0, 1, 4, 2, 5, 3, 6)
    inverse = patches.flatten(5, 6).flatten(3, 4)
    assert (codec.decode(z) - video).square().mean() < 0.6 * (inverse - video).square().mean()
    one = torch.zeros_like(z[:1, :1])
    blank = codec.decode(one)
    one[..., 4, 4] = 1
    reached = (codec.decode(one) - blank)[0, 0].abs().sum(0) > 1e-7
    assert reached[12:24, 12:24].float().mean() > 0.9
    assert reached.sum() == reached[12:24, 12:24].sum()
    assert torch.allclose(codec.decode(z + 2 * one) - codec.decode(z),
                          2 * (codec.decode(one) - blank).expand_as(video), atol=1e-5)  # linear
    part = codec.decoder()
    assert torch.equal(torch.cat([part(chunk) for chunk in z.split([1, 3, 3, 3], 1)], 1),
                       codec.decode(z))


def test_long_captions_are_cut_and_said_once(capsys):
    words = data.WordEncoder(3, 4)
    assert torch.equal(words.encode(["a b c d"]), words.encode(["a b c e"]))
    assert capsys.readouterr().err.count("--text-len 4") == 1


def test_folder_of_videos(tmp_path):
    for name in ("a.mp4", "b.webm", "c.mov", "d.gif", "e"):
        colour_clip(tmp_path, name)
    (tmp_path / "e").rename(tmp_path / "e.1")
    (tmp_path / "a.txt").write_text("it gets lighter\n")
    (tmp_path / "e.1.txt").write_text("a dot in its name")
    (tmp_path / "captions.csv").write_text(
        'file,caption\na.mp4,the .txt wins\nb.webm,"of two\nlines, and a comma"\n')
    line = '{"file": "c.mov", "caption": " of json\u2028"}'
    (tmp_path / "captions.jsonl").write_text(f"{line}\n\n", "utf-8")
    (tmp_path / "licence.txt").write_bytes(b"\xa9 nobody's caption, and not UTF-8")
    (tmp_path / "notes.md").write_text("not a video")
    folder = data.VideoFolder(tmp_path, size=16, frames=5)
    assert folder.texts == ["it gets lighter", "of two\nlines, and a comma", "of json", "",
                            "a dot in its name"]
    assert len(folder.videos) == 5 and all(c.shape == (12, 3, 16, 16) for c in folder.videos)
    batch = folder.batch(range(20))
    assert batch["video"].shape == (20, 5, 3, 16, 16)
    assert (batch["video"][:, -1] > batch["video"][:, 0]).all()
    assert {"it gets lighter", ""} <= set(batch["text"])
    assert torch.equal(folder.batch([3])["video"][0], batch["video"][3])
    half = media.read_video(tmp_path / "a.mp4", 16, fps=5)
    assert len(half) == 6
    named = data.dataset(SimpleNamespace(data=str(tmp_path), size=16, frames=5, fps=5.0))
    assert len(named.videos[0]) == 6
    assert (half[1].float() - media.read_video(tmp_path / "a.mp4", 16)[2].float()).abs().max() < 2


def test_every_clip_of_a_folder_is_drawn_as_often(tmp_path):
    """A video of 5 frames holds one clip of 5, one of 9 holds five: a sixth each."""
    for name, frames in (("short", 5), ("long", 9)):
        colour_clip(tmp_path, name, frames)
    clips = data.VideoFolder(tmp_path, size=8, frames=5).batch(range(600))["video"]
    ends = clips[:, [0, -1]].mean((2, 3, 4))  # which clip it is
    share = ends.unique(dim=0, return_counts=True)[1] / 600
    assert len(share) == 6 and (share - 1 / 6).abs().max() < 0.05


@pytest.mark.parametrize("make, message", [
    (lambda d: None, "no videos in"),
    (lambda d: (d / "x.mp4").write_bytes(b"nonsense"), "cannot be read as a video"),
    (lambda d: (d / "x.mp4").write_bytes(b""), "cannot be read as a video"),
    (lambda d: colour_clip(d, "short.mp4", frames=3), "has 3 frames, a clip needs 5")])
def test_bad_folders_are_explained(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UsageError, match=message):
        data.VideoFolder(tmp_path, 16, 5)
    with pytest.raises(UsageError, match="not a folder"):
        data.VideoFolder(tmp_path / "nowhere", 16, 5)


def test_a_clip_of_latents_is_the_beginning_of_its_file(tmp_path):
    """The first latent of a video VAE is one frame, the others are four: none begins later."""
    latents = torch.arange(11.0).view(11, 1, 1, 1).repeat(1, 4, 4, 6)
    save_file({"latents": latents, "text": torch.zeros(2, 8)}, tmp_path / "0.safetensors")
    folder = data.LatentFolder(tmp_path, 9)
    folder.network = tiny()
    assert all(torch.equal(clip, latents[:9]) for clip in folder.batch([0, 5])["latents"])


def test_captions_alone_and_clips_are_not_mixed(tmp_path):
    """The first file would decide how all are read, and the latents of the others be left."""
    text = torch.zeros(2, 4)
    save_file({"text": text}, tmp_path / "a.safetensors")
    save_file({"text": text, "latents": torch.zeros(9, 4, 4, 6)}, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="mixes clips with 1 captions alone"):
        data.LatentFolder(tmp_path, 9)


def test_latents_of_two_sizes_are_named(tmp_path):
    """Before training, for passes of one clip never compare two. Lengths may differ."""
    for name, shape in (("a", (9, 4, 4, 6)), ("b", (11, 4, 4, 6)), ("c", (9, 4, 6, 4))):
        save_file({"text": torch.zeros(2, 8), "latents": torch.zeros(shape)},
                  tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="a.safetensors and .*c.safetensors differ in the shape"):
        data.LatentFolder(tmp_path, 9)
    (tmp_path / "c.safetensors").unlink()
    assert len(data.LatentFolder(tmp_path, 9).paths) == 2


@pytest.mark.parametrize("negative, message", [
    ({"text": torch.zeros(3, 8)}, None), ({"words": torch.zeros(3, 8)}, "no embedded text"),
    ({"text": torch.zeros(8)}, "no embedded text"),
    ({"text": torch.zeros(3, 9)}, r"has text \(3, 9\), .*0.safetensors \(2, 8\), of another")])
def test_a_negative_prompt_that_does_not_fit_is_said(tmp_path, negative, message):
    (tmp_path / "negative").mkdir()
    save_file({"text": torch.zeros(2, 8)}, tmp_path / "0.safetensors")
    assert data.LatentFolder(tmp_path, 9).negative is None
    save_file(negative, tmp_path / "negative" / "text.safetensors")
    if message is None:
        assert data.LatentFolder(tmp_path, 9).negative.shape == (3, 8)
        return
    with pytest.raises(UsageError, match=message):
        data.LatentFolder(tmp_path, 9)
