"""Training: a teacher from scratch, then the three stages of AAD-1, in one loop.

    python train.py                                       the whole recipe at preset `toy`
    python train.py --control                             and stage 2 trained on, to compare
    python train.py --stage 2                             one stage, from the one before
    python train.py --recipe one-forcing                  a relative of AAD-1, see docs/family.md
    python train.py --data DIR_OF_MP4 --out out/mine      the same on your own clips
    torchrun --nproc_per_node 2 train.py --stage 3        FSDP2, gloo on CPU, NCCL on GPUs

    stage 0   teachers       flow matching on real clips, whole or continued
    stage 1   ODE init       regression onto the teacher's ODE, block-causal       paper eq. 3
    stage 2   DMD warm-up    distribution matching on the student's own rollouts   paper eq. 4-6
    stage 3   adversarial    a bidirectional discriminator, one logit per clip     paper eq. 7-10

Stage N leaves in <out>/stageN: {weights,ema,codec}.safetensors, config.json, log.jsonl, samples.*,
metrics.json, state/, trajectories/ (1), fake.safetensors (2, 3). The next starts from EMA weights.
"""
import contextlib
import gc
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import losses as L
from discriminator import Discriminator, disc_outputs, has_heads
from model import PRESETS, Config, build, stream_mask
from sample import rollout, with_cfg
from scale.clips import StepClips, denoised_clip, make_trajectories, probe_spread
from scale.parallel import averaged, on_rank0, processes, say, world
from scale.pictures import draw_preview, draw_samples
from scale.recipes import WAN_RECIPES, changes, check_whole_recipe, control_of, stages_of
from scale.run import Run, check_start, check_teachers, prepare
from scale.state import export, load_state, save_state
from utils.errors import catch_signals, friendly_errors, require
from utils.files import clips_in
from utils.runs import StageLog, decide_resume, init_stage_dir, locked, reason_to_stop, stage_dir
from utils.settings import (Parser, add_fields, default_compile, default_device, default_dtype,
                            given_values, inferred_preset, synced_time, validate)


