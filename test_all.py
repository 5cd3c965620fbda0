"""What the method promises, one property per test. Everything else is tested in tests/.

    pytest -q            this file and tests/, about three minutes on two cores
    pytest -q -m slow    a shortened recipe, kills at random moments, compilation, Wan's encoders
    pytest -q -n 0       in one process, for a debugger

Reference vectors of upstream's classes are in goldens/. Everything runs on CPU, in float32.
"""
import functools
import json

from tests.common import (HERE, Known, command, flow_to, inputs, largest_difference, logs, network,
                          recorded, rehearsal, relative, rolled, several_processes, small_config,
                          small_run, timeless, tiny, weights)

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import data
import losses as L
import model as M
import sample
import train
from discriminator import Discriminator
from utils.errors import UsageError

TOLERANCE = 5e-6  # relative; the floor of the reference itself is 3e-7


def swap(x):
    """Reference layout (b, c, f, h, w) <-> ours (b, f, c, h, w)."""
    return x.transpose(1, 2)


# ---------------------------------------------------------------- reference vectors

@pytest.fixture(scope="module")
def golden():
    """(network with the reference weights, the tensors of the bidirectional file)"""
    path = HERE / "goldens" / "wan_bidir_A.safetensors"
    tensors, config = load_file(path), json.loads(safe_open(path, "pt").metadata()["config"])
    names = "dim ffn_dim num_heads num_layers in_dim out_dim freq_dim text_dim text_len eps".split()
    net = M.build(M.Config(precondition=False, **{name: config[name] for name in names}))
    own = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
    net.load_state_dict(own, strict=True)
    return net.eval(), tensors


@torch.no_grad()
def test_golden_bidirectional(golden):
    net, g = golden
    x = swap(g["x"])
    t = (g["t"].double() / 1000)[:, None].expand(-1, x.shape[1])
    y = swap(net(x, t, g["context"]))
    assert relative(y, g["y"]) < TOLERANCE and relative(y, g["y64"]) < TOLERANCE


@torch.no_grad()
def test_golden_cached(golden):
    net, cache = golden[0], M.KVCache(sink=0, window=None)
    g = load_file(HERE / "goldens" / "wan_causal_full_A.safetensors")
    for i in range(4):
        for s in range(2):
            if f"chunk{i}.noisy{s}" in g:
                t = g[f"chunk{i}.t{s}"].double() / 1000
                flow = net(swap(g[f"chunk{i}.noisy{s}"]), t, g["context"], cache=cache)
                assert relative(swap(flow), g[f"chunk{i}.flow{s}"]) < TOLERANCE
        flow = net(swap(g[f"chunk{i}.clean"]), torch.zeros(2, 3), g["context"], cache=cache)
        assert relative(swap(flow), g[f"chunk{i}.flow_ctx"]) < TOLERANCE
        cache.commit()


def teacher_forcing_mask(frames, first, chunk):
    """(2f, 2f) bool for [clean | noisy]: the clean half is block-causal; a noisy chunk sees the
    clean chunks before it, and itself. Such a pass equals cached inference on a clean history."""
    mask = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    mask[:frames, :frames] = M.block_causal_mask(frames, first, chunk)
    for start, end in M.chunk_bounds(frames, first, chunk):
        mask[frames + start:frames + end, :start] = True
        mask[frames + start:frames + end, frames + start:frames + end] = True
    return mask


@torch.no_grad()
@pytest.mark.parametrize("name, chunk", [("flow_tf", 3), ("flow_tf_chunk1", 1)])
def test_golden_teacher_forcing(golden, name, chunk):
    net, g = golden[0], load_file(HERE / "goldens" / "wan_causal_train_A.safetensors")
    x, t = torch.cat([swap(g["clean"]), swap(g["noisy"])], 1), g["t"].double() / 1000
    flow = net(x, torch.cat([0 * t, t], 1), g["context"], mask=teacher_forcing_mask(12, 0, chunk),
               positions=[*range(12), *range(12)])
    assert relative(swap(flow[:, 12:]), g[name]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name, mask", [
    ("flow_df", (12, 0, 3)), ("flow_df_chunk1", (12, 0, 1)), ("flow_df_local7", (12, 0, 3, 7)),
    ("flow_df_local6", (12, 0, 3, 6)), ("flow_df_indep_first", (7, 1, 3))])
def test_golden_diffusion_forcing(golden, name, mask):
    net, _ = golden
    g, f = load_file(HERE / "goldens" / "wan_causal_train_A.safetensors"), mask[0]
    noisy, t = swap(g["noisy"])[:, :f], g["t"][:, :f].double() / 1000
    flow = net(noisy, t, g["context"], mask=M.block_causal_mask(*mask))
    assert relative(swap(flow), g[name]) < TOLERANCE


