"""AAD-1's relatives: what each switch does to losses, gradients and passes (docs/family.md)."""
import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import losses as L
import model as M
import sample
import train
from discriminator import Discriminator
from experiments import plan
from scale.clips import continue_clips, denoised_clip
from scale.recipes import FAMILY, stages_of
from scale.run import Run
from tests.common import (HERE, SMALL, Known, command, flow_to, inputs, largest_difference, logs,
                          network, recorded, relative, several_processes, small_config, timeless,
                          tiny, weights)
from utils.errors import UsageError
from utils.runs import start_from, trajectory_dirs
from utils.settings import as_words, flag

RELATIVES = [name for name in FAMILY["toy"] if name != "aad-1"]


def at_work(stage, *flags):
    """A stage of the small run at work, on clips of noise."""
    return plan.Rehearsal(small_config(stage, *flags))


def gradients(net, names):
    """Sum of absolute gradients of the parameters whose names start with `names`."""
    grads = [p.grad for name, p in net.named_parameters() if name.startswith(names)]
    return sum(g.abs().sum().item() for g in grads if g is not None)


def frozen_updates(monkeypatch, run):
    """Gradients stay where a step has left them: no optimizer moves or clears them."""
    monkeypatch.setattr(run, "update", lambda name: 0.0)


# ---------------------------------------------------------------- recipes

def test_a_recipe_is_its_flags():
    """--recipe sets what can be set flag by flag."""
    flags = ("--student-steps 4 --ode-anchor 0 --gan-weight 1 --gan-ratio 0.5 "
             "--gan-loss relativistic --gan-real more --disc-backbone detached "
             "--disc-updates 1 --disc-lr 4e-4 --tag asd")
    by_hand, by_name = (train.make_config(train.parse(words.split()), 2)
                        for words in (flags, "--recipe asd"))
    by_hand.recipe = "asd"
    assert by_hand == by_name


def test_stages_of_a_recipe():
    """What a relative shares with AAD-1 comes first, from the same folders."""
    def folders(*argv):
        configs = [train.make_config(given, n) for n, given in stages_of(train.parse(list(argv)))]
        return [(cfg.stage, cfg.tag) for cfg in configs], configs

    teachers = [(0, ""), (0, "causal-teacher")]
    assert folders()[0] == [*teachers, (1, ""), (2, ""), (3, "")]
    assert folders("--recipe", "asd")[0] == [*teachers, (1, ""), (2, "asd")]
    assert folders("--recipe", "no-context")[0][3:] == [(2, "no-context"), (3, "no-context")]
    assert folders("--recipe", "consistency")[0] == [*teachers, (1, "consistency")]
    assert folders("--recipe", "causal-teacher")[0] == teachers
    for flags in (("--recipe", "published"), ("--ode-context", "clean")):  # none continues clips
        assert (0, "causal-teacher") not in folders(*flags)[0]
    tags, configs = folders("--out", "x", "--teacher", "given")
    assert tags == [(0, "causal-teacher"), (1, ""), (2, ""), (3, "")]  # no plain one is trained
    assert configs[0].init == configs[2].teacher == "given"
    assert [str(path) for path in start_from(configs[1])] == 2 * ["x/stage0-causal-teacher"]
    assert folders("--teacher-forcing", "0.5")[1][1].teacher_forcing == 1  # that of the plain one
    with pytest.raises(UsageError, match="--recipe fast is unknown: choose from aad-1"):
        folders("--recipe", "fast")
    with pytest.raises(UsageError, match="has no stage 1 of its own: its stages are 0; leave out"):
        train.make_config(train.parse(["--recipe", "causal-teacher", "--stage", "1"]), 1)


@pytest.mark.parametrize("flags, sentence", [
    ("--gan-real more", "--student-steps 2 or more"),
    ("--gan-interval --student-steps 4 2", "one number of --student-steps, not 4 2"),
    ("--no-self-rollout --student-steps 4 2", "--no-self-rollout needs one number"),
    ("--disc-backbone shared --gan-weight 1 --dmd-weight 0", "--dmd-weight a number"),
    ("--gan-real teacher --gan-loss relativistic", "--gan-loss logistic"),
    ("--no-self-rollout --gan-interval", "which pass made a clip"),
    ("--no-self-rollout --gan-real more --student-steps 4", "which pass made a clip"),
    ("--student-steps 0", "from 1 up"), ("--teacher-forcing 2", "between 0 and 1")])
def test_switches_that_do_not_go_together(flags, sentence):
    with pytest.raises(UsageError, match=sentence):
        small_config(2, *flags.split())


@pytest.mark.parametrize("recipe", RELATIVES)
def test_a_relative_at_wans_shapes(recipe):
    """Every stage that a recipe changes can be planned at both presets, for many GPUs."""
    for preset in ("wan-1.3b", "wan-14b"):
        for stage in FAMILY[preset][recipe]:
            given = dict(preset=preset, recipe=recipe, dtype="bfloat16", device="cpu",
                         teacher="official", data="latents")
            cfg = train.make_config(given, stage)
            bytes_of = plan.static_bytes(cfg, 64)
            assert bytes_of["weights"] > 0 and cfg.micro_batch == 1


# ---------------------------------------------------------------- One-Forcing: a shared critic