@dataclass
class TrainConfig(Config):
    """Every setting of a run. The comment behind a field is its help text."""
    preset: str = "toy"             # toy, wan-1.3b or wan-14b
    recipe: str = "aad-1"           # aad-1, or a relative: a set of the flags below
    stage: int = -1                 # 0 teacher, 1 ODE initialisation, 2 DMD, 3 adversarial; -1: all
    data: str = ""                  # folder of videos or of latents; empty: the toy world
    out: str = ""                   # folder of the run; default: out/<preset>
    tag: str = ""                   # suffix of the stage's folder: stage3-TAG
    init: str = ""                  # folder to start from; default: stage before, stage 1: teacher
    teacher: str = ""               # teacher's folder, or official weights; default: of this run
    real_score: str = ""            # larger network for stage 2's real score; default: the teacher
    seed: int = 0                   # random seed
    resume: bool = True             # continue an unfinished stage and keep a finished one
    device: str = ""                # cuda, mps or cpu; default: the first there is
    dtype: str = ""                 # autocast: bfloat16 or float32; default: what is faster here
    size: int = 32                  # side of a frame, in pixels
    turns: float = 0.2              # toy world: probability that the shape turns at a frame
    fps: float = 0.0                # thin the frames of videos to this rate; 0: keep all
    codec_patch: int = 4            # side of a patch of the toy codec, in pixels
    latent_size: tuple = (0, 0)     # height and width of a latent frame, for captions alone
    # the loop
    iters: int = 0                  # training steps of the stage
    batch_size: int = 16            # clips per step, over all devices
    micro_batch: int = 0            # clips per device and pass, the rest is accumulated; 0: all
    activation_checkpointing: bool = False  # run blocks again in the backward pass
    offload: bool = False           # stages 2 and 3: frozen networks and held clips on the host
    context_parallel: int = 1       # processes that share the tokens of one clip (Ulysses)
    compile: str = ""               # torch.compile: all, clips (networks of whole clips) or none
    lr: float = 2e-3                # learning rate of the student (AdamW)
    muon_lr: float = 0.0            # learning rate of Muon for block matrices; 0: AdamW for all
    betas: tuple = (0.9, 0.95)      # betas of AdamW for the student
    weight_decay: float = 0.0       # weight decay of AdamW, for every trained network
    lr_warmup: int = 10             # steps over which the learning rates rise
    lr_decay: float = 0.0           # fraction of the student's steps, at the end, with falling rate
    grad_clip: float = 1.0          # largest gradient norm
    ema: float = 0.98               # decay of the running average of the weights
    max_bad_steps: int = 10         # consecutive non-finite updates of a network before giving up
    save_every: int = 200           # steps between saved states; 0: only at the end
    eval_clips: int = 64            # held-out clips behind metrics.json; 0: no scores
    samples: int = 8                # clips in samples.png and samples.gif; 0: no pictures
    preview_every: int = 0          # steps between previews in samples.png; 0: none
    log: str = ""                   # tensorboard or wandb: what log.jsonl has, there too
    # stage 0: the teacher
    text_drop: float = 0.1          # share of captions dropped, for guidance
    train_shift: float = 6.0        # timestep shift of training times; above 1: more noise
    teacher_forcing: float = 0.0    # share of steps in which chunks continue clean ones; 1: causal
    # stage 1: ODE initialisation
    trajectories: int = 2048        # teacher trajectories to regress on
    ode_steps: int = 8              # passes of a trajectory
    ode_points: int = 4             # states of a trajectory that are kept
    ode_point_weights: tuple = (0.7, 0.1, 0.1, 0.1, 0.0)  # how often each; last: the clean end
    ode_context: str = "real"       # past of a chunk: real clip, clean end or noisy state (paper)
    ode_target: str = "end"         # end of the trajectory, or consistency with its next state
    guidance: float = 1.0           # classifier-free guidance of the teacher; 1: none
    # stages 2 and 3: the student's own rollouts
    student_steps: tuple = (1,)     # network passes per chunk; several: first chunk, second, rest
    self_rollout: bool = True       # train on own rollouts; off: on noised real clips (CausVid)
    grad_chunks: int = 0            # chunks of a rollout, from its end, with a gradient; 0: all
    context_level: float = 0.0      # noise level of chunks in the cache; below 0: no context pass
    cache_grad: bool = False        # gradients through the context passes (Self Gradient Forcing)
    ode_anchor: float = 0.0         # weight of stage 1's regression from pure noise
    dmd_weight: float = 0.0         # weight of the DMD term
    dmd_diff_weight: float = 0.0    # weight of DMD on differences of frames, relative to plain DMD
    gan_weight: float = 0.0         # weight of the adversarial term
    gan_ratio: float = 0.0          # adversarial gradient norm relative to DMD's; 0: as it comes
    fake_lr: float = 1e-3           # learning rate of the fake score
    fake_betas: tuple = (0.0, 0.99)  # betas of AdamW for the fake score
    fake_updates: int = 1           # updates of the fake score per step
    score_shift: float = 1.0        # timestep shift of the level at which the scores are compared
    student_start: int = 20         # step at which the student starts to move
    probe_every: int = 25           # steps between measures of how far seeds differ; 0: none
    stop_spread: float = 0.5        # stop stage 2 at this fraction of the first spread; 0: never
    # stage 3: the discriminator
    disc_lr: float = 2e-4           # learning rate of the discriminator's heads
    backbone_lr: float = 0.0        # learning rate of its backbone; 0: frozen
    disc_betas: tuple = (0.0, 0.99)  # betas of AdamW for the discriminator
    disc_updates: int = 2           # updates of the discriminator per step
    disc_causal: bool = False       # block-causal discriminator, from the student's weights
    disc_granularity: str = "clip"  # one logit per clip, chunk or frame
    disc_layers: tuple = (0, 1, 2, 3)  # blocks that the heads read
    disc_queries: int = 2           # queries per head
    disc_backbone: str = "own"      # own; shared with the fake score; detached: reads its features
    disc_weight: float = 1.0        # weight of its loss beside that of a shared fake score
    gan_real: str = "data"          # taken as real: data, teacher's clips, or more passes (ASD)
    gan_loss: str = "logistic"      # logistic, or relativistic in pairs of the same condition
    gan_t_max: float = 1.0          # noise level of the discriminator's input ~ U[0, this]
    gan_shift: float = 1.0          # timestep shift of that level; below 1: less noise
    gan_interval: bool = False      # draw that level from the interval of the exit pass
    r1r2_weight: float = 20.0       # lambda of the approximate R1 and R2
    r1r2_sigma: float = 0.1         # their perturbation
    r1r2_every: int = 1             # apply them every N discriminator updates