def test_golden_schedule():
    g = load_file(HERE / "goldens" / "scheduler_shift5.safetensors")
    table = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    for name, shift in (("sigmas", 5.0), ("sigmas_shift3", 3.0), ("sigmas_shift8", 8.0)):
        assert relative(L.shift_time(table, shift), g[name]) < TOLERANCE
    warped = (g["warped_step_list"].double() / 1000).tolist()
    assert L.schedule(4, 5.0) == pytest.approx(warped, rel=1e-6)
    assert L.schedule(50, 5.0) == pytest.approx(g["sigmas_50"].tolist(), rel=1e-5)
    x0, eps, sigma = (g[name][:, None] for name in ("x0", "noise", "sigma_at_t"))
    x_t, flow = g["xt"][:, None], g["flow_pred"][:, None]
    assert relative(L.add_noise(x0, eps, sigma), x_t) < TOLERANCE
    assert relative(L.x0_from_flow(x_t, flow, sigma), g["x0_from_flow"][:, None]) < TOLERANCE
    # on purpose: we use t itself, the reference the nearest entry of a table without 0
    assert torch.equal(L.add_noise(x0, eps, torch.zeros(10, 1)), x0) and g["sigmas"].min() > 0.004


def test_golden_dmd():
    g = load_file(HERE / "goldens" / "dmd_loss.safetensors")
    real = L.guide(g["x0_real_cond"], g["x0_real_uncond"], 4.0)  # their scale 3 is 4 here
    guided = L.guide(g["x0_fake_cond"], g["x0_fake_uncond"], 2.5)
    for suffix, fake in (("", g["x0_fake_cond"]), ("_fakecfg", guided)):
        grad = L.dmd_gradient(g["x"], real, fake)
        assert relative(grad, g[f"grad{suffix}"]) < TOLERANCE
        x = g["x"].clone().requires_grad_()
        L.dmd_loss(x, grad).backward()
        assert relative(x.grad, g[f"dloss_dx{suffix}"]) < TOLERANCE
    levels = L.score_levels(g["t_raw"].double() / 1000, 5.0)
    assert relative(levels, g["t_used"] / 1000) < 2e-3  # they round to a table
    loss = L.fake_score_loss(lambda x_t, t: g["critic_flow_pred"], g["x"], g["critic_noise"],
                             torch.ones(2, 6))
    assert relative(loss, g["critic_loss"]) < TOLERANCE


# ---------------------------------------------------------------- network, masks, cache