def test_one_backward_trains_the_shared_critic(monkeypatch):
    """Backbone, flow head and heads all have gradients after one step; the student has none. Two
    passes: the real clip, and the student's, which gives flow and logit."""
    run = at_work(2, "--recipe", "one-forcing", "--r1r2-weight", 0, "--gan-real", "data")
    frozen_updates(monkeypatch, run)
    assert run.nets.keys() == {"ema", "student", "teacher", "fake"}
    batch, calls, net = next(run.batches("roll")), [], run.nets["fake"]
    net.backbone.register_forward_hook(lambda *args: calls.append(args))
    train.disc_step(run, [(batch, batch.x0 + 1)], 0, 0)
    assert len(calls) == 2 + 2  # and one each for R1 and R2, whose weight is 0
    for part in ("backbone.blocks.0", "backbone.head.", "heads.", "out."):
        assert gradients(net, part) > 0, part
    assert gradients(run.nets["student"], "") == 0


def test_the_weight_of_the_logit_leaves_the_flow_alone(monkeypatch):
    """--disc-weight 0: the shared step is the fake score's own."""
    run = at_work(2, "--recipe", "one-forcing", "--disc-weight", 0, "--gan-real", "data")
    frozen_updates(monkeypatch, run)
    batch, net = next(run.batches("roll")), run.nets["fake"]
    shown, old = [], net.backbone.forward
    net.backbone.forward = lambda x, t, text, **o: shown.append((x, t)) or old(x, t, text, **o)
    log = train.disc_step(run, [(batch, batch.x0)], 0, 0)
    assert gradients(net, "backbone.head.") > 0 and gradients(net, "heads.") == 0
    (_, t), (x_t, same) = shown[:2]
    assert torch.equal(t, same) and 0.02 <= t[:, 1].min() <= t[:, 1].max() <= 0.98
    with torch.no_grad():
        flow = net(x_t, t, batch.text, with_flow=True)[1]
    eps = (x_t - (1 - L.expand_t(t)) * batch.x0) / L.expand_t(t).clamp_min(1e-6)
    want = L.frame_mean((flow - (eps - batch.x0)).square(), t).item()
    assert log["fake_loss"] == pytest.approx(want, rel=1e-3)


def test_a_shared_critic_is_trained_at_the_fake_scores_levels():
    """--score-shift moves them, as those of a fake score alone. --gan-shift and --gan-t-max, of a
    discriminator of its own, are refused."""
    def levels(*flags):
        cfg, draws = small_config(2, "--recipe", "one-forcing", *flags), data.Draws(range(99), "t")
        return train.disc_level(cfg, draws, torch.zeros(99, 7, 1, 1, 1), 0)[:, 1]

    plain = levels()
    for more in (("--gan-shift", 5), ("--gan-t-max", 0.3), ("--gan-interval",)):
        with pytest.raises(UsageError, match="the levels of the fake score: add --gan-t-max 1"):
            levels(*more)
    inside = plain > 0.02  # not clamped
    shifted = L.score_levels(plain[inside], 5)
    assert torch.allclose(levels("--score-shift", 5)[inside], shifted, atol=1e-5)


def test_the_student_leaves_no_gradient_in_a_shared_critic():
    run = at_work(2, "--recipe", "one-forcing", "--gan-real", "data")
    batch = next(run.batches("roll"))
    x = train.student_clip(run, batch.x0, batch.text, batch.draws, 0, True)
    train.student_backward(run, x, batch, 0)
    assert gradients(run.nets["student"], "") > 0 and gradients(run.nets["fake"], "") == 0


def test_gradients_of_the_last_chunks_alone():
    """--grad-chunks 1: what is judged in earlier chunks changes no weight of the student."""
    run = at_work(2, "--grad-chunks", 1)
    batch, grads = next(run.batches("roll")), []
    for early in (0.0, 5.0):
        run.nets["student"].zero_grad()
        draws = run.draws(batch.clip_ids, "same")
        x = train.student_clip(run, batch.x0, batch.text, draws, 0, True)
        direction = torch.ones_like(x)
        direction[:, :4] += early
        x.backward(direction)
        grads.append([p.grad.clone() for p in run.nets["student"].parameters()
                      if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and grads[0]
    whole = train.student_clip(at_work(2), batch.x0, batch.text, draws, 0, True)
    assert whole[:, 1:4].requires_grad


@pytest.mark.parametrize("flags, recorded_passes", [
    ("--grad-chunks 0 --cache-grad", [True, True, True, True]),
    ("--grad-chunks 0 --no-cache-grad", [False, True, False, True]),
    ("--grad-chunks 1 --cache-grad", [False, False, True, True]),
    ("--grad-chunks 1 --no-cache-grad", [False, False, False, True])])
def test_a_context_pass_has_the_gradient_of_the_chunk_that_reads_it(flags, recorded_passes):
    """Image, chunk, its context pass, chunk: a chunk without a gradient fills no cache with one."""
    run, enabled = at_work(2, *flags.split()), []
    batch = next(run.batches("roll"))
    run.nets["student"].register_forward_pre_hook(
        lambda *_: enabled.append(torch.is_grad_enabled()))
    train.student_clip(run, batch.x0, batch.text, batch.draws, 0, True)
    assert enabled == recorded_passes


def test_real_clips_may_be_the_teachers():
    """--gan-real teacher: clean ends of trajectories, with their own captions."""
    run = at_work(2, "--recipe", "one-forcing", "--gan-real", "teacher")
    path, text = torch.randn(4, 5, 7, 8, 8, 8), torch.randn(4, 6, 32)
    run.trajectory = lambda draws: (path, text, None)
    clip, caption = train.real_clips(run, next(run.batches("roll")), 0)
    assert torch.equal(clip, path[:, -1]) and torch.equal(caption, text)


# ---------------------------------------------------------------- ASD: more passes are real

def test_the_clip_of_one_more_pass():
    """It has no graph, the noise of its own, and one more pass than the student's."""
    run = at_work(2, "--recipe", "asd")
    batch, seen = next(run.batches("roll")), []
    net = run.nets["student"]
    net.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[1][0, 0])))
    mine = train.student_clip(run, batch.x0, batch.text, batch.draws, [1], True)
    passes, noise = [t.item() for _, t in seen if t > 0], seen[1][0]
    seen.clear()
    clip, text = train.real_clips(run, batch, 1)
    more = [t.item() for _, t in seen if t > 0]
    assert mine.requires_grad and not clip.requires_grad and text is batch.text
    assert passes == pytest.approx(L.schedule(4, 12.0)[:2] * 2)
    assert more == pytest.approx(L.schedule(4, 12.0)[:3] * 2)
    assert not torch.equal(noise, seen[1][0])