RECIPES = {  # preset -> stage -> what differs from the defaults; docs/results.md has what was tried
    "toy": {
        0: dict(iters=4000, muon_lr=0.04, lr_warmup=30, lr_decay=0.4, ema=0.99,
                teacher_forcing=0.25),
        1: dict(iters=1000, muon_lr=0.01, lr_decay=0.5),
        2: dict(iters=320, dmd_weight=1.0, lr=6e-4, betas=(0.5, 0.99), lr_warmup=15, lr_decay=0.5,
                ema=0.97, cache_grad=True, ode_anchor=0.15),
        3: dict(iters=270, gan_weight=1.0, dmd_weight=4.0, lr=5e-5, betas=(0.0, 0.99),
                lr_warmup=15, lr_decay=0.5, ema=0.97, disc_lr=4e-4, backbone_lr=2e-4,
                disc_updates=1, student_start=120, gan_t_max=0.15),
    },
    **WAN_RECIPES,
}


def make_config(overrides, stage):
    """The settings of one stage: defaults, preset, its recipe, then `overrides`; checked."""
    preset = inferred_preset(overrides)
    require(preset in PRESETS, f"--preset {preset} is unknown: choose from {', '.join(PRESETS)}")
    require(stage in RECIPES[preset], f"--stage {stage} is unknown: choose 0, 1, 2 or 3")
    given = dict(overrides, preset=preset, stage=stage, out=overrides.get("out") or f"out/{preset}")
    cfg = TrainConfig(**{**PRESETS[preset], **RECIPES[preset][stage], **changes(given), **given})
    cfg.data = cfg.data and str(Path(cfg.data).resolve())  # sample.py finds it from elsewhere
    cfg.device = cfg.device or default_device()
    cfg.dtype = cfg.dtype or default_dtype(cfg.device)
    validate(cfg)
    return cfg


# ---------------------------------------------------------------- stages 0 and 1
def teacher_step(run):
    """Stage 0: flow matching on real clips. The image is clean: its frames have t = 0. In a share
    of the steps every chunk continues a real past, as stage 1 will ask the teacher to."""
    cfg, log = run.cfg, {}
    for batch in run.batches("teacher"):
        net = run.nets["student"]  # in stage 0 that is the teacher
        if run.draws([0], "forcing").rand(1).item() < cfg.teacher_forcing:
            net = L.on_clean_context(net, batch.x0, stream_mask(cfg), cfg.first)
        u = batch.draws.stratified_uniform()
        text = batch.text.masked_fill(batch.draws.rand(1, 1) < cfg.text_drop, 0.0)
        eps = batch.draws.randn(*batch.x0.shape[1:])
        t = L.make_timesteps(L.shift_time(u, cfg.train_shift), batch.x0, cfg.first)
        with run.autocast():
            loss = L.flow_matching_loss(lambda x, t: net(x, t, text), batch.x0, eps, t)
        run.backward(loss, batch, log)
    return {**log, "grad": run.update("student")}


def ode_loss(run, draws, weights):
    """Regression of every chunk, at its own level, onto its trajectory's clean end (paper eq. 3).
    The mask shows it the frames that the stream will, and --ode-context says in which form.
    weights: how often a chunk starts from each kept state; the first is pure noise."""
    cfg = run.cfg
    times = torch.tensor([*L.schedule(cfg.ode_points, cfg.shift), 0.0], device=run.device)
    mask, chunks = stream_mask(cfg), (cfg.frames - cfg.first) // cfg.chunk
    path, text, past = run.trajectory(draws)  # no past: chunks see each other noisy
    point = L.to_frames(draws.choice(weights, chunks), cfg.ode_points, cfg)  # the image is clean

    def flow(x, t, name="student"):
        if past is not None:
            return L.on_clean_context(run.nets[name], past, mask, cfg.first)(x, t, text)
        return run.nets[name](x, t, text, mask=mask)

    with run.autocast():
        if cfg.ode_target == "consistency":
            return L.consistency_loss(flow, lambda x, t: flow(x, t, "ema"), path, point, times)
        return L.ode_regression_loss(flow, L.states_at(path, point), path[:, -1], times[point])


def ode_step(run):
    """Stage 1: regression onto the teacher's trajectories."""
    log = {}
    for batch in run.batches("ode"):
        run.backward(ode_loss(run, batch.draws, run.cfg.ode_point_weights), batch, log)
    return {**log, "grad": run.update("student")}