def test_a_head_is_split_into_time_height_and_width():
    """Of 128: 44, 42, 42. A step along one axis turns its own part alone, by the right angles."""
    still, later = (M.rope_table((frame,), 2, 2, 128, "cpu").angle()[0, :, 0]
                    for frame in (0, 1))
    moved = [(later[0] - still[0]), (still[2] - still[0]), (still[1] - still[0])]  # t, h, w
    for delta, (start, width) in zip(moved, ((0, 44), (44, 42), (86, 42))):
        pairs = slice(start // 2, (start + width) // 2)
        freqs = 10000.0 ** (-torch.arange(0, width, 2) / width)
        assert torch.allclose(delta[pairs], freqs, atol=1e-5)
        assert delta.abs().sum() == pytest.approx(delta[pairs].abs().sum().item(), abs=1e-5)


@torch.no_grad()
def test_text_is_padded_with_zeros_that_count():
    net, (x, t, text) = network(tiny()), inputs(tiny())
    padded = torch.cat([text[:, :2], torch.zeros(2, 2, 8)], 1)
    assert torch.equal(net(x, t, text[:, :2]), net(x, t, padded))
    assert not torch.equal(net(x, t, text), net(x, t, padded))


def test_masks():
    mask = M.block_causal_mask(7, 1, 3)
    assert mask[0].tolist() == [True] + [False] * 6
    assert mask[2].tolist() == [True] * 4 + [False] * 3 and mask[6].all()
    assert M.block_causal_mask(7, 1, 3, reach=4)[6].tolist() == [False] * 3 + [True] * 4
    with pytest.raises(ValueError, match="--frames"):
        M.chunk_bounds(frames=8, first=1, chunk=3)


@torch.no_grad()
def test_cached_rollout_equals_masked_pass():
    """With clean context a cached rollout is the teacher-forced full pass, until frames leave."""
    cfg = tiny(precondition=True)
    net, (x, t, text), cache = network(cfg), inputs(cfg), M.KVCache(1, None)
    clean = torch.randn_like(x)
    full = net(torch.cat([clean, x], 1), torch.cat([0 * t, t], 1), text,
               mask=teacher_forcing_mask(7, 1, 3), positions=[*range(7), *range(7)])[:, 7:]
    for a, b in M.chunk_bounds(7, 1, 3):
        assert relative(net(x[:, a:b], t[:, a:b], text, cache=cache), full[:, a:b]) < 1e-5
        net(clean[:, a:b], 0 * t[:, a:b], text, cache=cache)
        cache.commit()


class EverythingCache(M.KVCache):
    """A reference that keeps every key for ever and chooses what a chunk may see when it is
    read."""

    def commit(self):
        """Append the present chunk; forget nothing."""
        layers = self.present
        if self.history:
            layers = [(torch.cat([pk, k], 1), torch.cat([pv, v], 1))
                      for (pk, pv), (k, v) in zip(self.history, self.present)]
        self.history, self.committed = layers, layers[0][0].shape[1]
        total = self.committed
        self.kept = [i for i in range(total) if i < self.sink or i >= total - self.window]
        self.past = [(k[:, self.kept], v[:, self.kept]) for k, v in self.history]


@torch.no_grad()
@pytest.mark.parametrize("sink, window, relative_positions",
                         [(1, 4, True), (0, 3, True), (2, 5, False), (1, 3, False)])
def test_eviction_equals_a_cache_that_keeps_everything(sink, window, relative_positions):
    net, (x, t, text) = network(tiny()), inputs(tiny(), f=13)
    kept = (sink, window, relative_positions)
    ours, reference = M.KVCache(*kept), EverythingCache(*kept)
    reference.history = None
    for a, b in M.chunk_bounds(13, 1, 3):
        one, two = (net(x[:, a:b], t[:, a:b], text, cache=cache) for cache in (ours, reference))
        assert relative(one, two) < 1e-6
        for cache in (ours, reference):
            net(x[:, a:b], 0 * t[:, a:b], text, cache=cache)
            cache.commit()
    assert ours.kept == reference.kept and len(ours.kept) == sink + window
    assert ours.kept[:sink] == list(range(sink)) and ours.kept[-1] == 12


def test_a_long_stream_is_constant_in_memory_and_stays_in_range():
    """31 frames: no position reaches sink + window + chunk, and the cache stops growing."""
    cfg = tiny(sink=1, window=4)
    net, (x, _, text), seen, sizes = network(cfg), inputs(cfg), [], []
    table = M.rope_table

    def spy(positions, *rest):
        seen.extend(positions)
        return table(positions, *rest)

    M.rope_table = spy
    try:
        for _ in sample.rollout(net, x[:, :1], text, lambda n: torch.randn(2, n, 4, 4, 4), 31):
            sizes.append(len(seen))
    finally:
        M.rope_table = table
    assert max(seen) == cfg.sink + cfg.window + cfg.chunk - 1
    growth = [b - a for a, b in zip(sizes, sizes[1:])]
    assert len(set(growth[3:])) == 1


@torch.no_grad()
def test_a_later_pass_replaces_the_chunks_entries():
    net, (x, t, text) = network(tiny()), inputs(tiny(), f=6)

    def run(levels):
        cache = M.KVCache(1, None)
        for level in levels:
            net(x[:, :3], torch.full((2, 3), level), text, cache=cache)
        cache.commit()
        return net(x[:, 3:], t[:, 3:], text, cache=cache)

    assert torch.equal(run([1.0, 0.5, 0.0]), run([0.0]))
    assert not torch.equal(run([0.5]), run([0.0]))


@pytest.mark.parametrize("level", [0.02, 0.5, 0.9])
def test_preconditioning_keeps_unit_variance(level):
    """What reaches the network has variance 1 at every level, and so has its target."""
    net, shown = network(tiny(precondition=True)), []
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 8, 7, 4, 16, 16)
    net.embed, embed = (lambda x, *rest: shown.append(x) or embed(x, *rest)), net.embed
    x_t = (1 - level) * x0 + level * eps
    with torch.no_grad():
        net(x_t, torch.full((8, 7), level), torch.zeros(8, 4, 8))
    assert shown[0].var().item() == pytest.approx(1.0, abs=0.02)
    power = (1 - level) ** 2 + level ** 2
    target = ((eps - x0) - (2 * level - 1) / power * x_t) * power ** 0.5
    assert target.var().item() == pytest.approx(1.0, abs=0.02)


# ---------------------------------------------------------------- losses

