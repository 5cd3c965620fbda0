"""A stage at work on any number of devices: its data, networks, optimizers and updates.

train.py says what is trained with which loss. This file says how: every network is built on the
meta device, sharded and then filled; a global batch is split over processes and micro-batches;
random numbers belong to clips, so that the numbers are the same however it is split.
"""
import functools
import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from data import Draws, PatchCodec, WordEncoder
from discriminator import Discriminator, disc_outputs, has_heads
from model import PRESETS, Shape, build
from scale.clips import open_dataset
from scale.muon import Muon
from scale.parallel import allocate, full_tensor, local_shard, say, shard, world
from scale.state import init_optimizer_state
from utils.errors import UsageError, require
from utils.files import check_whole, clips_in, read_finite, read_tensors
from utils.runs import (check_codec, read_settings, saved_states, stage_dir, start_from,
                        starts_from_weights, steps_before, trajectory_dirs)
from utils.settings import as_words, flag, peak_memory
from utils.weights import load_into, open_weights, same_network


@dataclass
class Batch:
    """One micro-batch: latents of real clips, their captions, and random numbers of its clips."""
    clip_ids: list
    x0: torch.Tensor      # (b, f, c, h, w)
    text: torch.Tensor    # (b, l, d)
    draws: Draws
    real: tuple = ()      # (clip, text) that the discriminator holds for real; train.py sets it