def test_no_adversarial_term_after_the_last_pass(monkeypatch):
    """Of 4 passes there is no clip of 5: DMD alone, and the fake score's own updates. Elsewhere the
    discriminator's train it too, and count."""
    run = at_work(2, "--recipe", "asd", "--student-start", 0, "--probe-every", 0, "--fake-updates",
                  3)
    done, exits = [], iter([3, 1])
    for name in ("fake_score_step", "disc_step"):
        monkeypatch.setattr(train, name, lambda *_, name=name: done.append(name) or {})
    monkeypatch.setitem(train.TERMS, "gan", lambda run, x, *_: (
        done.append("gan") or torch.zeros_like(x[:, 1:]), {}))
    drawn = run.draws

    def draws(clip_ids, purpose):
        found = drawn(clip_ids, purpose)
        if purpose == "exit":
            found.choice = lambda *_: torch.tensor([[next(exits)]])
        return found

    run.draws = draws
    train.distil_step(run)
    assert done == ["fake_score_step"] * 3
    done.clear()
    train.distil_step(run)
    assert done == ["gan", "fake_score_step", "fake_score_step", "disc_step"]


def test_the_students_pair_is_the_clip_of_more_passes(monkeypatch):
    """Its logit is compared with that of the clip that the discriminator takes as real."""
    run, seen = at_work(2, "--recipe", "asd"), []
    batch, judge = next(run.batches("roll")), train.discriminate
    more, words = batch.x0 + 100, batch.text + 1
    batch.real = more, words
    monkeypatch.setattr(train, "discriminate", lambda run, x_t, text, t, *args, **options: (
        seen.append((x_t.detach(), text, t)) or judge(run, x_t, text, t, *args, **options)))
    train.gan_term(run, batch.x0, batch, run.draws(batch.clip_ids, "gan"), 1)
    (mine, text, t), (real, real_text, _) = seen
    assert text is batch.text and real_text is words  # of one noise and level
    assert torch.allclose(real - mine, 100 * (1 - L.expand_t(t)).expand_as(mine), atol=1e-3)


def test_swapping_the_pair_turns_the_gradient():
    run = at_work(2, "--recipe", "asd")
    batch, column = next(run.batches("roll")), []

    class Sum(torch.nn.Module):
        def forward(self, x, t, text, with_flow, detach):
            column.append(detach)
            return x[:, 1:].flatten(1).sum(1)[:, None] * torch.tensor([1.0, 2.0, 3.0]), None

    run.nets["fake"], x = Sum(), batch.x0
    batch.real = (x + 1, batch.text)
    towards, _ = train.gan_term(run, x, batch, batch.draws, 1)
    assert (towards < 0).all() and column[0] is False  # gradients pass through the features
    for passes in range(3):  # an output for each
        logits, _ = train.discriminate(run, x, batch.text, None, passes)
        assert torch.allclose(logits, x[:, 1:].flatten(1).sum(1) * (passes + 1))
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    d_loss, g_loss, _ = L.GAN_LOSSES["relativistic"]
    one = torch.autograd.grad(g_loss(real, fake), fake)[0]
    other = torch.autograd.grad(g_loss(fake, real), fake)[0]
    assert torch.equal(one, -other)