def test_conditioning_frames_carry_no_loss_and_parts_add_up():
    torch.manual_seed(0)
    x0, eps, t = torch.randn(4, 3, 2, 2, 2), torch.randn(4, 3, 2, 2, 2), torch.rand(4, 3)
    t[:, 0] = 0
    def wrong(x, t):
        return torch.full_like(x, 0.1)
    whole = L.flow_matching_loss(wrong, x0, eps, t)
    halves = [L.flow_matching_loss(wrong, *(y[i:i + 2] for y in (x0, eps, t))) for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(halves).item() / 2, rel=1e-6)
    eps[:, 0] += 100
    assert torch.equal(whole, L.flow_matching_loss(wrong, x0, eps, t))
    assert L.flow_matching_loss(lambda x, t: eps - x0, x0, eps, t) == 0
    x_t = L.add_noise(x0, eps, t)
    assert L.ode_regression_loss(lambda x, t: eps - x0, x_t, x0, t).item() < 1e-12
    assert torch.equal(x_t[:, 0], x0[:, 0])


def test_the_fake_score_sends_no_gradient_to_the_student():
    x = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    loss = L.fake_score_loss(lambda x_t, t: scale * x_t, x, torch.randn_like(x), torch.rand(2, 3))
    loss.backward()
    assert x.grad is None and scale.grad is not None


def test_dmd_moves_the_clip_towards_the_teacher():
    torch.manual_seed(0)
    x, target = torch.randn(2, 3, 4, 2, 2, requires_grad=True), torch.randn(2, 3, 4, 2, 2)
    L.dmd_loss(x, L.dmd_gradient(x.detach(), target, x.detach())).backward()
    assert (x - x.grad - target).norm() < (x - target).norm()
    assert L.dmd_gradient(x, x, x).abs().max() == 0  # nothing to learn
    assert L.dmd_gradient(x, x * torch.nan, x).isnan().all()  # a broken teacher is not hidden


@pytest.mark.parametrize("name", L.GAN_LOSSES)
def test_gan_losses_pull_the_right_way(name):
    d_loss, g_loss, paired = L.GAN_LOSSES[name]
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    d_loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    g_loss(real.detach() if paired else None, fake).backward()
    assert (fake.grad < 0).all()


def test_approximate_penalty_is_sigma_squared_times_the_gradient_penalty():
    torch.manual_seed(0)
    w, x, sigma = torch.randn(50), torch.randn(20000, 50), 0.05
    value = L.approx_r1_r2(lambda x: x @ w, x, x @ w, sigma * torch.randn_like(x)).item()
    assert value == pytest.approx(sigma ** 2 * w.square().sum().item(), rel=0.05)


# ---------------------------------------------------------------- discriminator

@pytest.mark.parametrize("granularity, shape",
                         [("clip", (2,)), ("chunk", (2, 2)), ("frame", (2, 6))])
@pytest.mark.parametrize("causal", [False, True])
def test_a_logit_sees_what_it_should(causal, granularity, shape):
    """The whole clip if bidirectional; if causal, everything to the end of its own chunk. Never
    another clip. The image has no logit of its own."""
    cfg = tiny()
    torch.manual_seed(0)
    disc = Discriminator(network(cfg), [0, 1], causal, granularity, queries=2)
    torch.nn.init.normal_(disc.out.weight)
    x, t, text = inputs(cfg)
    x.requires_grad_()
    logits = disc(x, t, text)
    assert logits.shape == shape
    one = logits[1] if granularity == "clip" else logits[1, 0]
    seen, = torch.autograd.grad(one, x)
    frames = (seen[1].abs().sum((1, 2, 3)) > 0).tolist()
    first_chunk = causal and granularity != "clip"
    assert frames == ([True] * 4 + [False] * 3 if first_chunk else [True] * 7)
    assert seen[0].abs().sum() == 0


# ---------------------------------------------------------------- what the training steps do
# rehearsal() is a stage at work on clips of noise, without files. Its networks are replaced by
# Known answers, or their calls are recorded().