# ---------------------------------------------------------------- stages 2 and 3
def student_clip(run, x, text, draws, exit_step=None, grad=False):
    """The student's own clip (b, f, c, h, w), from the image of the clips x. See rollout()."""
    cfg = run.cfg
    with run.autocast():
        chunks = rollout(run.nets["student"], x[:, :cfg.first], text,
                         lambda n: draws.randn(n, *x.shape[2:]), cfg.frames, cfg.student_steps,
                         exit_step=exit_step, grad=grad, context_level=cfg.context_level,
                         cache_grad=cfg.cache_grad, grad_chunks=cfg.grad_chunks)
        return torch.cat(list(chunks), 1)


def real_clips(run, batch, exit_step):
    """What the discriminator takes as real: (clips (b, f, c, h, w), their texts)."""
    cfg = run.cfg
    if cfg.gan_real == "data":
        return batch.x0, batch.text
    draws = run.draws(batch.clip_ids, "real")
    if cfg.gan_real == "teacher":  # the clean ends of its trajectories
        path, text, _ = run.trajectory(draws)
        return path[:, -1], text
    return student_clip(run, batch.x0, batch.text, draws, exit_step + 1), batch.text


def judged(cfg, exit_step):
    """Whether the adversarial term applies to a rollout: with --gan-real more, not to one that made
    all its passes, for there is no clip of one more (Adversarial Self-Distillation)."""
    return cfg.gan_real != "more" or exit_step < cfg.student_steps[0] - 1


def fake_score(run, x_t, t, text):
    """The flow of the fake score, which may be a discriminator's backbone."""
    net, shared = run.nets["fake"], has_heads(run.cfg, "fake")
    return net(x_t, t, text, with_flow=True)[1] if shared else net(x_t, t, text)


def dmd_term(run, x, batch, draws, exit_step):
    """Gradient of the DMD loss with respect to the student's clip x (paper eq. 6): the update
    moves x against it, towards what the teacher prefers."""
    cfg, k = run.cfg, run.cfg.first
    t = L.make_timesteps(L.score_levels(draws.stratified_uniform(), cfg.score_shift), x, k)
    x_t = L.add_noise(x, draws.randn(*x.shape[1:]), t)
    real_score = with_cfg(run.nets["teacher"], batch.text, cfg.guidance, run.negative)
    with torch.no_grad(), run.autocast():
        x0_real = L.x0_from_flow(x_t, real_score(x_t, t), t)
        x0_fake = L.x0_from_flow(x_t, fake_score(run, x_t, t, batch.text), t)
    clip = x[:, k:].clone().requires_grad_()
    loss = L.dmd_loss(clip, L.dmd_gradient(x[:, k:], x0_real[:, k:], x0_fake[:, k:]))
    if cfg.dmd_diff_weight:  # the first difference is the one to the image
        motion = L.frame_difference(torch.cat([x[:, :k], clip], 1))
        direction = L.dmd_gradient(*map(L.frame_difference, (x, x0_real, x0_fake)))
        loss = loss + cfg.dmd_diff_weight * L.dmd_loss(motion, direction)
    grad, = torch.autograd.grad(loss, clip)
    distance = (x - x0_real)[:, k:].abs().mean()
    return grad, {"dmd": len(x) * grad.flatten(1).norm(dim=1).mean(), "distance": distance}


def disc_level(cfg, draws, x, exit_step):
    """The random level (b, f) at which the discriminator sees a clip. With --gan-interval it lies
    between the time of the pass that made the clip and the next time of the schedule."""
    u, one_pass_for_both = draws.stratified_uniform(), has_heads(cfg, "fake")
    u = (L.score_levels(u, cfg.score_shift) if one_pass_for_both
         else L.shift_time(u * cfg.gan_t_max, cfg.gan_shift))
    if cfg.gan_interval:
        times = [*L.schedule(cfg.student_steps[0], cfg.shift), 0.0]
        u = times[exit_step + 1] + (times[exit_step] - times[exit_step + 1]) * u
    return L.make_timesteps(u, x, cfg.first)


def discriminate(run, x_t, text, t, exit_step, detach=True):
    """(logits, flow or None) of clips noised to t; `x_t` may carry a gradient. detach: with
    --disc-backbone detached no gradient goes through the backbone."""
    cfg, flow = run.cfg, None
    detach = detach and cfg.disc_backbone == "detached"
    with run.autocast():
        if has_heads(cfg, "fake"):
            logits, flow = run.nets["fake"](x_t, t, text, with_flow=True, detach=detach)
        else:
            logits = run.nets["disc"](x_t, t, text)
    if disc_outputs(cfg) > 1:  # one for every number of passes
        logits = logits[..., exit_step]
    return logits, flow