def test_the_ratio_of_the_terms_holds_clip_by_clip(monkeypatch):
    """--gan-ratio 0.5: the adversarial part of a clip's gradient is half as long as DMD's of the
    same clip, however different the clips, and keeps its direction."""
    run = at_work(2, "--gan-weight", 1, "--gan-ratio", 0.5, "--ode-anchor", 0)
    batch = next(run.batches("roll"))
    x, size = batch.x0.clone().requires_grad_(), torch.tensor([1.0, 10, 100, 1000])
    dmd, gan = torch.randn(2, *x[:, 1:].shape)
    dmd, gan = dmd * size.view(4, 1, 1, 1, 1), gan / size.view(4, 1, 1, 1, 1)
    for name, grad in (("dmd", dmd), ("gan", gan)):
        monkeypatch.setitem(train.TERMS, name, lambda *_, grad=grad: (grad.clone(), {}))
    train.student_backward(run, x, batch, 0)
    part, dmd, gan = ((x.grad[:, 1:] - dmd).flatten(1), dmd.flatten(1), gan.flatten(1))
    assert torch.allclose(part.norm(dim=1) / dmd.norm(dim=1), torch.tensor(0.5), rtol=1e-4)
    assert (F.cosine_similarity(part, gan) > 0.9999).all()


def test_outputs_of_a_discriminator_are_independent():
    """The loss of output n sends exactly no gradient to the others."""
    cfg = tiny()
    torch.manual_seed(0)
    disc = Discriminator(network(cfg), [0, 1], outputs=3)
    x, t, text = inputs(cfg)
    logits = disc(x, t, text)
    assert logits.shape == (2, 3)
    logits[:, 1].sum().backward()
    assert disc.out.weight.grad[1].abs().sum() > 0
    assert disc.out.weight.grad[[0, 2]].abs().sum() == 0


def test_heads_on_a_detached_backbone(monkeypatch):
    """The logit moves the heads alone, the flow the backbone alone, and the student's term passes
    through the features to the clip."""
    run = at_work(2, "--recipe", "asd", "--disc-weight", 1)
    net, batch = run.nets["fake"], next(run.batches("roll"))
    x = batch.x0
    t = L.make_timesteps(0.5, x, 1)
    logits, _ = train.discriminate(run, x, batch.text, t, 0)
    logits.sum().backward()
    assert gradients(net, "backbone.") == 0 and gradients(net, ("heads.", "out.")) > 0
    net.zero_grad()
    L.fake_score_loss(lambda x, t: train.fake_score(run, x, t, batch.text), x, torch.randn_like(x),
                      t).backward()
    assert gradients(net, "backbone.") > 0 and gradients(net, ("heads.", "out.")) == 0
    batch.real = (batch.x0, batch.text)
    torch.nn.init.normal_(net.out.weight)
    grad, _ = train.gan_term(run, x, batch, batch.draws, 0)
    assert grad.abs().sum() > 0
    run.update, moved = lambda name: None, []
    for run.cfg.disc_weight in (0, 1):  # one step trains both, and the logit leaves the backbone
        net.zero_grad()
        train.disc_step(run, [(batch, x + 1)], 0, 0)
        moved.append(gradients(net, "backbone."))
    assert moved[0] == pytest.approx(moved[1], rel=1e-6)


# ---------------------------------------------------------------- Diagonal Distillation

def test_dmd_on_differences_has_a_gradient():
    """Towards the teacher's motion, and zero for a clip that moves as the teacher would have
    it."""
    run = at_work(2, "--dmd-weight", 1, "--dmd-diff-weight", 1)
    batch = next(run.batches("roll"))
    x = batch.x0

    def direction(offset, weight):
        run.cfg.dmd_diff_weight = weight
        guesses = {"teacher": x + offset, "fake": x}
        for name, x0 in guesses.items():
            run.nets[name] = lambda x_t, t, text, x0=x0: torch.where(
                L.expand_t(t) > 0, (x_t - x0) / L.expand_t(t).clamp_min(1e-6), 0 * x_t)
        return train.dmd_term(run, x, batch, run.draws(batch.clip_ids, "same"), 0)[0]

    moving = torch.randn_like(x)
    assert relative(direction(moving, 1), direction(moving, 0)) > 0.1
    constant = torch.full_like(x, 0.5)  # the same motion: only the first difference, to the image
    change = direction(constant, 1) - direction(constant, 0)
    assert (change[:, 0] < 0).all() and change[:, 1:].abs().max() < 1e-6


def test_passes_in_training_are_those_in_use():
    """A list of passes gives the same clip in both; every chunk exits within its own number."""
    cfg, passes = tiny(frames=10), (4, 3, 2)
    net, (x, _, text) = network(cfg), inputs(cfg)

    def randn(n, g=None):
        return torch.randn(2, n, 4, 4, 4, generator=g)

    def clip(**options):
        g = torch.Generator().manual_seed(0)
        chunks = sample.rollout(net, x[:, :1], text, lambda n: randn(n, g), 10, passes, **options)
        return torch.cat(list(chunks), 1)

    settings = {"stage": 2, "student_steps": list(passes), "context_level": 0.0}
    g = torch.Generator().manual_seed(0)
    used = sample.generate(net, settings, x[:, :1], text, lambda n: randn(n, g), 10)
    assert torch.equal(used, clip()) and torch.equal(used, clip(exit_step=[3, 2, 1]))
    early = clip(exit_step=[3, 2, 0])
    assert torch.equal(early[:, :7], used[:, :7]) and not torch.equal(early[:, 7:], used[:, 7:])


