"""Training: a teacher from scratch, then the three stages of AAD-1. One loop, one function per stage.

    python train.py                                       the whole recipe at preset `toy`: stages 0, 1, 2, 3
    python train.py --control                             and stage 2 trained on for as many steps as stage 3, to compare
    python train.py --stage 2                             one stage; it finds the stage before by itself
    python train.py --data DIR_OF_MP4 --out out/mine      the same on your own clips
    torchrun --nproc_per_node 2 train.py --stage 3        several processes: FSDP2, gloo on CPU, NCCL on GPUs

    stage 0   teacher        flow matching on real clips, bidirectional            paper section 2
    stage 1   ODE init       regression onto the teacher's ODE, block-causal       paper eq. 3
    stage 2   DMD warm-up    distribution matching on the student's own rollouts   paper eq. 4-6
    stage 3   adversarial    a bidirectional discriminator with one logit a clip   paper eq. 7-10

Stage N leaves in <out>/stageN: weights.safetensors, ema.safetensors, codec.safetensors, config.json, log.jsonl, samples.gif,
samples.png, metrics.json, state/ to resume from, and where there are any trajectories/ (stage I) and fake.safetensors (the fake score).
The next stage starts from the EMA weights, and stage III's fake score from stage II's.
"""
import argparse
import contextlib
import gc
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import losses as L
from data import (Draws, Flags, PatchCodec, WordEncoder, asked_to_stop, check_device, clips_in, dataset, explain, held_out, read_json,
                  read_tensors, save_tensors, video_writer, write_json, write_sheet, written_whole)
from discriminator import Discriminator
from model import PRESETS, Config, Shape, UsageError, block_causal_mask, build, chunk_bounds, load_into, open_weights, require
from parallel import (Muon, averaged, begin_state, by_first, fingerprint, has_bfloat16, load_state, locked, now, own_rows,
                      processes, save_state, saved_states, shard, whole, world)
from sample import animate, frame_times, guided, read_settings, rollout, sample_ode, schedule

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a state of a single process is saved on purpose


@dataclass
class TrainConfig(Config):
    """Everything a run can be told. The comment behind a field is its help text; RECIPES has what stages change."""
    # what, on what, where to
    preset: str = "toy"             # toy, wan-1.3b or wan-14b
    stage: int = -1                 # 0 teacher, 1 ODE initialisation, 2 DMD, 3 adversarial; -1: all in order
    data: str = ""                  # folder of videos, or of latents; empty: the toy world
    out: str = ""                   # folder of the run; default out/<preset>
    tag: str = ""                   # appended to the stage's folder name (stage3-TAG), to keep experiments apart
    init: str = ""                  # folder of the stage to start from; default: the stage before
    teacher: str = ""               # the teacher: a stage's folder, or official weights; default: stage 0 of this run
    seed: int = 0                   # of everything random
    resume: bool = True             # continue an unfinished stage and keep a finished one; no: start over
    device: str = ""                # cuda, mps or cpu; default: the first there is
    dtype: str = ""                 # autocast: bfloat16 or float32; default: bfloat16 where the hardware has it
    # clips
    size: int = 32                  # side of a frame, in pixels
    turns: float = 0.2              # toy world: probability that the shape turns at a frame, from the fifth on; 0: it never does
    fps: float = 0.0                # thin the frames of videos out to this rate; 0: every frame
    codec_patch: int = 4            # side of a patch of the toy codec, in pixels
    latent_size: tuple = (0, 0)     # height and width of a latent frame where only captions are given; 0 0: from --size
    # the loop
    iters: int = 0                  # training steps of a stage
    batch_size: int = 16            # clips per step, over all devices
    recompute: bool = False         # activation checkpointing: keep the input of a block, run it again in the backward pass
    micro_batch: int = 0            # clips per device and pass, the rest is accumulated; 0: all at once
    context_parallel: int = 1       # processes that share the tokens of one clip (Ulysses), for clips too long for one device
    compile: bool = False           # torch.compile, block by block
    lr: float = 2e-3                # AdamW's learning rate
    weight_decay: float = 0.0       # AdamW's, of every network that is trained
    muon_lr: float = 0.0            # Muon's, for the matrices of the blocks; 0: AdamW for all
    betas: tuple = (0.9, 0.95)      # AdamW's
    warmup: int = 10                # steps over which the learning rates rise
    decay: float = 0.0              # last fraction of the student's steps, over which its rates fall to zero
    clip: float = 1.0               # largest gradient norm
    ema: float = 0.98               # decay of the running average of the weights
    max_bad_steps: int = 10         # non-finite updates of a network in a row before giving up
    save_every: int = 200           # steps between saved states; 0: only at the end
    eval_clips: int = 64            # held-out clips behind metrics.json; 0: no scores
    samples: int = 8                # clips in samples.png and samples.gif; 0: no pictures
    # stage 0: the teacher
    text_drop: float = 0.1          # share of captions dropped, for guidance
    train_shift: float = 6.0        # timestep shift of training times: high, or the direction of motion is learnt late
    # stage 1: ODE initialisation
    trajectories: int = 2048        # teacher trajectories to regress on
    ode_steps: int = 8              # Euler steps of a trajectory
    guidance: float = 1.0           # classifier-free guidance of the teacher; 1: none
    levels: int = 4                 # states of a trajectory that are kept, those a `levels`-step sampler would visit
    level_weights: tuple = (0.4, 0.1, 0.1, 0.1, 0.3)  # how often a chunk gets each level, from noise to clean
    # stages 2 and 3: the student's own rollouts
    student_steps: int = 1          # network passes per chunk
    context_level: float = 0.0      # level at which a finished chunk enters the cache (Diagonal Forcing: 0.1); below 0: as its last pass left it
    cache_grad: bool = False        # gradients also through the passes that fill the cache (Self Gradient Forcing); no: as in Self Forcing
    ode_anchor: float = 0.0         # weight of stage 1's regression, kept on the student's own rollout from a trajectory's noise; 0: as in the paper
    dmd: float = 0.0                # weight of the DMD term
    dmd_flow: float = 0.0           # of its part that is taken on differences of consecutive frames (Diagonal Distillation), over the other
    gan: float = 0.0                # weight of the adversarial term
    gan_ratio: float = 0.0          # with both terms: norm of the adversarial gradient over DMD's, before weights (One-Forcing); 0: as it comes
    fake_lr: float = 1e-3           # learning rate of the fake score (DMD)
    disc_lr: float = 2e-4           # of the discriminator's heads (GAN)
    critic_betas: tuple = (0.0, 0.99)  # Adam's, for the fake score and the discriminator
    critic_updates: int = 1         # steps of the fake score per generator step
    disc_updates: int = 2           # steps of the discriminator per generator step
    critic_warmup: int = 20         # first steps, in which only fake score and discriminator learn
    score_shift: float = 1.0        # timestep shift of the level at which the scores are compared
    probe_every: int = 25           # steps between two measures of how far clips of one image differ from seed to seed; 0: none
    stop_spread: float = 0.5        # stop stage 2 once that has fallen to this fraction of what it was at its start; 0: never
    # stage 3: the discriminator
    backbone_lr: float = 0.0        # of the discriminator's backbone; 0: frozen
    disc_causal: bool = False       # give the discriminator the student's block-causal mask
    disc_framewise: bool = False    # one logit per frame instead of one per clip
    disc_layers: tuple = (0, 1, 2, 3)  # blocks that the heads read
    disc_queries: int = 2           # queries per head
    gan_loss: str = "logistic"      # or relativistic, in pairs of the same condition
    gan_t_max: float = 1.0          # noise level of the discriminator's input ~ U[0, this] ...
    gan_shift: float = 1.0          # ... then shifted: above 1 towards noise and coarse motion, below 1 towards outlines and grain
    gan_interval: bool = False      # draw that level from the interval of the pass that made the clip (the paper's 2-step variant)
    r_weight: float = 20.0          # lambda of the approximate R1 and R2
    r_sigma: float = 0.1            # their perturbation
    r_every: int = 1                # discriminator updates between two of them