def gan_term(run, x, batch, draws, exit_step):
    """Gradient of the student's adversarial loss with respect to its clip x (paper eq. 9): the
    update moves x against it, towards a higher logit."""
    cfg, k = run.cfg, run.cfg.first
    clip = x[:, k:].clone().requires_grad_()
    t, eps = disc_level(cfg, draws, x, exit_step), draws.randn(*x.shape[1:])
    x_t = L.add_noise(torch.cat([x[:, :k], clip], 1), eps, t)
    fake, _ = discriminate(run, x_t, batch.text, t, exit_step, detach=False)
    (_, student_loss, paired), real = L.GAN_LOSSES[cfg.gan_loss], None
    if paired:
        with torch.no_grad():  # same noise, level and image: a pair
            clip_t, text = batch.real or (batch.x0, batch.text)
            real, _ = discriminate(run, L.add_noise(clip_t, eps, t), text, t, exit_step)
    grad, = torch.autograd.grad(student_loss(real, fake), clip)
    return grad, {"gan": len(x) * grad.flatten(1).norm(dim=1).mean()}


TERMS = {"dmd": dmd_term, "gan": gan_term}  # each takes (run, x, batch, draws, exit_step)


def anchor_step(run, batch):
    """Backpropagate stage 1's regression from pure noise (DMD, 2311.18828, eq. 9). DMD and the
    adversarial loss let all seeds share one future; this penalises it."""
    loss = ode_loss(run, run.draws(batch.clip_ids, "anchor"), (1.0,))
    (run.cfg.ode_anchor * run.batch_part(loss, batch)).backward()
    return {"anchor": loss.detach()}


def fake_score_step(run, clips, update, exit_step):
    """The fake score follows the student: flow matching on its clips (paper eq. 5)."""
    cfg, log = run.cfg, {}
    for batch, x in clips:
        draws = run.draws(batch.clip_ids, f"fake{update}")
        u = L.score_levels(draws.stratified_uniform(), cfg.score_shift)
        t, eps = L.make_timesteps(u, x, cfg.first), draws.randn(*x.shape[1:])
        with run.autocast():
            loss = L.fake_score_loss(lambda x, t: fake_score(run, x, t, batch.text), x, eps, t)
        run.backward(loss, batch, log, "fake_loss")
    run.update("fake")
    return log


def disc_step(run, clips, update, exit_step):
    """The discriminator tells real from generated (paper eq. 8), with R1 and R2 (eq. 10). If it
    shares its backbone with the fake score, the pass over the student's clip gives the flow too,
    and one backward pass trains both (One-Forcing)."""
    cfg, log, shared = run.cfg, {}, has_heads(run.cfg, "fake")
    regularise = (run.step * cfg.disc_updates + update) % cfg.r1r2_every == 0
    for batch, x in clips:
        draws = run.draws(batch.clip_ids, f"disc{update}")
        t, eps = disc_level(cfg, draws, x, exit_step), draws.randn(*x.shape[1:])
        pair = [(L.add_noise(clip, eps, t), text)
                for clip, text in (batch.real or (batch.x0, batch.text), (x, batch.text))]
        (real, _), (fake, flow) = (discriminate(run, *shown, t, exit_step) for shown in pair)
        loss = L.GAN_LOSSES[cfg.gan_loss][0](real, fake)
        if regularise:
            for (x_t, text), logits in zip(pair, (real, fake)):
                delta = cfg.r1r2_sigma * draws.randn(*x.shape[1:])
                delta[:, :cfg.first] = 0  # the image stays as it is
                penalty = L.approx_r1_r2(lambda x: discriminate(run, x, text, t, exit_step)[0],
                                         x_t, logits, delta)
                loss = loss + cfg.r1r2_weight * penalty
        told = (real > fake).float().mean()
        run.add_to(log, {"d_real": real.mean(), "d_fake": fake.mean(), "d_pairs": told}, batch)
        if shared:
            fake_loss = L.fake_score_loss(lambda *_: flow, x, eps, t)
            loss = fake_loss + cfg.disc_weight * loss
            run.add_to(log, {"fake_loss": fake_loss}, batch)
        run.batch_part(loss, batch).backward()
    run.update("fake" if shared else "disc")
    return log