@pytest.mark.parametrize("steps", [1, 2])
def test_without_context_pass_each_chunk_saves_one(steps):
    cfg, counts = tiny(), []
    net, (x, _, text) = network(cfg), inputs(cfg)
    for level in (0.0, -1.0):
        calls = []
        hook = net.register_forward_pre_hook(lambda *_: calls.append(1))
        for _ in sample.rollout(net, x[:, :1], text, lambda n: torch.randn(2, n, 4, 4, 4), 13,
                                steps, context_level=level):
            pass
        hook.remove()
        counts.append(len(calls))
    chunks = 4
    assert counts[0] - counts[1] == chunks - 1  # the last chunk needs none, the image keeps its own


# ---------------------------------------------------------------- CausVid, causal teacher

def test_causvids_clip_is_made_of_noised_real_ones():
    """One masked pass; every chunk at a level of the schedule; the image as it is."""
    run = at_work(2, "--recipe", "causvid")
    batch, shown = next(run.batches("roll")), []
    net = run.nets["student"]
    old = net.forward
    net.forward = lambda x, t, text, **o: shown.append((x, t, o)) or old(x, t, text, **o)
    clip = denoised_clip(run, batch, True)
    (x, t, options), = shown
    levels = torch.tensor([0.0, *L.schedule(4, 12.0)])
    assert (t[..., None] - levels).abs().min(-1).values.max() < 1e-6 and (t[:, 0] == 0).all()
    assert (t[:, 1:4] == t[:, 1:2]).all() and len(t[:, 1:].unique()) > 1
    assert torch.equal(clip[:, 0], batch.x0[:, 0]) and clip.requires_grad
    assert torch.equal(options["mask"], M.stream_mask(run.cfg))
    pure = t == 1
    assert pure.any() and abs(F.cosine_similarity(x[pure].flatten(), batch.x0[pure].flatten(),
                                                  0)) < 0.1


def test_a_causal_teacher_sees_clean_earlier_chunks():
    """What it says of a chunk depends on clean chunks before it and on the noisy chunk itself: not
    on its own clean version, nor on other noisy ones."""
    cfg = tiny()
    net, (x, _, text) = network(cfg), inputs(cfg)
    clean, noisy = x.clone().requires_grad_(), torch.randn_like(x).requires_grad_()
    t = L.make_timesteps(0.7, x, 1)
    flow = L.on_clean_context(net, clean, M.stream_mask(cfg), 1)(noisy, t, text)
    whole = L.on_clean_context(net, clean, M.stream_mask(cfg))(noisy, t, text)  # the image as well
    assert torch.allclose(flow[:, 1:], whole[:, 1:], atol=1e-5) and (flow[:, 0] == 0).all()
    seen = torch.autograd.grad(flow[:, 4:].sum(), (clean, noisy))
    frames = [(g.abs().sum((0, 2, 3, 4)) > 0).tolist() for g in seen]
    assert frames[0] == [True] * 4 + [False] * 3 and frames[1] == [False] * 4 + [True] * 3


def test_every_chunk_leaves_after_a_pass_of_its_own(monkeypatch):
    """--student-steps 4 3 2: the rollout gets an exit for each number, drawn within it."""
    run, seen, rollout = at_work(2, "--recipe", "diagonal", "--probe-every", 0), [], train.rollout
    monkeypatch.setattr(train, "rollout", lambda *args, **more:
                        seen.append(more["exit_step"]) or rollout(*args, **more))
    for run.step in range(1, 13):
        train.distil_step(run)
    assert all(len(exits) == 3 for exits in seen)
    for chunk, passes in enumerate((4, 3, 2)):
        assert {exits[chunk] for exits in seen} == set(range(passes))
    assert len({tuple(exits) for exits in seen}) > 5


@pytest.mark.parametrize("context", ("real", "clean", "noisy"))
def test_stage_1_shows_earlier_chunks_as_they_ended(context, tmp_path):
    """With a clean context the input is [past | states], and no chunk sees a state of another. The
    past are the trajectory's ends, or the real clip that it continues."""
    run = at_work(1, "--ode-context", context, "--ode-point-weights", 1, 0, 0, 0, 0)
    states = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 7, 8, 8, 8).clone()  # state k is k
    real = {"context": torch.full_like(states[0], 9)} if context == "real" else {}
    save_file({"states": states, "text": torch.zeros(6, 32), **real}, tmp_path / "0.safetensors")
    run.trajectories = [tmp_path / "0.safetensors"]
    run.trajectory = functools.partial(Run.trajectory, run)
    calls = recorded(run.nets["student"])
    train.ode_step(run)
    call, = calls
    x, t, mask = call.x[..., 0, 0, 0], call.t, call.mask
    assert (x[:, -6:] == 0).all() and (t[:, -6:] == 1).all()  # pure noise: the states of point 0
    if context == "noisy":
        assert x.shape[1] == 7 and mask[4:, 1:4].all()
    else:
        assert x.shape[1] == 10 and (x[:, :4] == (9 if real else 4)).all() and (t[:, :4] == 0).all()
        assert mask[7:, :4].all() and not mask[7:, 4:7].any() and mask[7:, 7:].all()