def test_dmd_points_from_the_fake_score_to_the_teacher():
    """With a fake score that answers x, it is x - what the teacher answers, guided: here `target`
    with the caption and `away` with the negative prompt."""
    run = rehearsal(2, "--guidance", 2)
    run.negative = torch.ones(6, 32)
    batch = next(run.batches("roll"))
    x, (target, away) = batch.x0, torch.randn(2, *batch.x0.shape)
    answers = {"teacher": flow_to(torch.cat([target, away])), "fake": flow_to(x)}
    run.nets = {name: Known(run.cfg, answer) for name, answer in answers.items()}
    shown = [recorded(net) for net in run.nets.values()]
    grad, _ = train.dmd_term(run, x, batch, batch.draws, 0)
    direction = (x - L.guide(target, away, 2.0))[:, 1:]
    assert F.cosine_similarity(grad.flatten(), direction.flatten(), 0) > 0.99
    for call, in shown:
        assert (call.t[:, 0] == 0).all() and torch.equal(call.x[:len(x), 0], x[:, 0])
        assert (call.t[:, 1:] == call.t[:, 1:2]).all() and call.t[:, 1:].min() >= 0.02
        assert torch.equal(call.text[:len(x)], batch.text) and (call.text[len(x):] == 1).all()


@pytest.mark.parametrize("loss", L.GAN_LOSSES)
def test_the_student_climbs_the_discriminator(loss):
    """Where the logit rises with x, the student's gradient is negative, for every loss."""
    run = rehearsal(3, "--gan-loss", loss)
    run.nets["disc"] = Known(run.cfg, lambda x, t, text: x[:, 1:].flatten(1).sum(1))
    batch, calls = next(run.batches("roll")), recorded(run.nets["disc"])
    grad, _ = train.gan_term(run, batch.x0, batch, batch.draws, 0)
    assert all(torch.equal(call.x, calls[0].x) for call in calls)  # a real clip has the same noise
    assert grad.shape == batch.x0[:, 1:].shape and (grad < 0).all()


@pytest.mark.parametrize("loss", L.GAN_LOSSES)
def test_the_discriminator_learns_to_put_real_clips_above_generated_ones(loss):
    """A logit is `weight` times the clip, generated clips are brighter: the weight falls."""
    run = rehearsal(3, "--gan-loss", loss)
    batch = next(run.batches("roll"))
    disc = Known(run.cfg, lambda x, t, text: disc.weight * x.flatten(1).mean(1))
    run.nets["disc"], run.update = disc, lambda name: None
    train.disc_step(run, [(batch, batch.x0 + 1)], 0, 0)
    assert disc.weight.grad > 0


def test_weights_of_the_terms_are_applied_once(monkeypatch):
    """Terms of gradient 1 and 10 with weights .5 and .3: 3.5 reaches the clip."""
    run = rehearsal(3, "--dmd-weight", .5, "--gan-weight", .3, "--ode-anchor", 0)
    batch = next(run.batches("roll"))
    for name, value in (("dmd", 1.0), ("gan", 10.0)):
        monkeypatch.setitem(train.TERMS, name, lambda run, x, *_, value=value: (
            torch.full_like(x[:, 1:], value), {}))
    x = batch.x0.clone().requires_grad_()
    train.student_backward(run, x, batch, 0)
    assert torch.allclose(x.grad[:, 1:], torch.tensor(3.5)) and (x.grad[:, 0] == 0).all()


def test_what_the_discriminator_is_shown():
    """One level for all four calls, the image clean at t = 0; then real, generated, and each once
    more with noise of the set size, which leaves the image alone. Each has its own caption."""
    run = rehearsal(3, "--r1r2-sigma", 0.1, "--backbone-lr", 1e-4)
    batch = next(run.batches("roll"))
    batch.real = batch.x0, torch.randn_like(batch.text)
    generated = batch.x0 + 1
    generated[:, 0] = batch.x0[:, 0]
    calls = recorded(run.nets["disc"])
    train.disc_step(run, [(batch, generated)], 0, 0)
    real, fake, real_d, fake_d = (call.x for call in calls)
    t = calls[0].t
    for call, text in zip(calls, 2 * [batch.real[1], batch.text]):
        assert torch.equal(t, call.t) and torch.equal(text, call.text)
    assert (t[:, 0] == 0).all() and (t[:, 1:] == t[:, 1:2]).all()
    assert torch.equal(real[:, 0], batch.x0[:, 0])
    # same noise for both: they differ by the clean clips' difference, scaled by 1 - t
    assert torch.allclose(fake - real, (1 - L.expand_t(t)) * (generated - batch.x0), atol=1e-5)
    for clean, noisy in ((real, real_d), (fake, fake_d)):
        delta = noisy - clean
        assert (delta[:, 0] == 0).all()
        assert delta[:, 1:].std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("stage, batches, name, step", [
    (0, "teacher", "student", lambda run, *_: train.teacher_step(run)),
    (2, "roll", "fake", lambda run, *pair: train.fake_score_step(run, [pair], 0, 0))])