def student_backward(run, x, batch, exit_step):
    """Backpropagate all terms through the rollout that made x, then the anchor; returns their
    numbers. A term gives its gradient with respect to the clip; x.backward() carries the sum on."""
    cfg, numbers, grads = run.cfg, {}, {}
    weights = {"dmd": cfg.dmd_weight, "gan": cfg.gan_weight * judged(cfg, exit_step)}
    for name, term in TERMS.items():
        if weights[name]:
            draws = run.draws(batch.clip_ids, name)
            grads[name], values = term(run, x.detach(), batch, draws, exit_step)
            numbers |= values
    if cfg.gan_ratio and len(grads) == 2:  # the adversarial norm relative to DMD's, clip by clip
        dmd, gan = (L.expand_t(g.flatten(1).norm(dim=1, keepdim=True)) for g in grads.values())
        grads["gan"] *= cfg.gan_ratio * dmd / gan.clamp_min(1e-12)
    if grads:
        direction = sum(weights[name] * grad for name, grad in grads.items())
        x[:, cfg.first:].backward(run.batch_part(direction, batch))
    if cfg.ode_anchor:
        numbers |= anchor_step(run, batch)
    return numbers


def distil_step(run):
    """Stages 2 and 3: roll out, move the student along its terms, then let the fake score and the
    discriminator follow on the same clips, which they see without a graph."""
    cfg, clips, log = run.cfg, StepClips(run), {}
    moving = run.step >= cfg.student_start
    exit_draws = run.draws([0], "exit")
    exits = [int(exit_draws.choice([1.0] * passes, 1)) for passes in cfg.student_steps]
    exit_step = exits[0]  # what reads it has one number of passes for all chunks, see settings
    judge = cfg.gan_weight > 0 and judged(cfg, exit_step)
    for batch in run.batches("roll"):
        if cfg.self_rollout:
            x = student_clip(run, batch.x0, batch.text, batch.draws, exits, moving)
        else:
            x = denoised_clip(run, batch, moving)
        batch.real = real_clips(run, batch, exit_step) if judge else ()
        if moving:
            run.add_to(log, student_backward(run, x, batch, exit_step), batch)
        run.add_to(log, {"motion": L.motion(x), "real_motion": L.motion(batch.x0)}, batch)
        clips.append(batch, x.detach())
    if moving:
        log["grad"] = run.update("student")
    covered = cfg.disc_updates if has_heads(cfg, "fake") and judge else 0  # they train both
    for update in range(covered, cfg.fake_updates if cfg.dmd_weight else 0):
        log |= fake_score_step(run, clips, update, exit_step)
    for update in range(cfg.disc_updates if judge else 0):
        log |= disc_step(run, clips, update, exit_step)
    if cfg.probe_every and run.step % cfg.probe_every == 0:
        log["probe_spread"] = probe_spread(run)
    return log


STEPS = {0: teacher_step, 1: ode_step, 2: distil_step, 3: distil_step}


# ---------------------------------------------------------------- the beginning and end of a stage
def networks(cfg):
    """{name: (whose weights it starts from, [(parameter prefixes, lr)])} of a stage."""
    nets = {"ema": ("student", []), "student": ("student", [("", cfg.lr)])}
    if cfg.stage == 1 or cfg.stage > 1 and cfg.dmd_weight:
        nets["teacher"] = ("teacher", [])
    heads, parts = ("heads.", "norm.", "out."), ("patch_", "text_", "time_", "blocks.")
    if cfg.stage > 1 and cfg.dmd_weight:
        nets["fake"] = ("fake", [("", cfg.fake_lr)])
        if has_heads(cfg, "fake") and cfg.disc_backbone == "detached":
            nets["fake"] = ("fake", [("backbone.", cfg.fake_lr), (heads, cfg.disc_lr)])
    if cfg.stage > 1 and cfg.gan_weight and cfg.disc_backbone == "own":
        groups = [(heads, cfg.disc_lr)]
        if cfg.backbone_lr:  # all of it but the flow head, which has no part in the logit
            groups.append((tuple(f"backbone.{part}" for part in parts), cfg.backbone_lr))
        nets["disc"] = ("student" if cfg.disc_causal else "teacher", groups)
    return nets