@pytest.mark.parametrize("flags", ("--guidance 1", "--guidance 2", "--frames 13 --window 3"))
def test_chunks_continue_real_clips_as_the_teacher_has_learnt(flags):
    """Trajectories chunk by chunk, through the cache, are those of one masked pass over [clean |
    noisy], also when frames leave the cache; a chunk depends on the real chunks before it alone."""
    run, keep = at_work(1, *flags.split()), range(0, 8, 2)
    batch, times = next(run.batches("ode")), L.schedule(8, 12.0)
    for p in run.nets["teacher"].parameters():
        torch.nn.init.normal_(p, std=0.2)
    noise = torch.randn_like(batch.x0)
    clean = batch.x0.repeat(2 if run.cfg.guidance > 1 else 1, 1, 1, 1, 1)  # two flows at once
    teacher = L.on_clean_context(run.nets["teacher"], clean, M.stream_mask(run.cfg), 1)
    velocity = sample.with_cfg(teacher, batch.text, run.cfg.guidance)
    one = sample.sample_ode(velocity, noise, batch.x0[:, :1], times, keep)
    two = continue_clips(run, batch, noise, times, keep)
    for a, b in zip([one[0], *one[1]], [two[0], *two[1]]):
        assert torch.allclose(a, b, atol=1e-4)
    batch.x0[:, 1:4] += 1
    moved = (continue_clips(run, batch, noise, times, keep)[0] - two[0]).abs().amax((0, 2, 3, 4))
    assert (moved[:4] == 0).all() and (moved[4:7] > 0.1).all()


def test_the_anchor_sees_the_past_that_its_trajectories_have(tmp_path):
    """From a stage 1 of whole clips their ends, also at stage 2's default, --ode-context real."""
    run = at_work(2)
    states = torch.randn(5, 7, 8, 8, 8)
    run.trajectories = [tmp_path / "0.safetensors"]
    for more, past in (({}, states[-1]), ({"context": states[0] + 1}, states[0] + 1)):
        save_file({"states": states, "text": torch.zeros(6, 32), **more}, run.trajectories[0])
        assert torch.equal(Run.trajectory(run, data.Draws([3], "x"))[2], past[None])


def test_a_share_of_the_teachers_steps_is_forced():
    """The same on every process: it depends on the step alone."""
    run, shown = at_work(0, "--teacher-forcing", 0.25), []
    run.nets["student"] = Known(run.cfg, lambda x, t, text: shown.append(x.shape[1]) or 0 * x)
    run.backward, run.update = (lambda *_: None), (lambda name: None)
    for run.step in range(200):
        train.teacher_step(run)
    assert 0.15 < shown.count(10) / 200 < 0.35 and shown.count(7) + shown.count(10) == 200


def test_teacher_forcing_shows_the_real_past():
    run = at_work(0, "--teacher-forcing", 1)
    shown, net = [], run.nets["student"]
    old = net.forward
    net.forward = lambda x, t, text, **o: shown.append((x, t)) or old(x, t, text, **o)
    batch = next(run.batches("teacher"))
    train.teacher_step(run)
    (x, t), = shown
    assert torch.equal(x[:, :4], batch.x0[:, :4]) and (t[:, :4] == 0).all() and (t[:, 4:] > 0).all()


def test_consistency_at_the_last_state_is_the_regression():
    """The neighbour of the last noisy state is the clean end: the same loss. Before it, it is
    not."""
    losses = []
    for weights_of in ("0 0 0 1 0", "1 0 0 0 0"):
        for target in ("end", "consistency"):
            run = at_work(1, "--ode-target", target, "--ode-point-weights", *weights_of.split())
            path = torch.randn(4, 5, 7, 8, 8, 8, generator=torch.Generator().manual_seed(0))
            run.trajectory = lambda draws, path=path: (path, torch.zeros(4, 6, 32), None)
            torch.manual_seed(0)
            for name in ("student", "ema"):
                torch.manual_seed(1)
                for p in run.nets[name].parameters():
                    torch.nn.init.normal_(p, std=0.05)
            losses.append(train.ode_step(run)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] != pytest.approx(losses[3], rel=1e-2)


def test_consistency_follows_the_running_average():
    """The target is the EMA's answer to the next state at the next state's level: here 4, where the
    student says 1."""
    run = at_work(1, "--ode-target", "consistency", "--ode-point-weights", *"1 0 0 0 0".split())
    states = torch.arange(5.0).view(1, 5, 1, 1, 1, 1).expand(4, 5, 7, 8, 8, 8)  # state k is k
    run.trajectory = lambda draws: (states, torch.zeros(4, 6, 32), None)
    run.nets = {"student": Known(run.cfg, flow_to(1.0)), "ema": Known(run.cfg, flow_to(4.0))}
    run.update, calls = lambda name: 0.0, recorded(run.nets["ema"])
    loss = train.ode_step(run)["loss"]
    assert loss == pytest.approx((4 - 1) ** 2 * 6 / 7, rel=1e-5)  # the image counts as zero
    (call,), next_level = calls, L.schedule(4, run.cfg.shift)[1]
    assert (call.x[:, 1:] == 1).all() and torch.allclose(call.t[:, 1:], torch.tensor(next_level))