def test_the_image_is_clean_and_the_clip_at_one_level(stage, batches, name, step):
    """As the teacher sees real clips, and the fake score generated ones, here far brighter."""
    run = rehearsal(stage)
    batch, calls = next(run.batches(batches)), recorded(run.nets[name])
    step(run, batch, torch.cat([batch.x0[:, :1], batch.x0[:, 1:] + 100], 1))
    call, = calls
    assert (call.t[:, 0] == 0).all() and torch.equal(call.x[:, 0], batch.x0[:, 0])
    assert (call.t[:, 1:] > 0).all() and (call.t[:, 1:] == call.t[:, 1:2]).all()
    assert (call.x[:, 1:].mean() > 1) == (name == "fake")


def test_stage_1_shows_every_chunk_at_its_own_level_and_what_the_cache_keeps():
    """A frame is the trajectory's state of its own level, the image the clean end. At 13 frames
    some have left the window: the mask hides what the cache has dropped."""
    run = rehearsal(1, "--frames", 13, "--window", 3)
    cfg, cache = run.cfg, M.KVCache(1, 3)
    run.nets["student"], run.update = Known(cfg, flow_to(4.0)), lambda name: None
    calls = recorded(run.nets["student"])
    states = torch.arange(5.0).view(1, 5, 1, 1, 1, 1).expand(4, 5, 13, 8, 8, 8)  # state k is k
    run.trajectory = lambda draws: (states, torch.zeros(4, 6, 32), None)
    assert train.ode_step(run)["loss"] < 1e-6  # the student's answer is the clean end
    (call,), times = calls, torch.tensor([*L.schedule(4, cfg.shift), 0.0])
    assert (call.x == call.x[..., :1, :1, :1]).all() and (call.x[:, 0] == 4).all()
    assert torch.equal(call.t, times[call.x[..., 0, 0, 0].long()])
    assert (call.t[:, 1:] != call.t[:, 1:2]).any(1).all()  # within every clip
    for start, end in M.chunk_bounds(13, 1, 3):
        assert (call.t[:, start:end] == call.t[:, start:start + 1]).all()
        visible = [*cache.kept, *range(start, end)]
        assert all(row.nonzero()[:, 0].tolist() == visible for row in call.mask[start:end])
        cache.write([2 * (torch.zeros(1, end - start, 1, 1, 1),)])
        cache.commit()


def test_captions_are_dropped_as_often_as_asked():
    run = rehearsal(0, "--text-drop", 0.25, "--batch-size", 64)
    calls = recorded(run.nets["student"])
    for run.step in range(8):
        train.teacher_step(run)
    text = torch.cat([call.text for call in calls])
    dropped = (text.flatten(1).abs().sum(1) == 0).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.06)


def test_trajectories_keep_the_states_that_the_student_will_meet():
    """Times of the kept states are the student's schedule; the last is the clean end."""
    times = L.schedule(16, 8.0)
    v, noise = torch.ones(1, 4, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2)
    end, states = sample.sample_ode(lambda x, t: v, noise, noise[:, :1], times, range(0, 16, 4))
    # with v = 1, x at time t is t - 1
    met = [s[0, 1, 0, 0, 0].item() + 1 for s in states]
    assert met == pytest.approx(L.schedule(4, 8.0), abs=1e-5)
    assert end[0, 1, 0, 0, 0].item() == pytest.approx(-1, abs=1e-5) and (end[:, 0] == 0).all()


def test_ema_and_rates():
    """ema = d * ema + (1 - d) * student, d small when the student starts; the rate is half-way in
    mid warm-up, at its peak after, and falls over the last part of the student's own steps."""
    run = rehearsal(2, "--iters", 120, "--student-start", 20, "--lr-warmup", 10, "--lr-decay", 0.5,
                    "--ema", 0.9)
    average, student = (next(run.nets[name].parameters()) for name in ("ema", "student"))
    for run.step, decay in ((20, 0.1), (100, 0.9)):
        before = average.detach().clone()
        run.update_ema()
        assert torch.allclose(average, decay * before + (1 - decay) * student, atol=1e-6)
    factors = [run.lr_factor("student") for run.step in (24, 40, 95, 119)]
    assert factors == pytest.approx([0.5, 1.0, 0.5, 0.02])
    assert run.lr_factor("fake") == 1.0