RECIPES = {  # preset -> stage -> what differs from the defaults; docs/results.md has what else was tried
    "toy": {
        0: dict(iters=4000, muon_lr=0.04, warmup=30, decay=0.4, ema=0.99),
        1: dict(iters=1000, muon_lr=0.01, decay=0.5, ode_steps=16),
        2: dict(iters=320, dmd=1.0, lr=6e-4, betas=(0.5, 0.99), warmup=15, decay=0.5, ema=0.97, cache_grad=True, ode_anchor=0.15),
        3: dict(iters=270, gan=1.0, lr=5e-5, betas=(0.0, 0.99), warmup=15, decay=0.5, ema=0.97, backbone_lr=1e-4, critic_warmup=120,
                gan_shift=0.5, ode_anchor=0.15),
    },
}
# Latents of 480 x 832 pixels. Stage 1 has the rates of Causal Forcing, stage 2 those of Self Forcing, stage 3 the paper's where it says them.
# One clip a pass and activation checkpointing, or nothing of this size fits a GPU.
_WAN_RECIPE = {
    0: dict(iters=0),
    1: dict(iters=2000, batch_size=64, lr=2e-6, betas=(0.9, 0.999), trajectories=16_000, ode_steps=48, guidance=6.0),
    2: dict(iters=100, batch_size=64, dmd=1.0, lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0, ema=0.99, fake_lr=4e-7,
            critic_betas=(0.0, 0.999), critic_updates=5, critic_warmup=0, guidance=4.0, score_shift=5.0),
    3: dict(iters=200, batch_size=256, gan=1.0, lr=4e-7, betas=(0.0, 0.999), disc_lr=2e-6, critic_betas=(0.0, 0.999), backbone_lr=1e-6,
            disc_updates=1, critic_warmup=0, disc_queries=1, r_sigma=0.05),
}
_WAN_FITS = dict(latent_size=(60, 104), micro_batch=1, recompute=True)
RECIPES["wan-1.3b"] = {s: dict(r, **_WAN_FITS, disc_layers=(14, 21, 29)) for s, r in _WAN_RECIPE.items()}
RECIPES["wan-14b"] = {s: dict(r, **_WAN_FITS, disc_layers=(19, 29, 39)) for s, r in _WAN_RECIPE.items()}


LIMITS = (  # least, most, in words, the settings that have to lie between
    (1, math.inf, "at least 1", "batch_size trajectories ode_steps levels student_steps context_parallel "
     "disc_queries r_every max_bad_steps size codec_patch window dim ffn_dim freq_dim num_heads num_layers in_dim patch text_len text_dim"),
    (0, math.inf, "at least 0", "iters micro_batch save_every eval_clips samples fps sink lr fake_lr disc_lr muon_lr backbone_lr weight_decay "
     "warmup critic_warmup critic_updates disc_updates guidance dmd dmd_flow gan gan_ratio ode_anchor probe_every r_weight r_sigma"),
    (1e-12, math.inf, "above 0", "clip eps shift train_shift score_shift gan_shift"),
    (0, 1, "between 0 and 1", "ema text_drop decay gan_t_max stop_spread turns"), (-math.inf, 1, "at most 1", "context_level"),
    (3, math.inf, "at least 3", "frames"), (0, 90, "between 0 and 90, or its clips would be held-out ones", "seed"))


# ---------------------------------------------------------------- settings

def flag(name):
    """How a setting is written on the command line."""
    return f"--{name.replace('_', '-')}"