def test_eulers_method_inside_a_chunk():
    """--ode of a rollout follows the flow: with the exact flow of one clip every number of passes
    ends there, and adds no noise."""
    cfg = tiny()
    net, (x, _, text), asked = network(cfg), inputs(cfg), []

    def exact(x_t, t, text, cache):
        start = cache.committed
        cache.present = [(torch.zeros(2, x_t.shape[1], 1, 1, 1),) * 2]
        target = x[:, start:start + x_t.shape[1]]
        return torch.where(L.expand_t(t) > 0, (x_t - target) / L.expand_t(t).clamp_min(1e-6), 0.0)

    def randn(n):
        asked.append(n)
        return torch.randn(2, n, 4, 4, 4)

    exact.cfg = net.cfg
    clip = torch.cat(list(sample.rollout(exact, x[:, :1], text, randn, 7, 4, ode=True)), 1)
    assert torch.allclose(clip, x, atol=1e-5) and asked == [3, 3]


def test_passes_of_a_chunk_are_those_of_a_clip():
    """With any network, not the exact flow alone: a chunk after the image follows the ODE as
    sample_ode() does, every pass starting where the one before led."""
    net, (x, _, text) = network(tiny()), inputs(tiny())
    noise, cache = torch.randn(2, 3, 4, 4, 4), M.KVCache()
    net(x[:, :1], torch.zeros(2, 1), text, cache=cache)
    cache.commit()
    times = L.schedule(5, net.cfg.shift)
    want = sample.sample_ode(lambda x, t: net(x, t, text, cache=cache), noise, x[:, :0], times)[0]
    chunks = sample.rollout(net, x[:, :1], text, lambda n: noise, 4, 5, ode=True)
    assert torch.allclose([*chunks][1], want, atol=1e-5)


def test_the_solver_is_of_second_order():
    """On data that are normal the best guess and the ODE's path are known. Half as long steps in
    log SNR have a quarter of the error, Euler's half of it."""
    mean, deviation = 0.7, 0.3

    def spread(t):
        return ((1 - t) ** 2 * deviation ** 2 + t ** 2) ** 0.5

    def path(t):
        return (1 - t) * mean + spread(t) * 1.3

    def error(steps, second):
        log_snr = torch.linspace(-4, 4, steps + 1, dtype=torch.float64)
        times = torch.sigmoid(-log_snr).tolist()
        x, before = torch.tensor([path(times[0])], dtype=torch.float64), None
        for t, t_next in zip(times, times[1:]):
            off = (x - (1 - t) * mean) / spread(t) ** 2
            x0 = mean + (1 - t) * deviation ** 2 * off
            x, before = L.solver_step(x, x0, t, t_next, before), (x0, t) if second else None
        return abs(x.item() - path(times[-1]))

    euler, second = (error(64, order) / error(128, order) for order in (False, True))
    assert euler == pytest.approx(2, abs=0.2) and second == pytest.approx(4, abs=0.5)
    x, x0, before = torch.rand(3), torch.rand(3), torch.rand(3)
    for last in (1.0, 0.9), (0.9, 0.0):  # from noise and to the clean end it has no slope
        t = 0.9 if last[1] == 0 else 0.95
        plain = L.solver_step(x, x0, t, 0.0 if last[1] == 0 else 0.9)
        assert torch.equal(L.solver_step(x, x0, t, 0.0 if last[1] == 0 else 0.9,
                                      (before, last[0])), plain)


# ---------------------------------------------------------------- runs

def test_a_causal_teacher_and_its_student(small_run):
    path = next((small_run / "stage1" / "trajectories").glob("*.safetensors"))
    tensors = load_file(path)
    assert torch.equal(tensors["states"][0, :1], tensors["context"][:1])  # the same image
    net, codec, settings = sample.load_stage(small_run / "stage0-causal-teacher")
    world = data.dataset(SimpleNamespace(**settings))  # the past is the real clip
    real = codec.encode(world.batch([5_000_000 + int(path.stem)])["video"])
    assert torch.allclose(real[0], tensors["context"], atol=1e-5)
    x = torch.randn(1, 1, 8, 8, 8)
    chunks = list(sample.generate_chunks(net, settings, x, torch.zeros(1, 6, 32),
                                         lambda n: torch.randn(1, n, 8, 8, 8), 7))
    assert [c.shape[1] for c in chunks] == [1, 3, 3]  # it streams, as a bidirectional one cannot


def test_a_teacher_is_asked_for_what_it_has_learnt(small_run, tmp_path):
    """A causal one makes no whole clips, one without --teacher-forcing continues none."""
    teacher, plain = str(small_run / "stage0-causal-teacher"), tmp_path / "plain"
    shutil.copytree(small_run / "stage0", plain)
    settings = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**settings, "teacher_forcing": 0.0}))
    for stage, flags, sentence in (
            (1, ["--teacher", teacher, "--ode-context", "clean"], "is a causal teacher"),
            (1, ["--teacher", str(plain)], "not learnt to continue clips: .*--recipe causal-te"),
            (2, ["--teacher", teacher, "--init", str(small_run / "stage1")], "a causal teacher")):
        with pytest.raises(UsageError, match=sentence):
            train.train(train.make_config(train.parse(
                ["--out", str(tmp_path), "--iters", "2", *flags, *SMALL]), stage))