def test_the_anchor_is_stage_1_from_pure_noise():
    """A student that says `offset` too much has the gradient 2 * weight * offset, of the frames it
    generates. It is shown the noise of a trajectory, its caption, and the clean chunks before."""
    run = rehearsal(2, "--ode-anchor", 0.3)
    path, text = torch.randn(4, 5, 7, 8, 8, 8), torch.randn(4, 6, 32)
    past = torch.randn(4, 7, 8, 8, 8)
    run.trajectory = lambda draws: (path, text, past)
    offset = torch.nn.Parameter(torch.zeros(()))

    def the_end(x, t, text):  # x is [past | noise], without the last chunk | without the image
        ends = torch.cat([x[:, :4], path[:, -1, 1:]], 1)
        return (x - ends - offset) * (t > 0)[..., None, None, None]

    run.nets["student"] = Known(run.cfg, the_end)
    calls, share = recorded(run.nets["student"]), 6 / 7  # the image counts as zero
    for value in (0.0, 0.5):
        offset.data.fill_(value)
        offset.grad = None
        log = train.anchor_step(run, next(run.batches("roll")))
        assert log["anchor"].item() == pytest.approx(share * value ** 2, abs=1e-6)
        assert offset.grad.item() == pytest.approx(share * 0.3 * 2 * value, abs=1e-4)
    call = calls[0]
    assert torch.equal(call.x, torch.cat([past[:, :4], path[:, 0, 1:]], 1))
    assert (call.t[:, 4:] == 1).all() and (call.t[:, :4] == 0).all()
    assert torch.equal(call.text, text)


def test_the_student_waits_for_its_first_step_and_takes_the_anchor_along(monkeypatch):
    """Before --student-start only the fake score learns. From then on every step has the anchor."""
    run, anchors = rehearsal(2, "--student-start", 1, "--probe-every", 0), []
    monkeypatch.setattr(train, "anchor_step", lambda run, batch: anchors.append(run.step) or {})
    student, fake = (run.nets[name].head.head.weight for name in ("student", "fake"))
    for run.step in range(2):
        before = student.detach().clone(), fake.detach().clone()
        train.distil_step(run)
        assert torch.equal(student, before[0]) == (run.step == 0)
        assert not torch.equal(fake, before[1])
    assert anchors == [1]


def test_held_out_clips_are_never_trained_on():
    """And those that settings are chosen by are not those of the tables."""
    # sample.py --seed reaches that far
    search, report = (data.held_out_ids(100_000, which) for which in ("search", "report"))
    assert not set(search) & set(report) and data.held_out_ids(3) == search[:3]
    run = train.Run(small_config(0, "--seed", "90"), train.new_network)  # the largest there is
    run.step = 100_000
    last = [clip for batch in run.batches("teacher") for clip in batch.clip_ids]
    trajectories = 90 * 10_000_000 + 5_000_000 + 1_000_000
    assert len(last) == 4 and max(*last, trajectories) < min(search[0], report[0])
    assert min(last) >= 90 * 10_000_000
    with pytest.raises(UsageError, match="--seed"):
        small_config(0, "--seed", 91)


# ---------------------------------------------------------------- the rollout

def test_an_exit_step_leaves_early():
    """Leaving after pass 0 of 4 is the one-step clip; after pass 1 it is not."""
    one, _ = rolled(tiny(), steps=1)
    first, _ = rolled(tiny(), steps=4, exit_step=0)
    second, _ = rolled(tiny(), steps=4, exit_step=1)
    assert all(torch.equal(a, b) for a, b in zip(one, first))
    assert not torch.equal(one[1], second[1])


def test_every_pass_sees_noise_of_its_own_level():
    """A student that answers 0 is shown nothing but noise, of standard deviation t."""
    net, (x, _, text), g = network(tiny()), inputs(tiny()), torch.Generator().manual_seed(0)
    calls = recorded(net)
    net.register_forward_hook(lambda _, args, flow: args[0] / L.expand_t(args[1]).clamp_min(1e-6))
    list(sample.rollout(net, x[:, :1], text, lambda n: torch.randn(2, n, 4, 4, 4, generator=g), 7,
                        steps=4))
    passes = [call for call in calls if call.t[0, 0] > 0]
    assert len(passes) == 8
    for call in passes:
        assert call.x.std().item() == pytest.approx(call.t[0, 0].item(), rel=0.1)


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_context_passes_show_the_finished_chunk_at_the_context_level(level):
    """image, chunk, its context pass, chunk: t is the level, and at 0 the very chunk is shown."""
    chunks, shown = rolled(tiny(), context_level=level)
    image, noise, context, _ = shown
    for call, t in zip(shown, (level, 1.0, level, 1.0)):
        assert torch.allclose(call.t, torch.tensor(t))
    assert torch.equal(context.x, chunks[1]) == (level == 0)