class Run:
    """A stage at work: settings, data, networks and their optimizers, the step."""

    def __init__(self, cfg, new_network):
        self.new_network = new_network  # callable (cfg, name) -> an uninitialised network
        self.cfg, self.dir, self.step, self.began = cfg, stage_dir(cfg), 0, time.time()
        self.nets, self.optimizers, self.bad_steps, self.tokens = {}, {}, {}, 0
        (rank, number), size = world(), cfg.context_parallel
        require(number % size == 0, f"--context-parallel {size} does not divide {number} "
                f"processes: start torchrun with a multiple of {size}")
        self.rank, self.world = rank // size, number // size  # processes that share a clip are one
        require(cfg.batch_size % self.world == 0, f"--batch-size {cfg.batch_size} does not divide "
                f"over {self.world} processes or groups of them")
        self.is_main, self.device = rank == 0, torch.device(cfg.device)
        self.clips_per_rank = cfg.batch_size // self.world
        self.past_steps = steps_before(cfg)
        self.data = open_dataset(cfg, trajectory_dirs(cfg))
        self.negative = self.data.negative if self.data.latent else None
        self.words, self.codec = WordEncoder(cfg.text_len, cfg.text_dim), None
        if cfg.stage == 0 and not self.data.latent:  # later stages take over this codec
            clips = self.data.batch(range(max(1, 512 * 32 ** 2 // cfg.size ** 2)))["video"]
            self.codec = PatchCodec.fit(clips, cfg.codec_patch, cfg.in_dim)
        self.trajectories = self.find_trajectories()
        check_whole(self.trajectories)
        self.check_trajectories()
        torch.manual_seed(cfg.seed)

    def find_trajectories(self):
        """The teacher's trajectories. Where whole clips are wanted (--gan-real teacher) those that
        continue real clips are passed over."""
        whole = self.cfg.stage > 1 and self.cfg.gan_weight and self.cfg.gan_real == "teacher"
        for folder in trajectory_dirs(self.cfg):
            files = clips_in(folder)
            if files and not (whole and "context" in read_tensors(files[0])):
                return files
        return []

    def check_trajectories(self):
        """Stages 2 and 3 have the trajectories that their terms ask for; UsageError if not."""
        cfg, last = self.cfg, trajectory_dirs(self.cfg)[-1]
        if cfg.stage < 2:
            return
        real = cfg.gan_weight and cfg.gan_real == "teacher"
        require(not real or self.trajectories, f"--gan-real teacher needs whole clips of the "
                f"teacher, and {last} has none: train stage 1 with --ode-context clean or noisy, "
                "or use --gan-real data")
        require(not cfg.ode_anchor or self.trajectories, "--ode-anchor needs the teacher's "
                f"trajectories, and {last} has none: train stage 1, or use --ode-anchor 0")
        if not (real or cfg.ode_anchor):
            return
        folder, first = self.trajectories[0].parent, read_tensors(self.trajectories[0])
        made = *first["states"].shape[:2], (read_settings(folder.parent) or {}).get("chunk", 0)
        wanted = cfg.ode_points + 1, cfg.frames, cfg.chunk if "context" in first else made[2]
        require(made == wanted, f"{folder} has {made[0] - 1} --ode-points of {made[1]} --frames in "
                f"chunks of {made[2]} --chunk, this stage {wanted[0] - 1}, {wanted[1]} and "
                f"{wanted[2]}: train stage 1 with the same, or leave out what needs its "
                "trajectories (--ode-anchor 0, --gan-real data)")

    # ---- networks

    def autocast(self):
        """Mixed precision for the forward passes."""
        # a weight cast that is cached under no_grad would lose the gradient in a rollout
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False,
                              enabled=self.cfg.dtype == "bfloat16")

    def build_sharded(self, name, trained):
        """Build on the meta device, shard, then allocate. Weights are uninitialised."""
        cfg, half = self.cfg, self.cfg.dtype == "bfloat16"
        with torch.device("meta"):
            net = self.new_network(network_config(cfg, name), name)
        if half and not trained and name != "ema" and cfg.device == "cuda":
            net.to(torch.bfloat16)  # a frozen network needs no float32 copy
        checkpointing = cfg.activation_checkpointing and trained
        offloaded = cfg.offload and cfg.stage > 1 and not trained
        compiled = cfg.compile == "all" or cfg.compile == "clips" and sees_whole_clips(cfg, name)
        net = shard(net, checkpointing, compiled, half, cfg.context_parallel, offloaded)
        return allocate(net, self.device, offloaded)

    def add_network(self, name, net, groups=()):
        """Keep a network; its `groups` [(prefixes of parameter names, lr)] are trained."""
        cfg, optimizers = self.cfg, []
        named = dict(net.requires_grad_(False).named_parameters())
        betas = {"fake": cfg.fake_betas, "disc": cfg.disc_betas}.get(name, cfg.betas)
        for prefixes, lr in groups:
            params = {n: p.requires_grad_() for n, p in named.items() if n.startswith(prefixes)}
            matrices = []
            if cfg.muon_lr and name == "student":
                matrices = [n for n, p in params.items() if "blocks." in n and p.ndim == 2]
            if matrices:  # `peak` is the rate from which update() rises and falls
                group = dict(params=[params.pop(n) for n in matrices], peak=cfg.muon_lr)
                optimizers.append(Muon([group], cfg.muon_lr))
            group = dict(params=list(params.values()), peak=lr)
            optimizers.append(torch.optim.AdamW([group], lr, betas=betas, fused=True,
                                                weight_decay=cfg.weight_decay))
        for optimizer in optimizers:
            init_optimizer_state(optimizer)
        self.nets[name], self.optimizers[name] = net, optimizers

    # ---- data

    def draws(self, clip_ids, purpose):
        """Random numbers for these clips at this step, for one purpose."""
        key = (self.cfg.seed, self.cfg.stage, self.past_steps + self.step, purpose)
        return Draws(clip_ids, *key, device=self.device)

    def batches(self, purpose):
        """This process's part of the step's global batch, one micro-batch at a time."""
        cfg, number = self.cfg, self.clips_per_rank
        start = (self.past_steps + self.step) * cfg.batch_size + self.rank * number
        clip_ids = [cfg.seed * 10_000_000 + i for i in range(start, start + number)]
        size = min(cfg.micro_batch or number, number)
        for i in range(0, number, size):
            yield self.batch(clip_ids[i:i + size], purpose)

    def step_in_words(self):
        """How a step's clips are split, for the first line of a stage."""
        cfg, number = self.cfg, self.clips_per_rank
        passes = -(-number // (cfg.micro_batch or number))
        return (f"stage {cfg.stage}: a step is {cfg.batch_size} clips = {self.world} processes x "
                f"{number} clips, in {passes} passes")

    def result_in_words(self, minutes, speed):
        """What a stage cost, for its last line; speed in steps a second."""
        tokens, memory = speed * self.cfg.batch_size * self.tokens, peak_memory(self.device)
        return (f"stage {self.cfg.stage}: {minutes:.1f} minutes, {speed:.2f} steps/s, "
                f"{tokens:,.0f} tokens/s, peak memory {memory:.1f} GiB per process; results in "
                f"{self.dir}")

    def batch(self, clip_ids, purpose):
        """These clips as latents, with embedded captions."""
        cfg, raw = self.cfg, self.data.batch(clip_ids)
        if self.data.latent:
            text = raw["embeddings"]
            empty = torch.zeros(len(clip_ids), cfg.frames, cfg.in_dim, *latent_sides(cfg))
            x0 = raw.get("latents", empty)  # of captions alone only the shape is used
        else:
            text = self.words.encode(raw["text"])
            x0 = self.codec.encode(raw["video"].to(self.device))
        self.tokens = x0[0, :, 0].numel() // cfg.patch ** 2  # per clip
        x0, text = x0.to(self.device), text.to(self.device)
        return Batch(clip_ids, x0, text, self.draws(clip_ids, purpose))

    def trajectory(self, draws):
        """Teacher trajectories for a batch: states (b, points + 1, f, c, h, w), texts, and clips
        (b, f, c, h, w) whose chunks are the clean past of later ones: the clips that were
        continued, or the ends of whole-clip trajectories; None with --ode-context noisy."""
        numbers = (draws.rand(1)[:, 0] * len(self.trajectories)).long().tolist()
        rows = [read_finite(self.trajectories[n]) for n in numbers]
        text = pad_sequence([row["text"] for row in rows], batch_first=True).to(self.device)
        states = torch.stack([row["states"] for row in rows]).to(self.device)
        if "context" in rows[0]:
            return states, text, torch.stack([row["context"] for row in rows]).to(self.device)
        return states, text, None if self.cfg.ode_context == "noisy" else states[:, -1]

    # ---- losses and updates

    def batch_part(self, loss, batch):
        """A micro-batch's part of the mean over the global batch; processes are averaged."""
        return loss * (len(batch.clip_ids) * self.world / self.cfg.batch_size)

    def backward(self, loss, batch, log, name="loss"):
        """Backpropagate a micro-batch's part of a loss, and add it to the log."""
        self.batch_part(loss, batch).backward()
        self.add_to(log, {name: loss}, batch)

    def add_to(self, log, numbers, batch):
        """Add a micro-batch's part of these means to the log."""
        for name, value in numbers.items():
            log[name] = log.get(name, 0.0) + self.batch_part(value, batch).item()

    def update(self, name):
        """Clip, check and apply the gradients of a network; returns their norm. Gradients that are
        not finite are skipped; UsageError after `max_bad_steps` in a row."""
        cfg, net = self.cfg, self.nets[name]
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
        norm = float(full_tensor(norm))
        finite = math.isfinite(norm)
        for optimizer in self.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.lr_factor(name)
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        bad = self.bad_steps.setdefault(name, [])
        if finite:
            bad.clear()
        elif self.step not in bad:  # several updates of one step count as one
            bad.append(self.step)
        if len(bad) >= cfg.max_bad_steps:
            last = next(iter(saved_states(self.dir)), "none")
            raise UsageError(f"stage {cfg.stage}, step {self.step + 1}: {len(bad)} "
                             f"non-finite gradients in a row in {name} (last good state: {last}): "
                             "start again with a lower --lr, and another --tag or --no-resume")
        if name == "student" and finite:
            self.update_ema()
        return norm

    def student_steps_done(self):
        """Updates that the student has made before this step."""
        return self.step - (self.cfg.student_start if self.cfg.stage > 1 else 0)

    def lr_factor(self, name):
        """Rise over lr_warmup steps; the student's rate falls to 0 over its last lr_decay."""
        cfg = self.cfg
        if name != "student":
            return min(1.0, (self.step + 1) / max(1, cfg.lr_warmup))
        done = self.student_steps_done()
        rise = min(1.0, (done + 1) / max(1, cfg.lr_warmup))
        fall_steps = cfg.lr_decay * (done + cfg.iters - self.step)
        return rise * min(1.0, (cfg.iters - self.step) / max(1.0, fall_steps))

    @torch.no_grad()
    def update_ema(self):
        """ema = decay * ema + (1 - decay) * student, with a smaller decay in the first steps."""
        done = self.student_steps_done()
        decay = min(self.cfg.ema, (done + 1) / (done + 10))
        for average, p in zip(self.nets["ema"].parameters(), self.nets["student"].parameters()):
            average.lerp_(p.to(average.device), 1 - decay)


def sees_whole_clips(cfg, name):
    """Whether a network sees clips whole, and so few different shapes, or chunk by chunk."""
    return name in ("teacher", "fake", "disc") if cfg.stage > 1 else name == "student"


def latent_sides(cfg):
    """Height and width of a latent frame."""
    side = cfg.size // cfg.codec_patch
    return tuple(cfg.latent_size) if cfg.latent_size[0] else (side, side)


# ---------------------------------------------------------------- weights to start from

def network_config(cfg, name):
    """The config of one of a stage's networks: the real score may be larger than the student."""
    if name != "teacher" or cfg.stage < 2 or not cfg.real_score:
        return cfg
    return replace(cfg, **shape_at(cfg.real_score))


@functools.lru_cache
def shape_at(path):
    """{field of model.Shape: value} of the network in `path`, a stage's folder or official weights;
    of a preset, for plans."""
    if path in PRESETS:
        return {name: value for name, value in PRESETS[path].items()
                if name in {field.name for field in fields(Shape)}}
    settings = read_settings(path)
    if settings is not None:
        return {field.name: settings[field.name] for field in fields(Shape)}
    shape = open_weights(path).shape
    require(shape["num_heads"], f"{path}: nothing tells the number of its heads, so put its "
            "config.json beside the weights")
    return shape


def checkpoint_of(cfg, path):
    """(weights, codec) of a stage's folder, or of official weights (codec None), unread.

    Raises UsageError if the network has another shape than this run's."""
    settings, weights = read_settings(path), None
    if settings is None:
        weights = open_weights(path)
        shape = weights.shape
    else:
        shape = settings
    for name in (field.name for field in fields(Shape)):
        value = shape.get(name)
        known = settings is not None or value and name != "text_len"
        remedy = f"use {flag(name)} {value}"
        if weights and weights.preset and weights.preset != cfg.preset:
            remedy = f"use --preset {weights.preset}"
        require(not known or value == getattr(cfg, name), f"the checkpoint in {path} has {name} "
                f"{value}, this run {getattr(cfg, name)}: {remedy}")
    if weights is not None:
        return weights, None
    codec = PatchCodec.load(Path(path) / "codec.safetensors")
    check_codec(path, settings)
    return open_weights(Path(path) / "ema.safetensors"), codec


def starting_weights(cfg):
    """({network: (weights, where they are)}, codec) of stages 1 to 3. The fake score starts from
    the teacher, or from one that has followed this very student."""
    before, teacher = start_from(cfg)
    student, codec = checkpoint_of(cfg, before)
    weights = {"student": (student, before), "teacher": (checkpoint_of(cfg, teacher)[0], teacher)}
    weights["fake"] = weights["teacher"]
    followed = before / "fake.safetensors"
    if followed.is_file():
        weights["fake"] = (open_weights(followed), followed)
    if cfg.real_score and cfg.stage > 1:
        larger = replace(cfg, preset="", **shape_at(cfg.real_score))
        weights["real"] = (checkpoint_of(larger, cfg.real_score)[0], cfg.real_score)
    return weights, codec


def prepare(run, networks):
    """Give a stage its codec and its networks, each with the weights that it starts from.

    networks: {name: (whose weights it starts from, [(prefixes of parameter names, lr)])}"""
    cfg, told = run.cfg, set()
    if not starts_from_weights(cfg):
        weights = {"student": (build(cfg).init_weights().state_dict(), run.dir)}
    else:
        weights, run.codec = starting_weights(cfg)
    for name, (origin, groups) in networks.items():
        tensors, where = weights["real" if name == "teacher" and "real" in weights else origin]
        if starts_from_weights(cfg) and where not in told and run.codec is None:
            say(tensors.note())
        told.add(where)
        if has_heads(cfg, name):
            heads = Discriminator(None, cfg.disc_layers, queries=cfg.disc_queries,
                                  outputs=disc_outputs(cfg), cfg=cfg)
            backbone = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
            tensors = {**backbone, **heads.state_dict()}
        net = run.build_sharded(name, bool(groups))
        run.add_network(name, load_into(net, tensors, where, local_shard), groups)


def check_roles(cfg):
    """Weights are where their kind is expected, as far as that can be known; the larger real score
    speaks of the same latents and texts."""
    before, teacher = start_from(cfg)
    student = cfg.stage > 1 and read_settings(before) is None
    require(not student or open_weights(before).role != "teacher", f"{before} is Wan's own "
            f"network, a teacher, and stage {cfg.stage} starts from a student: train stage 1, or "
            "name a student's weights with --init")
    official = teacher.exists() and read_settings(teacher) is None
    require(not official or open_weights(teacher).role != "student", f"{teacher} is a student's "
            "generator, no teacher: name Wan's own network with --teacher")
    if student:
        unnamed = not open_weights(before).role
        same = official and unnamed and same_network(before, teacher)
        require(not same, f"{before} is the teacher in {teacher}, and stage {cfg.stage} starts "
                "from a student: train stage 1, or name a student's weights with --init")
        positions = " --absolute-positions" if cfg.absolute_positions else ""
        say(f"{before} goes on as a student with --chunk {cfg.chunk} --sink {cfg.sink} --window "
            f"{cfg.window} --shift {cfg.shift:g}{positions} --student-steps "
            f"{as_words(cfg.student_steps)}: give what it was trained with")
    if not cfg.real_score:
        return
    require(cfg.real_score not in PRESETS, f"--real-score {cfg.real_score}: a preset is enough for "
            "a plan, training needs the folder of its weights")
    shape = shape_at(cfg.real_score)
    for name in ("in_dim", "out_dim", "text_dim"):
        require(shape[name] == getattr(cfg, name), f"the real score in {cfg.real_score} has {name} "
                f"{shape[name]}, the student {getattr(cfg, name)}: they must be the same")
    require(shape["num_heads"] % cfg.context_parallel == 0, f"--context-parallel "
            f"{cfg.context_parallel} does not divide the {shape['num_heads']} heads of the real "
            "score")


def check_teacher(cfg, path):
    """The teacher at `path` has learnt what the stage asks of it: to make whole clips, to continue
    clips, or both (--teacher-forcing)."""
    forcing = (read_settings(path) or {}).get("teacher_forcing", 0.0)
    continues = cfg.stage == 1 and cfg.ode_context == "real"
    require(forcing or not continues, f"{path} has not learnt to continue clips: train a teacher "
            f"from it that has (--stage 0 --recipe causal-teacher) and name that with --teacher, "
            "or use --ode-context clean or noisy")
    require(forcing < 1 or continues, f"{path} is a causal teacher, which makes no whole clips: "
            "name a bidirectional one with --teacher, or use it in stage 1 with --ode-context real")


def check_teachers(configs):
    """The teacher that was named serves all stages to come, before the first one is trained."""
    for cfg in configs:
        if cfg.stage and cfg.teacher:
            check_teacher(cfg, Path(cfg.teacher))


def check_start(cfg, latents):
    """The weights that a stage starts from are elsewhere, of the right kind, and fit its clips."""
    require(not latents or not cfg.preview_every, f"--preview-every draws frames, and {cfg.data} "
            "holds latents, which alone cannot be shown: leave it out, and use sample.py")
    if cfg.stage:
        check_roles(cfg)
    for path in start_from(cfg) if starts_from_weights(cfg) else ():
        require(path.resolve() != stage_dir(cfg).resolve(), f"{path} cannot start from itself: "
                "choose another --tag or --out")
        codec = checkpoint_of(cfg, path)[1]
        require(codec or latents, f"{path} was trained on latents: make some with python -m "
                "scale.encode, and name their folder with --data")
        require(not codec or not latents, f"{path} was trained on frames, and {cfg.data} holds "
                "latents: leave out --data, or name a folder of videos")
        if cfg.stage and path == start_from(cfg)[1]:
            check_teacher(cfg, path)
        patch = codec.patch if codec else cfg.codec_patch
        require(patch == cfg.codec_patch, f"{path} has a codec of {patch} pixels a patch, this run "
                f"{cfg.codec_patch}: use --codec-patch {patch}")