def test_a_causal_teacher_is_refused_before_anything_is_trained(small_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "a"), "--iters", "2", *SMALL, "--teacher",
                    str(small_run / "stage0-causal-teacher")])
    assert "is a causal teacher" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_a_run_that_moved_finds_its_own_trajectories(small_run, tmp_path):
    """Those of the stage that it came from, not those of another stage 1 in the same folder."""
    old, new = tmp_path / "old", tmp_path / "new"
    for name, before in (("stage1-b", "stage0"), ("stage2-b", "stage1-b")):
        (old / name).mkdir(parents=True)
        settings = {"stage": int(name[5]), "out": str(old), "init": str(old / before)}
        (old / name / "config.json").write_text(json.dumps(settings))
    old.rename(new)
    cfg = small_config(3, "--out", new, "--init", new / "stage2-b")
    assert trajectory_dirs(cfg)[2] == new / "stage1-b" / "trajectories"


def test_chunks_that_continue_real_clips_are_no_whole_clips(small_run):
    """The anchor takes the trajectories of the stage that a run comes from; --gan-real teacher
    refuses chunks that continue real pasts."""
    flags = ["--out", str(small_run), *SMALL]
    run = Run(train.make_config(train.parse(flags), 2), train.new_network)
    assert run.trajectories[0].parent.parent.name == "stage1"
    teachers = train.parse([*flags, "--recipe", "one-forcing", "--gan-real", "teacher"])
    with pytest.raises(UsageError, match="whole clips.*train stage 1 with --ode-context clean"):
        Run(train.make_config(teachers, 2), train.new_network)


@pytest.mark.parametrize("flags", ("--ode-points 2", "--frames 10", "--chunk 1 --frames 7"))
def test_trajectories_have_to_fit(small_run, flags):
    """Other states, frames or chunks than stage 1's are refused before a step is made."""
    given = train.parse(["--out", str(small_run), *SMALL, *flags.split()])
    if "ode_points" in given:
        given["ode_point_weights"] = (1.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="has 4 --ode-points of 7 --frames in chunks of 3 --chunk"):
        Run(train.make_config(given, 2), train.new_network)


def test_no_noise_leaves_the_penalties(monkeypatch):
    """--gan-t-max 0: the discriminator sees clean clips, and R1 and R2 still perturb them, but for
    the image."""
    run = at_work(3, "--gan-t-max", 0)
    batch, shown, old = next(run.batches("roll")), [], run.nets["disc"].forward
    run.nets["disc"].forward = lambda x, t, text: shown.append(x.detach()) or old(x, t, text)
    train.disc_step(run, [(batch, batch.x0)], 0, 0)
    real, _, perturbed, _ = shown
    assert torch.equal(real, batch.x0) and torch.equal(perturbed[:, 0], real[:, 0])
    assert (perturbed - real)[:, 1:].std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("recipe", ["one-forcing", "asd"])
def test_relatives_resume_bit_for_bit(small_run, tmp_path, recipe):
    flags = command(small_run, 2, "--recipe", recipe, "--save-every", 2)
    train.main(["--out", str(tmp_path / "a"), "--iters", "4", *flags])
    step, calls = train.distil_step, []

    def crash(run):
        calls.append(run.step)
        if len(calls) == 4:
            raise ZeroDivisionError
        return step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.STEPS, 2, crash)
        with pytest.raises(ZeroDivisionError):
            train.main(["--out", str(tmp_path / "b"), "--iters", "4", *flags])
    train.main(["--out", str(tmp_path / "b"), "--iters", "4", *flags])
    one, two = (tmp_path / name / f"stage2-{recipe}" for name in "ab")
    assert largest_difference(weights(one), weights(two)) == 0 and timeless(one) == timeless(two)
    fake = load_file(one / "fake.safetensors")  # a plain network again, for the stage after
    assert fake.keys() == weights(one).keys()


@pytest.mark.parametrize("recipe", ["one-forcing", "asd"])
def test_relatives_on_two_processes_are_one(small_run, tmp_path, recipe):
    flags = command(small_run, 2, "--recipe", recipe, "--iters", 3)
    train.main(["--out", str(tmp_path / "a"), *flags])
    several_processes(2, tmp_path, "--out", str(tmp_path / "b"), *flags)
    one, two = (tmp_path / name / f"stage2-{recipe}" for name in "ab")
    assert largest_difference(weights(one), weights(two)) < 1e-5
    for a, b in zip(logs(one), logs(two)):
        assert a["fake_loss"] == pytest.approx(b["fake_loss"], abs=1e-5)
        if "d_real" in a:  # a paired loss leaves the level of both logits to rounding
            gaps = (row["d_real"] - row["d_fake"] for row in (a, b))
            assert next(gaps) == pytest.approx(next(gaps), abs=1e-5)


def test_the_page_lists_all_that_a_recipe_sets():
    """docs/family.md names every flag of every recipe, with its value."""
    page = (HERE / "docs" / "family.md").read_text()
    for name in RELATIVES:
        row, = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for settings in FAMILY["toy"][name].values():
            for key, value in settings.items():
                if key in ("init", "teacher", "iters", "muon_lr", "trajectories"):
                    continue  # where it starts and how long it takes
                words = flag(key) if value is True else f"{flag(key)} {as_words(value)}"
                if value is False:
                    words = flag(key).replace("--", "--no-", 1)
                assert words in row, f"{name}: {words}"