def test_gradients_of_a_rollout():
    """Through one chunk's exit pass there is a gradient; through earlier chunks' pixels there is
    none; with cache_grad the context passes join, and still no pixel does."""
    net, (x, _, text) = network(tiny()), inputs(tiny())
    noises, g = [], torch.Generator().manual_seed(0)

    def randn(n):
        noises.append(torch.randn(2, n, 4, 4, 4, generator=g).requires_grad_())
        return noises[-1]

    *_, last = sample.rollout(net, x[:, :1], text, randn, 7, steps=2, grad=True)
    reached = torch.autograd.grad(last.sum(), noises, allow_unused=True, retain_graph=True)
    assert [y is not None for y in reached] == [False, False, False, True]
    key = net.blocks[0].self_attn.k.weight
    plain, = torch.autograd.grad(last.sum(), key)
    made = iter(list(noises))
    *_, again = sample.rollout(net, x[:, :1], text, lambda _: next(made), 7, steps=2, grad=True,
                               cache_grad=True)
    assert relative(again, last) < 1e-6
    reached = torch.autograd.grad(again.sum(), noises, allow_unused=True, retain_graph=True)
    assert [y is not None for y in reached[:4]] == [False, False, False, True]
    assert relative(torch.autograd.grad(again.sum(), key)[0], plain) > 1e-3


def test_a_cut_clip_is_cut_at_its_end():
    """6 frames are the first 6 of 7."""
    net, (x, _, text) = network(tiny()), inputs(tiny())
    settings = {"stage": 2, "student_steps": 1, "context_level": 0.0}

    def made(frames):
        g = torch.Generator().manual_seed(0)
        return sample.generate(net, settings, x[:, :1], text,
                               lambda n: torch.randn(2, n, 4, 4, 4, generator=g), frames)

    assert torch.equal(made(6), made(7)[:, :6])


# ---------------------------------------------------------------- resume, processes

@pytest.mark.parametrize("stage", range(4))
def test_resume_is_bit_for_bit(small_run, tmp_path, stage, monkeypatch):
    """6 steps = 4 + crash + resume, EMA included: random numbers follow from the step."""
    flags = command(small_run, stage, "--iters", 6, "--save-every", 2)
    train.main(["--out", str(tmp_path / "a"), *flags])
    step, calls = train.STEPS[stage], []

    def crash(run):
        calls.append(run.step)
        if len(calls) == 6:
            raise ZeroDivisionError
        return step(run)

    monkeypatch.setitem(train.STEPS, stage, crash)
    with pytest.raises(ZeroDivisionError):
        train.main(["--out", str(tmp_path / "b"), *flags])
    train.main(["--out", str(tmp_path / "b"), *flags])
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5]
    one, two = (tmp_path / name / f"stage{stage}" for name in "ab")
    for file in ("weights", "ema"):
        a, b = (load_file(folder / f"{file}.safetensors") for folder in (one, two))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert timeless(one) == timeless(two)


@pytest.fixture(scope="module")
def plain(small_run, tmp_path_factory):
    """A function: stage -> (its command, its folder after 3 steps in one process, trained once)."""
    out = tmp_path_factory.mktemp("plain")

    @functools.cache
    def trained(stage):
        flags = command(small_run, stage, "--iters", 3, "--muon-lr", 0)
        train.main(["--out", str(out), *flags])
        return flags, out / f"stage{stage}"

    return trained


@pytest.mark.parametrize("stage", range(4))
def test_accumulation_is_the_same_batch(plain, tmp_path, stage):
    flags, folder = plain(stage)
    train.main(["--out", str(tmp_path), "--micro-batch", "2", *flags])
    one, two = weights(folder), weights(tmp_path / f"stage{stage}")
    assert max(relative(two[k], one[k]) for k in one if one[k].norm() > 1e-3) < 1e-4


@pytest.mark.parametrize("stage, processes, more", [
    (0, 2, ""), (1, 2, ""), (2, 2, "--activation-checkpointing"), (3, 2, ""),
    (1, 2, "--context-parallel 2"), (3, 4, "--context-parallel 2 --activation-checkpointing"),
    pytest.param(3, 4, "--activation-checkpointing", marks=pytest.mark.slow)])
def test_several_processes_are_one(plain, tmp_path, stage, processes, more):
    """Gloo processes and FSDP2 give the losses and weights of one process; so does
    checkpointing."""
    flags, one = plain(stage)
    several_processes(processes, tmp_path, "--out", str(tmp_path), *flags, *more.split())
    two = tmp_path / f"stage{stage}"
    assert largest_difference(weights(one), weights(two)) < 1e-5
    for a, b in zip(logs(one), logs(two)):
        for name in {"loss", "fake_loss", "d_real", "d_fake", "anchor"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-5)