def new_network(cfg, name):
    """One of them, uninitialised."""
    if not has_heads(cfg, name):
        return build(cfg)
    return Discriminator(build(cfg), cfg.disc_layers, cfg.disc_causal, cfg.disc_granularity,
                         cfg.disc_queries, disc_outputs(cfg))


# ---------------------------------------------------------------- the loop
def loop(run):
    """The loop of every stage, to its last step or the early stop; returns steps a second. After
    SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, all finish the step, save, exit with 128 + the signal."""
    cfg, resumed_at, started = run.cfg, run.step, synced_time(run.device)
    stop_fraction = cfg.stop_spread if cfg.stage == 2 else 0.0
    log = StageLog(run.dir, run.step, cfg.iters, run.is_main, cfg.log)
    reason = reason_to_stop(log.rows, stop_fraction)
    run.began -= 60 * log.minutes  # as if it had never been interrupted
    with catch_signals() as received:
        while run.step < cfg.iters and not reason:
            # as a number in the log, so that all processes agree when one was told to stop
            row = averaged({**STEPS[cfg.stage](run), "terminated": float(bool(received))})
            terminated = row.pop("terminated")
            if "motion" in row:  # relative to the real clips of the whole batch
                row["motion"] /= max(1e-9, row.pop("real_motion"))
            run.step += 1
            log.add(run.step, (time.time() - run.began) / 60, row)
            draw_preview(run)
            if cfg.save_every and run.step % cfg.save_every == 0 or terminated:
                save_state(run)
            if terminated:
                say(f"stage {cfg.stage} was terminated and saved at step {run.step}: the same "
                    "command goes on from there")
                raise SystemExit(128 + (received or [signal.SIGTERM])[0])
            reason = reason_to_stop(log.rows, stop_fraction)
    log.close()
    if reason:
        say(f"stage {cfg.stage} stops early at step {run.step}: {reason}")
    return (run.step - resumed_at) / (synced_time(run.device) - started)


def train(cfg):
    """One stage, from its beginning or from where it was interrupted; what is finished is kept."""
    folder = stage_dir(cfg)
    check_start(cfg, bool(cfg.data and clips_in(cfg.data)))
    plan = on_rank0(decide_resume, cfg, TrainConfig())
    if plan == "keep":
        return say(f"stage {cfg.stage} is finished and kept: {folder} (see --no-resume)")
    cfg.compile = cfg.compile or on_rank0(default_compile, cfg)
    with contextlib.ExitStack() as stack:
        on_rank0(stack.enter_context, locked(folder))
        run = Run(cfg, new_network)  # reads data and weights before anything is removed or written
        prepare(run, networks(cfg))
        on_rank0(init_stage_dir, cfg, plan == "anew")
        if cfg.stage == 1:
            make_trajectories(run)
        load_state(run)
        say(run.step_in_words())
        speed = loop(run)
        if not cfg.save_every or run.step % cfg.save_every:  # else the loop has just saved
            save_state(run)
        export(run)
        draw_samples(run)
        minutes, clips = (time.time() - run.began) / 60, cfg.eval_clips if run.codec else 0
        say(run.result_in_words(minutes, speed))
        del run
        gc.collect()
        if world()[0] == 0:
            from experiments import evaluate
            evaluate.finish_stage(cfg.stage, folder, clips, minutes, cfg.device)


def parse(argv):
    """The settings typed on the command line, as a dict."""
    parser = Parser(__doc__)
    add_fields(parser, TrainConfig, RECIPES["toy"])
    parser.add_argument("--control", action="store_true", default=None, help="After the recipe, "
                        "train stage 2 on for as many steps as stage 3, as its control.")
    return given_values(parser.parse_args(argv))


def main(argv=None):
    """The command line: one stage, or all of a recipe in order, and the table."""
    overrides = parse(argv)
    control, stage = overrides.pop("control", False), overrides.get("stage", -1)
    with friendly_errors():
        with processes(overrides.get("device")):
            check_whole_recipe(overrides, control)
            overrides["preset"] = inferred_preset(overrides)
            configs = [make_config(given, n) for n, given in stages_of(overrides)]
            if control:
                configs.append(make_config({**overrides, **control_of(configs[-1])}, 2))
            check_teachers(configs)
            for cfg in configs:
                train(cfg)
            if stage == -1 and world()[0] == 0:
                from experiments import evaluate
                evaluate.summary(cfg.out)


if __name__ == "__main__":
    main()