def spaced(value):
    """The value of a setting as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(argv):
    """The command line, generated from TrainConfig, as a dict of what was given; in brackets what the toy has. Unknown flags: one
    sentence, exit 2."""
    parser = Flags(__doc__)
    source = "".join(map(inspect.getsource, TrainConfig.__mro__[:-1]))
    for field in fields(TrainConfig):
        how = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
               dict(type=type(field.default[0]), nargs="+") if field.type is tuple else dict(type=field.type))
        text = re.search(rf"^    {field.name}: .*?#\s*(.*)$", source, re.M).group(1)
        values = [spaced(recipe.get(field.name, field.default)) for recipe in RECIPES["toy"].values()]
        usual = values[0] if len(set(values)) == 1 else f"stages 0 to 3: {', '.join(values)}"
        parser.add_argument(flag(field.name), default=None, help=f"{text} [{usual}]" if usual else text, **how)
    parser.add_argument("--plan", action="store_true", default=None, help="train nothing, print memory and work of the stages (experiments/plan.py)")
    parser.add_argument("--control", action="store_true", default=None,
                        help="after the recipe, train stage 2 on for as many steps as stage 3 has made: what stage 3 is compared with")
    parser.add_argument("--gpus", type=int, nargs="+", default=None, help="with --plan: devices that share the weights")
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}


def settle(given, stage):
    """The settings of one stage: defaults, then the preset, then its recipe, then what was `given`; checked."""
    preset = given.get("preset", "toy")
    require(preset in PRESETS, f"--preset {preset} is unknown: choose from {', '.join(PRESETS)}")
    require(stage in RECIPES[preset], f"--stage {stage} is unknown: choose 0, 1, 2 or 3")
    cfg = TrainConfig(**{**PRESETS[preset], **RECIPES[preset][stage], **given, "stage": stage})
    cfg.out, cfg.data = cfg.out or f"out/{preset}", cfg.data and str(Path(cfg.data).resolve())  # found again from elsewhere
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else
                                "mps" if torch.backends.mps.is_available() and "RANK" not in os.environ else "cpu")  # gloo has no mps
    cfg.dtype = cfg.dtype or ("bfloat16" if has_bfloat16(cfg.device) else "float32")
    check(cfg)
    return cfg


def check(cfg):
    """Raise UsageError, naming the field, for settings that cannot work together."""
    chunk_bounds(cfg.frames, cfg.first, cfg.chunk)
    for least, most, words, names in LIMITS:
        for name in names.split():
            require(least <= getattr(cfg, name) <= most, f"{flag(name)} {getattr(cfg, name)} does not work: it has to be {words}")
    layers, pixels = sorted(set(cfg.disc_layers)), cfg.codec_patch * cfg.patch
    require(Path(cfg.tag).name == cfg.tag, f"--tag {cfg.tag} becomes part of a folder's name: use letters, digits and dashes")
    require(cfg.data != str(Path(cfg.out).resolve()), f"--out {cfg.out} is the folder of the clips: choose another")
    require(cfg.dtype in ("bfloat16", "float32"), f"--dtype {cfg.dtype} is unknown: choose bfloat16 or float32")
    require(cfg.gan_loss in L.GAN_LOSSES, f"--gan-loss {cfg.gan_loss} is unknown: choose from {', '.join(L.GAN_LOSSES)}")
    require(cfg.dim % (2 * cfg.num_heads) == 0, f"--dim {cfg.dim} does not divide into --num-heads {cfg.num_heads} of even width")
    require(cfg.num_heads % cfg.context_parallel == 0,
            f"--context-parallel {cfg.context_parallel} does not divide the {cfg.num_heads} heads of the network")
    require(cfg.freq_dim % 2 == 0, f"--freq-dim {cfg.freq_dim} must be even")
    require(cfg.in_dim == cfg.out_dim, f"--in-dim {cfg.in_dim} and --out-dim {cfg.out_dim} must be the same")
    require(cfg.size % pixels == 0, f"--size {cfg.size} does not divide into patches of {pixels} pixels: "
            f"use --size {max(1, round(cfg.size / pixels)) * pixels}")
    require(len(cfg.latent_size) == 2 and all(side % cfg.patch == 0 for side in cfg.latent_size) and (
        min(cfg.latent_size) > 0 or not any(cfg.latent_size)),
            f"--latent-size {spaced(cfg.latent_size)} does not work: name a height and a width that divide by {cfg.patch}, or 0 0")
    require(all(len(betas) == 2 and all(0 <= beta < 1 for beta in betas) for betas in (cfg.betas, cfg.critic_betas)),
            "--betas and --critic-betas take two numbers each, from 0 to below 1")
    require(len(cfg.level_weights) == cfg.levels + 1 and min(cfg.level_weights) >= 0 and sum(cfg.level_weights) > 0,
            f"--level-weights needs {cfg.levels + 1} numbers from 0 up, one for each of --levels {cfg.levels} and clean")
    require(cfg.ode_steps % cfg.levels == 0, f"--ode-steps {cfg.ode_steps} is no multiple of --levels {cfg.levels}")
    check_device(cfg.device)
    require(cfg.stage or cfg.iters, f"stage 0 of {cfg.preset} has nothing to train: name the official weights with --teacher, or give it --iters")
    if cfg.stage > 1:
        require(cfg.dmd or cfg.gan, f"--dmd 0 --gan 0: stage {cfg.stage} has nothing to learn from, give one of them a weight")
        require(not cfg.gan or 0 <= layers[0] and layers[-1] < cfg.num_layers and len(layers) == len(cfg.disc_layers),
                f"--disc-layers {spaced(cfg.disc_layers)} does not work: name different blocks of 0 to {cfg.num_layers - 1}")
        require(cfg.iters > cfg.critic_warmup or not cfg.iters, f"--iters {cfg.iters} are all --critic-warmup {cfg.critic_warmup}, "
                "in which the student does not move: give it more, or lower that")


def latent_sides(cfg):
    """Height and width of a latent frame."""
    return tuple(cfg.latent_size) if cfg.latent_size[0] else (cfg.size // cfg.codec_patch,) * 2


def stage_folder(cfg):
    """Where a stage leaves its results."""
    return Path(cfg.out) / (f"stage{cfg.stage}-{cfg.tag}" if cfg.tag else f"stage{cfg.stage}")


# ---------------------------------------------------------------- one stage at work

@dataclass
class Batch:
    """One micro-batch: latents of real clips, their captions, and a source of randomness that belongs to its clips."""
    clips: list
    x0: torch.Tensor      # (b, f, c, h, w)
    text: torch.Tensor    # (b, l, d)
    draws: Draws


class Run:
    """A stage at work: settings, data, networks and their optimizers, the step. train() goes through its life: look (what is there?),
    Run, prepare (networks), claim (the folder), make_trajectories, load_state, loop, export, show, score."""

    def __init__(self, cfg):
        self.cfg, self.step, self.before, self.bad, self.began = cfg, 0, steps_before(cfg), {}, time.time()
        (rank, number), share = world(), cfg.context_parallel
        require(number % share == 0, f"--context-parallel {share} does not divide {number} processes: start torchrun with a multiple of {share}")
        self.rank, self.world = rank // share, number // share  # counting the processes that share a clip as one
        self.parts = f"{self.world} " + ("processes" if share == 1 else f"groups of {share} processes")
        require(cfg.batch_size % self.world == 0, f"--batch-size {cfg.batch_size} does not divide over {self.parts}")
        self.writes = rank == 0
        self.device = torch.device(cfg.device)
        self.dir = stage_folder(cfg)
        self.data, self.words = dataset(cfg), WordEncoder(cfg.text_len, cfg.text_dim)
        if self.data.latent:
            self.data = self.data.check(cfg, trajectory_folders(cfg))
        self.negative, self.codec = self.data.negative if self.data.latent else None, None
        if cfg.stage == 0 and not self.data.latent:  # the other stages take over its codec
            self.codec = PatchCodec.fit(self.data.batch(range(max(1, 512 * 32 ** 2 // cfg.size ** 2)))["video"], cfg.codec_patch, cfg.in_dim)
        require(cfg.stage < 2 or not cfg.ode_anchor or any(map(clips_in, trajectory_folders(cfg))),
                f"--ode-anchor {cfg.ode_anchor} needs the teacher's trajectories, and {trajectory_folders(cfg)[-1]} has none: train stage 1, or say --ode-anchor 0")
        self.nets, self.opts, self.tokens, self.trajectories = {}, {}, 0, None
        torch.manual_seed(cfg.seed)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16",
                              cache_enabled=False)  # a cast cached under no_grad would lose the gradient in a rollout

    def place(self, name, trained):
        """A network in its place on the devices, its weights unset: built without memory, sharded, then given memory."""
        cfg, half = self.cfg, self.cfg.dtype == "bfloat16"
        with torch.device("meta"):
            module = new_network(cfg, name)
        if half and not trained and name != "ema" and cfg.device == "cuda":  # a frozen network needs no float32 copy
            module.to(torch.bfloat16)
        return shard(module, cfg.recompute and trained, cfg.compile, half, cfg.context_parallel).to_empty(device=self.device)

    def keep(self, name, module, groups=()):
        """Take a network in; `groups` [(parameters' names start with, lr)] are trained, the rest is frozen."""
        cfg, optimizers, named = self.cfg, [], dict(module.requires_grad_(False).named_parameters())
        muon_lr = cfg.muon_lr if name == "student" else 0.0
        options = dict(betas=cfg.betas if name == "student" else cfg.critic_betas, weight_decay=cfg.weight_decay, fused=True)
        for prefixes, lr in groups:
            params = {n: p.requires_grad_() for n, p in named.items() if n.startswith(prefixes)}
            matrices = {n: p for n, p in params.items() if muon_lr and "blocks." in n and p.ndim == 2}
            if matrices:
                optimizers.append(Muon([dict(params=list(matrices.values()), peak=muon_lr)], muon_lr))  # from the peak update() rises and falls
            optimizers.append(torch.optim.AdamW([dict(params=[p for n, p in params.items() if n not in matrices], peak=lr)], lr, **options))
        for optimizer in optimizers:
            begin_state(optimizer)
        self.nets[name], self.opts[name] = module, optimizers

    def batches(self, purpose):
        """This process's share of the step's global batch, one micro-batch at a time."""
        cfg, share = self.cfg, self.cfg.batch_size // self.world
        start = (self.before + self.step) * cfg.batch_size + self.rank * share
        clips = [cfg.seed * 10_000_000 + i for i in range(start, start + share)]
        size = min(cfg.micro_batch or share, share)
        for i in range(0, share, size):
            yield self.batch(clips[i:i + size], purpose)

    def batch(self, clips, purpose):
        raw = self.data.batch(clips)
        if self.data.latent:  # captions alone: a clip without content, of which only the shape is used
            x0, text = raw.get("latents"), raw["embeddings"]
            x0 = torch.zeros(len(clips), self.cfg.frames, self.cfg.in_dim, *latent_sides(self.cfg)) if x0 is None else x0
        else:
            x0, text = self.codec.encode(raw["video"].to(self.device)), self.words.encode(raw["text"])
        self.tokens = x0[0, :, 0].numel() // self.cfg.patch ** 2  # of a clip
        return Batch(clips, x0.to(self.device), text.to(self.device), self.draws(clips, purpose))

    def trajectory(self, draws):
        """Teacher trajectories for a batch: states (b, levels + 1, f, c, h, w), noise first, and their texts."""
        if self.trajectories is None:  # those that this stage has made, or those of the stage 1 before it
            self.trajectories = next(filter(None, map(clips_in, trajectory_folders(self.cfg))), [])
        numbers = (draws.rand(1)[:, 0] * len(self.trajectories)).long().tolist()
        rows = [read_tensors(self.trajectories[n]) for n in numbers]
        text = pad_sequence([row["text"] for row in rows], batch_first=True)
        return torch.stack([row["states"] for row in rows]).to(self.device), text.to(self.device)

    def draws(self, clips, purpose):
        return Draws(clips, self.cfg.seed, self.cfg.stage, self.before + self.step, purpose, device=self.device)

    def share(self, loss, batch):
        """A micro-batch's part of the mean over the global batch (the mean over processes adds the parts up)."""
        return loss * (len(batch.x0) * self.world / self.cfg.batch_size)

    def add_up(self, log, numbers, batch):
        """Add a micro-batch's part of these means to the log: the same numbers however the global batch is split."""
        for name, value in numbers.items():
            log[name] = log.get(name, 0.0) + self.share(value, batch).item()

    def update(self, name):
        """Clip, check, step every optimizer of a network; returns the gradient norm. Skips non-finite gradients."""
        cfg, net = self.cfg, self.nets[name]
        norm = float(whole(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)))
        done = self.step - (cfg.critic_warmup if name == "student" and cfg.stage > 1 else 0)  # steps it has made
        rise = min(1.0, (done + 1) / max(1, cfg.warmup))
        falling = cfg.decay * (cfg.iters - (cfg.critic_warmup if cfg.stage > 1 else 0))
        fall = min(1.0, (cfg.iters - self.step) / max(1.0, falling)) if name == "student" else 1.0
        self.bad[name] = 0 if math.isfinite(norm) else self.bad.get(name, 0) + 1
        for o in self.opts[name]:
            for g in o.param_groups:
                g["lr"] = g["peak"] * rise * fall
            if math.isfinite(norm):
                o.step()
            o.zero_grad()
        if self.bad[name] >= cfg.max_bad_steps:
            last = next(iter(saved_states(self.dir)), "none")
            raise UsageError(f"stage {cfg.stage}, step {self.step + 1}: {self.bad[name]} non-finite gradients in a row in {name} "
                             f"(last good state: {last}): start again with a lower --lr, under another --tag or with --no-resume")
        if name == "student" and math.isfinite(norm):
            decay = min(cfg.ema, (done + 1) / (done + 10))
            with torch.no_grad():
                for p, q in zip(self.nets["ema"].parameters(), net.parameters()):
                    p.lerp_(q, 1 - decay)
        return norm


# ---------------------------------------------------------------- the stages, a function each: one training step

def teacher_step(run):
    """Stage 0: flow matching on real clips; the conditioning image is clean, its frame at t = 0."""
    cfg, log = run.cfg, {}
    for batch in run.batches("teacher"):
        u, drop = batch.draws.stratified_uniform(), batch.draws.rand(1, 1) < cfg.text_drop
        text = batch.text.masked_fill(drop, 0.0)
        t = frame_times(L.shift_time(u, cfg.train_shift), batch.x0, cfg.first)
        with run.autocast():
            loss = L.flow_matching_loss(lambda x, t: run.nets["student"](x, t, text), batch.x0, batch.draws.randn(*batch.x0.shape[1:]), t)
        run.share(loss, batch).backward()
        run.add_up(log, {"loss": loss}, batch)
    return {**log, "grad": run.update("student")}


def ode_step(run):
    """Stage I: from a state of the teacher's trajectory, every chunk at its own level, to its clean end (paper eq. 3)."""
    cfg, log = run.cfg, {}
    times = torch.tensor([*schedule(cfg.levels, cfg.shift), 0.0], device=run.device)
    mask = block_causal_mask(cfg.frames, cfg.first, cfg.chunk, cfg.window + cfg.chunk, cfg.sink)  # what the stream will see
    bounds = chunk_bounds(cfg.frames, cfg.first, cfg.chunk)[1 if cfg.first else 0:]
    for batch in run.batches("ode"):
        path, text = run.trajectory(batch.draws)                              # (b, levels + 1, f, c, h, w)
        level = batch.draws.choice(cfg.level_weights, len(bounds))            # one level a chunk
        level = torch.cat([torch.full_like(level[:, :1], cfg.levels).expand(-1, cfg.first),
                           level.repeat_interleave(cfg.chunk, 1)], 1)         # (b, f); the image is clean
        x_t = path.gather(1, level[:, None, :, None, None, None].expand(-1, 1, -1, *path.shape[3:]))[:, 0]
        with run.autocast():
            loss = L.ode_regression_loss(lambda x, t: run.nets["student"](x, t, text, mask=mask), x_t, path[:, -1], times[level])
        run.share(loss, batch).backward()
        run.add_up(log, {"loss": loss}, batch)
    return {**log, "grad": run.update("student")}


def dmd_gradient(run, x, batch, draws, exit_step):
    """Stages II and III: the direction from the student's clip x to what the teacher would rather see (paper eq. 6)."""
    cfg, k, teacher, fake = run.cfg, run.cfg.first, run.nets["teacher"], run.nets["fake"]
    t = frame_times(L.student_levels(draws.stratified_uniform(), cfg.score_shift), x, k)
    x_t = L.add_noise(x, draws.randn(*x.shape[1:]), t)
    with torch.no_grad(), run.autocast():
        x0_real = L.x0_from_flow(x_t, guided(teacher, batch.text, cfg.guidance, run.negative)(x_t, t), t)
        x0_fake = L.x0_from_flow(x_t, fake(x_t, t, batch.text), t)
    clip = x[:, k:].clone().requires_grad_()
    loss = L.dmd_loss(clip, L.dmd_gradient(x[:, k:], x0_real[:, k:], x0_fake[:, k:]))
    if cfg.dmd_flow:  # the first difference is the one to the image
        whole_clip = torch.cat([x[:, :k], clip], 1)
        loss = loss + cfg.dmd_flow * L.dmd_loss(L.change(whole_clip), L.dmd_gradient(*map(L.change, (x, x0_real, x0_fake))))
    grad, = torch.autograd.grad(loss, clip)
    return grad, {"dmd": len(x) * grad.flatten(1).norm(dim=1).mean(), "distance": (x - x0_real)[:, k:].abs().mean()}


def judged_level(cfg, draws, x, exit_step):
    """The random level (b, f) at which the discriminator sees a clip that left after pass `exit_step`; the image stays clean."""
    u = L.shift_time(draws.stratified_uniform() * cfg.gan_t_max, cfg.gan_shift)
    if cfg.gan_interval:
        times = [*schedule(cfg.student_steps, cfg.shift), 0.0]
        u = times[exit_step + 1] + (times[exit_step] - times[exit_step + 1]) * u
    return frame_times(u, x, cfg.first)


def judge(run, x_t, batch, t):
    """The discriminator's logits of clips noised to t; `x_t` may carry a gradient."""
    with run.autocast():
        return run.nets["disc"](x_t, t, batch.text)


def gan_gradient(run, x, batch, draws, exit_step):
    """Stage III: the direction in which the discriminator finds the student's clip more real (paper eq. 9)."""
    cfg, k = run.cfg, run.cfg.first
    clip = x[:, k:].clone().requires_grad_()
    t, eps = judged_level(cfg, draws, x, exit_step), draws.randn(*x.shape[1:])
    fake = judge(run, L.add_noise(torch.cat([x[:, :k], clip], 1), eps, t), batch, t)
    real = None
    if cfg.gan_loss == "relativistic":
        with torch.no_grad():
            real = judge(run, L.add_noise(batch.x0, eps, t), batch, t)  # same noise, same level, same image: a pair
    grad, = torch.autograd.grad(L.GAN_LOSSES[cfg.gan_loss][1](real, fake), clip)
    return grad, {"gan": len(x) * grad.flatten(1).norm(dim=1).mean()}


def anchor_step(run, batch):
    """Stages II and III: stage I's regression goes on, on the student's own rollout. From the noise of a teacher's trajectory the
    student should reach its end: DMD follows the reverse KL and forgets futures, this term is charged for each (DMD, eq. 9)."""
    cfg, k, draws = run.cfg, run.cfg.first, run.draws(batch.clips, "anchor")
    path, text = run.trajectory(draws)
    with run.autocast():
        x = torch.cat(list(rollout(run.nets["student"], path[:, -1, :k], text, lambda n: draws.randn(n, *path.shape[3:]), cfg.frames,
                                   cfg.student_steps, 0, True, cfg.context_level, cfg.cache_grad, start=path[:, 0])), 1)
    loss = L.anchor_loss(x[:, k:], path[:, -1, k:])
    (cfg.ode_anchor * run.share(loss, batch)).backward()
    return {"anchor": loss.detach()}


def fake_score_step(run, clips, update):
    """The fake score follows the student: flow matching on its clips (paper eq. 5)."""
    cfg, log = run.cfg, {}
    for batch, x in clips:
        draws = run.draws(batch.clips, f"fake{update}")
        t = frame_times(L.student_levels(draws.stratified_uniform(), cfg.score_shift), x, cfg.first)
        with run.autocast():
            loss = L.fake_score_loss(lambda x, t: run.nets["fake"](x, t, batch.text), x, draws.randn(*x.shape[1:]), t)
        run.share(loss, batch).backward()
        run.add_up(log, {"fake_loss": loss}, batch)
    run.update("fake")
    return log


def disc_step(run, clips, update, exit_step):
    """The discriminator learns to tell real from generated, with approximate R1 and R2 (paper eq. 8, 10)."""
    cfg, log = run.cfg, {}
    regular = (run.step * cfg.disc_updates + update) % cfg.r_every == 0
    for batch, x in clips:
        draws = run.draws(batch.clips, f"disc{update}")
        t, eps = judged_level(cfg, draws, x, exit_step), draws.randn(*x.shape[1:])
        pair = [L.add_noise(clip, eps, t) for clip in (batch.x0, x)]
        real, fake = (judge(run, x_t, batch, t) for x_t in pair)
        loss = L.GAN_LOSSES[cfg.gan_loss][0](real, fake)
        for x_t, logits in zip(pair, (real, fake)) if regular else ():
            delta = cfg.r_sigma * draws.randn(*x.shape[1:]) * L.per_frame(t > 0)  # the image is given
            loss = loss + cfg.r_weight * L.approximate_r(lambda x_t: judge(run, x_t, batch, t), x_t, logits, delta)
        run.share(loss, batch).backward()
        run.add_up(log, {"d_real": real.mean(), "d_fake": fake.mean(), "d_pairs": (real > fake).float().mean()}, batch)
    run.update("disc")
    return log


def distil_step(run):
    """Stages II and III: roll out, move the student along the chosen terms, let the critics follow on the same clips.

    A term gives a direction for the clip: the gradient of its loss by the latents x, not by any weight. Their weighted sum goes into
    x.backward(), which carries it through the rollout into the student; the critics see x without its graph."""
    cfg, clips, log = run.cfg, [], {}
    moving = run.step >= cfg.critic_warmup
    terms = {name: (w, f) for name, w, f in (("dmd", cfg.dmd, dmd_gradient), ("gan", cfg.gan, gan_gradient)) if w}
    exit_step = int(run.draws([0], "exit").choice([1.0] * cfg.student_steps, 1))
    for batch in run.batches("roll"):
        noise = lambda frames: batch.draws.randn(frames, *batch.x0.shape[2:])
        with run.autocast():
            x = torch.cat(list(rollout(run.nets["student"], batch.x0[:, :cfg.first], batch.text, noise, cfg.frames,
                                       cfg.student_steps, exit_step, moving, cfg.context_level, cfg.cache_grad)), 1)
        if moving:
            grads = {}
            for name, (_, term) in terms.items():
                grads[name], numbers = term(run, x.detach(), batch, run.draws(batch.clips, name), exit_step)
                run.add_up(log, numbers, batch)
            if cfg.gan_ratio and {"dmd", "gan"} <= grads.keys():
                dmd_norm, gan_norm = (L.per_frame(grads[name].flatten(1).norm(dim=1, keepdim=True)) for name in ("dmd", "gan"))  # clip by clip
                grads["gan"] *= cfg.gan_ratio * dmd_norm / gan_norm.clamp_min(1e-12)
            x[:, cfg.first:].backward(run.share(sum(terms[name][0] * grad for name, grad in grads.items()), batch))
            if cfg.ode_anchor:
                run.add_up(log, anchor_step(run, batch), batch)
        run.add_up(log, {"motion": motion(x), "real_motion": motion(batch.x0)}, batch)
        clips.append((batch, x.detach()))
    if moving:
        log["grad"] = run.update("student")
    for update in range(cfg.critic_updates * bool(cfg.dmd)):
        log.update(fake_score_step(run, clips, update))
    for update in range(cfg.disc_updates * bool(cfg.gan)):
        log.update(disc_step(run, clips, update, exit_step))
    if cfg.probe_every and run.step % cfg.probe_every == 0:
        log["spread"] = probe_spread(run)
    return log


@torch.no_grad()
def probe_spread(run, images=16, seeds=4):
    """How far the student's clips of one image differ from seed to seed: the root of the variance of the last chunk's latents over
    seeds, the mean over held-out images. It falls when futures are forgotten, long before clips stand still."""
    cfg, own = run.cfg, max(1, images // run.world)
    clips = list(held_out(images))[run.rank * own % images:][:own]
    batch, ends = run.batch(clips, "probe"), []
    for seed in range(seeds):
        draws = Draws(clips, "probe", seed, device=run.device)
        with run.autocast():
            chunks = list(rollout(run.nets["student"], batch.x0[:, :cfg.first], batch.text, lambda n: draws.randn(n, *batch.x0.shape[2:]),
                                  cfg.frames, cfg.student_steps, context_level=cfg.context_level))
        ends.append(chunks[-1])
    return torch.stack(ends).var(0).mean().sqrt().item()


def motion(x, lag=4):
    """Root mean square difference of frames `lag` apart, the mean over clips: it falls when a student turns static."""
    lag = min(lag, x.shape[1] - 1)
    return (x[:, lag:] - x[:, :-lag]).detach().square().flatten(1).mean(1).sqrt().mean()


STEPS = {0: teacher_step, 1: ode_step, 2: distil_step, 3: distil_step}


# ---------------------------------------------------------------- the beginning of a stage

def start_from(cfg):
    """Where a stage finds (its student's weights, its teacher's)."""
    teacher = Path(cfg.teacher or Path(cfg.out) / "stage0")
    return Path(cfg.init or (teacher if cfg.stage == 1 else Path(cfg.out) / f"stage{cfg.stage - 1}")), teacher


def trajectory_folders(cfg):
    """Where the teacher's trajectories may lie: in stage 1 itself, in the stage that this one starts from, in stage 1 of this run."""
    return [stage / "trajectories" for stage in (stage_folder(cfg), start_from(cfg)[0], Path(cfg.out) / "stage1")]


def steps_before(cfg):
    """Steps that were already made of this stage's clips and noise: those of the stage it starts from, if that has the same
    number (--stage 2 --init out/toy/stage2 trains on, on new clips), else 0."""
    there = cfg.stage and read_settings(start_from(cfg)[0]) or {}
    return there.get("steps_before", 0) + there.get("iters", 0) if there.get("stage") == cfg.stage else 0


def networks(cfg):
    """What a stage holds: {name: (whose weights it starts from, [(parameters' names start with, lr)] that are trained)}."""
    nets = {"ema": ("student", []), "student": ("student", [("", cfg.lr)])}
    if cfg.stage == 1 or cfg.stage > 1 and cfg.dmd:
        nets["teacher"] = ("teacher", [])
    if cfg.stage > 1 and cfg.dmd:
        nets["fake"] = ("fake", [("", cfg.fake_lr)])
    if cfg.stage > 1 and cfg.gan:
        heads = ("heads.", "norm.", "out."), cfg.disc_lr
        backbone = tuple(f"backbone.{part}" for part in ("patch_", "text_", "time_", "blocks.")), cfg.backbone_lr  # not its flow head
        nets["disc"] = ("student" if cfg.disc_causal else "teacher", [heads] + [backbone] * bool(cfg.backbone_lr))
    return nets


def new_network(cfg, name):
    """One of them, uninitialised."""
    if name != "disc":
        return build(cfg)
    return Discriminator(build(cfg), cfg.disc_layers, cfg.disc_causal, cfg.disc_framewise, cfg.disc_queries)


def prepare(run):
    """Give a stage its codec and its networks: the student from the stage before, the rest from the teacher."""
    cfg = run.cfg
    before, teacher = start_from(cfg)
    followed = before / "fake.safetensors"
    if cfg.stage == 0:
        weights = {"student": (build(cfg).init_weights().state_dict(), before)}
    else:
        weights = {"teacher": (source(cfg, teacher)[0], teacher)}
        found, run.codec = source(cfg, before)
        weights["student"] = found, before
        # a fake score that has followed this very student goes on, else it starts as the teacher
        weights["fake"] = (open_weights(followed), followed) if followed.is_file() else weights["teacher"]
    for name, (origin, groups) in networks(cfg).items():
        start, where = weights[origin]
        if name == "disc":
            heads = Discriminator(None, cfg.disc_layers, queries=cfg.disc_queries, cfg=cfg).state_dict()
            start = {**{f"backbone.{k}": v for k, v in start.items()}, **heads}
        run.keep(name, load_into(run.place(name, bool(groups)), start, where, own_rows), groups)


def source(cfg, path):
    """Weights to start from, unread: (open_weights(), codec) of a stage's folder, or of official weights (codec None).
    UsageError where a stage's network is of another shape than the one asked for."""
    settings = read_settings(path)
    if settings is None:
        return open_weights(path), None
    for name in (field.name for field in fields(Shape)):
        require(settings[name] == getattr(cfg, name),
                f"the checkpoint in {path} has {name} {settings[name]}, this run {getattr(cfg, name)}: use {flag(name)} {settings[name]}")
    return open_weights(Path(path) / "ema.safetensors"), PatchCodec.load(Path(path) / "codec.safetensors")


def make_trajectories(run):
    """The teacher's ODE trajectories, a file each with the states at the student's levels. Those that are there are kept."""
    cfg, folder, at_once = run.cfg, run.dir / "trajectories", run.cfg.micro_batch or 32
    keep = range(0, cfg.ode_steps, cfg.ode_steps // cfg.levels)
    missing = by_first(lambda: [n for n in range(cfg.trajectories) if not (folder / f"{n:06d}.safetensors").is_file()])
    mine = missing[run.rank::run.world]
    mine += missing[:1] * (-(-len(missing) // run.world) - len(mine))  # as many for all: every pass gathers weights
    for i in tqdm(range(0, len(mine), at_once), desc="trajectories", disable=not run.writes):
        numbers = mine[i:i + at_once]
        batch = run.batch([cfg.seed * 10_000_000 + 5_000_000 + n for n in numbers], "trajectories")
        given = batch.x0[:, :0 if run.data.latent and run.data.only_text else cfg.first]  # from text alone the teacher makes the image too
        with run.autocast():
            end, states = sample_ode(guided(run.nets["teacher"], batch.text, cfg.guidance, run.negative), batch.draws.randn(*batch.x0.shape[1:]),
                                     given, schedule(cfg.ode_steps, cfg.shift), keep)
        for n, path_states, text in zip(numbers, torch.stack([*states, end], 1), batch.text):
            if world()[0] % cfg.context_parallel == 0:  # the others of a group have made the same
                save_tensors(folder / f"{n:06d}.safetensors", {"states": path_states, "text": text})
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------- what a stage leaves behind

def export(run):
    """Plain safetensors: the student and its running average for sample.py, all that the next stage starts from."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for name in [name for name in ("student", "ema", "fake") if name in run.nets]:
        file = "weights.safetensors" if name == "student" else f"{name}.safetensors"
        tensors = get_model_state_dict(run.nets[name], options=options)
        if run.writes:
            save_tensors(run.dir / file, tensors)
    if run.writes and run.codec:
        run.codec.save(run.dir / "codec.safetensors")


def show(run):
    """samples.png and samples.gif: real clips, then what the stage makes of the same first frames."""
    cfg = run.cfg
    if not cfg.samples or not run.codec:  # latents alone cannot be shown
        return
    batch = run.batch(list(held_out(cfg.samples)), "samples")
    with run.autocast():
        noise = lambda frames: batch.draws.randn(frames, *batch.x0.shape[2:])
        x = animate(run.nets["ema"], asdict(cfg), batch.x0[:, :cfg.first], batch.text, noise, cfg.frames)
    if run.writes:
        video = torch.cat([run.codec.decode(batch.x0), run.codec.decode(x)])
        write_sheet(run.dir / "samples.png", video)
        with video_writer(run.dir / "samples.gif", zoom=3) as write:
            write(rearrange(video, "(r k) f c h w -> f c (r h) (k w)", r=2))


# ---------------------------------------------------------------- the loop

def reason_to_stop(past, fraction):
    """Why stage II ends after the steps whose logs are `past`, or an empty string: DMD that goes on forgets futures, until motion
    collapses (paper section 4). Clips of one image differ less than this fraction of what they did at the start. 0: never."""
    spread = [log["spread"] for log in past if math.isfinite(log.get("spread", math.nan))]
    if fraction and spread and spread[-1] < fraction * spread[0]:
        return f"clips of one image differ by {spread[-1]:.3f} from seed to seed, at the start it was {spread[0]:.3f}"
    return ""


def look(cfg, folder):
    """What is to be done about a stage's folder: "keep" what is finished, "train" it (or train on), or train it "anew".

        --no-resume                                        anew
        no settings there, or nothing trained              train (a saved state without settings: UsageError)
        settings or origin others than asked for           UsageError
        the same, metrics.json there or not                keep, or train on from the saved state

    Changes nothing."""
    if not cfg.resume:
        return "anew"
    before, states = read_json(folder / "config.json") if (folder / "config.json").is_file() else None, saved_states(folder)
    require(isinstance(before, dict | None), f"{folder / 'config.json'} is damaged: --no-resume trains the stage again")
    require(before or not states, f"{folder} holds a saved state but no config.json, so nobody knows what it was trained with: "
            "--no-resume trains it again, another --out or --tag keeps it")  # of a run that was moved away while it saved
    if not before or not (states or any((folder / left).exists() for left in ("trajectories", "metrics.json"))):
        return "train"
    free = "out resume device micro_batch recompute context_parallel compile max_bad_steps save_every samples eval_clips".split()
    plain = lambda settings: json.loads(json.dumps(asdict(settings)))  # tuples become lists
    known = {**plain(TrainConfig()), **before}  # runs older than a field had its default
    for name, value in plain(cfg).items():
        same = known[name] == value or (
            name in ("data", "init", "teacher") and known[name] and value and Path(known[name]).resolve() == Path(value).resolve())
        require(name in free or same, f"{folder} was trained with {name} {known[name]!r}, now it is {value!r}: "
                "choose another --out or --tag to keep it, or --no-resume to train it again")
    origin = origins(cfg)
    require(known.get("origin", origin) == origin, f"{folder} was started from other weights than those that are now in "
            f"{' and '.join(map(str, start_from(cfg)))}: --no-resume trains it again, another --out or --tag keeps it")
    return "keep" if (folder / "metrics.json").is_file() else "train"


def origins(cfg):
    """Fingerprints of what a stage starts from."""
    return [fingerprint(path) for path in start_from(cfg)] if cfg.stage else []


def claim(cfg, folder, anew):
    """Make a stage's folder this run's: empty if it is trained anew, with its settings."""
    if anew and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**asdict(cfg), "origin": origins(cfg), "steps_before": steps_before(cfg)})


def loop(run):
    """The training loop of every stage, to the last step or the early stop; returns its speed and peak memory in words.
    SIGTERM, with which a scheduler takes the machine back, and Ctrl-C: saves after the step under way, exits with 128 + the signal."""
    cfg = run.cfg
    before = (run.dir / "log.jsonl").read_text().splitlines()[:run.step] if run.step and (run.dir / "log.jsonl").is_file() else []
    past = [json.loads(line) for line in before if line.endswith("}")]  # a killed run may leave part of one
    stop = lambda: reason_to_stop(past, cfg.stop_spread if cfg.stage == 2 else 0.0)
    reason = stop()
    run.began -= 60 * (past[-1].get("minutes", 0.0) if past else 0.0)  # as if it had never been interrupted
    bar = tqdm(total=cfg.iters, initial=run.step, desc=run.dir.name, disable=not run.writes, mininterval=1.0)
    say = bar.write if run.writes else lambda text: None
    share = cfg.batch_size // run.world
    passes, resumed, began = -(-share // (cfg.micro_batch or share)), run.step, now(run.device)
    if run.writes:
        print(f"stage {cfg.stage}: a step is {cfg.batch_size} clips = {run.parts} x {share} clips, in {passes} passes")
        with written_whole(run.dir / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(log) + "\n" for log in past))
    with open(run.dir / "log.jsonl", "a") if run.writes else contextlib.nullcontext() as file, asked_to_stop(signal.SIGTERM, signal.SIGINT) as came:
        while run.step < cfg.iters and not reason:
            log = averaged({**STEPS[cfg.stage](run), "terminated": float(bool(came))})  # all processes act alike
            terminated = log.pop("terminated")
            if "motion" in log:  # relative to the real clips of the whole batch
                log["motion"] /= max(1e-9, log.pop("real_motion"))
            run.step += 1
            bar.update()
            past.append({"step": run.step, "minutes": (time.time() - run.began) / 60, **log})
            if run.writes:
                bar.set_postfix({k: f"{v:.3g}" for k, v in log.items()}, refresh=False)
                file.write(json.dumps(past[-1]) + "\n")
                file.flush()
            if cfg.save_every and run.step % cfg.save_every == 0 or terminated:
                save_state(run)
            if terminated:
                say(f"stage {cfg.stage} was terminated and saved at step {run.step}: the same command goes on from there")
                raise SystemExit(128 + (came or [signal.SIGTERM])[0])
            if reason := stop():
                say(f"stage {cfg.stage} stops early at step {run.step}: {reason}")
    bar.close()
    return in_words(run, (run.step - resumed) / (now(run.device) - began))


def in_words(run, rate):
    """Steps and tokens a second, and memory."""
    cfg = run.cfg
    kib = torch.cuda.max_memory_allocated() / 1024 if cfg.device == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1))  # there it counts bytes
    return f"{rate:.2f} steps/s, {rate * cfg.batch_size * run.tokens:,.0f} tokens/s, peak memory {kib / 2 ** 20:.1f} GiB per process"


def train(cfg):
    """One stage from its beginning, or from where it was interrupted, to its end; what is finished is kept."""
    folder, (rank, _) = stage_folder(cfg), world()
    latents = cfg.data and clips_in(cfg.data)
    for path in start_from(cfg) if cfg.stage else ():
        require(path.resolve() != folder.resolve(), f"{folder} cannot start from itself: choose another --tag or --out")
        codec = source(cfg, path)[1]
        require(codec or latents, f"{path} was trained on latents: make some with data.py encode, and name their folder with --data")
        patch = codec.patch if codec else cfg.codec_patch
        require(patch == cfg.codec_patch, f"{path} has a codec of {patch} pixels a patch, this run {cfg.codec_patch}: use --codec-patch {patch}")
        require(not codec or not latents, f"{path} was trained on frames, and {cfg.data} holds latents: leave out --data, or name a folder of videos")
    if (plan := by_first(look, cfg, folder)) == "keep":
        if rank == 0:
            print(f"stage {cfg.stage} is finished and kept: {folder} (--no-resume trains it again)")
        return
    with contextlib.ExitStack() as stack:
        by_first(stack.enter_context, locked(folder))
        run = Run(cfg)  # reads the data, as prepare() reads the weights: only when all fits is anything removed or written
        prepare(run)
        by_first(claim, cfg, folder, plan == "anew")
        if cfg.stage == 1:
            make_trajectories(run)
        load_state(run)
        speed = loop(run)
        if not cfg.save_every or run.step % cfg.save_every:  # else the loop has just done it
            save_state(run)
        export(run)
        show(run)
        cfg.eval_clips *= run.codec is not None
        minutes = (time.time() - run.began) / 60
        del run
        gc.collect()
        if rank == 0:
            print(f"stage {cfg.stage}: {minutes:.1f} minutes, {speed}; results in {folder}", flush=True)
            score(cfg, folder, minutes)


def score(cfg, folder, minutes):
    """metrics.json: experiments/evaluate.py on held-out clips."""
    metrics = folder / "metrics.json"
    if cfg.eval_clips:
        from experiments import evaluate  # which itself reads this file
        try:
            evaluate.main([str(folder), "--clips", str(cfg.eval_clips)])
        except Exception as error:
            raise UsageError(f"stage {cfg.stage} is trained, but scoring it failed ({str(error) or type(error).__name__}): "
                             f"python experiments/evaluate.py {folder} shows where, the same command with --eval-clips 0 goes on without") from error
    write_json(metrics, {**(read_json(metrics) if cfg.eval_clips else {}), "minutes": minutes})


def main(argv=None):
    """The command line: one stage, or all four in order and the table."""
    given = parse(argv)
    with explain(), contextlib.nullcontext() if "plan" in given else processes(given.get("device")):
        if "plan" in given:
            from experiments import plan  # which itself reads this file
            return plan.main(argv)
        require("gpus" not in given, "--gpus needs --plan")
        every, control = given.get("stage", -1) == -1, given.pop("control", False)
        require(not every or not {"tag", "init"} & given.keys(), "--tag and --init belong to one stage: say which with --stage")
        require(every or not control, "--control belongs to the whole recipe: leave out --stage")
        for cfg in [settle(given, stage) for stage in (range(1 if "teacher" in given else 0, 4) if every else [given["stage"]])]:
            train(cfg)
        if control:
            train(settle({**given, **control_of(cfg)}, 2))
        if every and world()[0] == 0:
            from experiments import evaluate
            evaluate.summary(cfg.out)


def control_of(cfg):
    """What stage 3 is compared with: stage 2 goes on from where stage 3 started, for as many of the student's steps."""
    return dict(tag="control", init=str(start_from(cfg)[0]), iters=cfg.iters - cfg.critic_warmup, critic_warmup=0, stop_spread=0.0)


if __name__ == "__main__":
    main()
