"""Settings: a command line generated from a dataclass, its checks, and what the machine offers."""
import argparse
import inspect
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

from losses import GAN_LOSSES
from model import chunk_bounds
from utils.errors import (UsageError, check_device, first_process, require,
                          wait_for_the_first)
from utils.layouts import config_beside, downloaded
from utils.tracking import check_tracker
from utils.weights import open_weights

INF = math.inf
LIMITS = (  # least, most, in words, the settings that have to lie between
    (1, INF, "at least 1", "batch_size trajectories ode_steps ode_points "
     "context_parallel disc_queries r1r2_every max_bad_steps size codec_patch window "
     "dim ffn_dim freq_dim num_heads num_layers in_dim patch text_len text_dim"),
    (0, INF, "at least 0", "iters micro_batch save_every eval_clips samples fps sink lr fake_lr "
     "preview_every disc_lr muon_lr backbone_lr weight_decay lr_warmup student_start fake_updates "
     "disc_updates guidance dmd_weight dmd_diff_weight gan_weight gan_ratio ode_anchor probe_every "
     "r1r2_weight r1r2_sigma disc_weight grad_chunks"),
    (1e-12, INF, "above 0", "grad_clip eps shift train_shift score_shift gan_shift"),
    (0, 1, "between 0 and 1", "teacher_forcing ema text_drop lr_decay gan_t_max stop_spread turns"),
    (-INF, 1, "at most 1", "context_level"),
    (3, INF, "at least 3", "frames"),
    (0, 90, "between 0 and 90, or its clips would be held-out ones", "seed"))
WEIGHTS = ("weights", "wan", "teacher", "init", "real_score", "vae", "text_encoder")
RENAMED = {  # flag of earlier versions -> what it is called now
    "--clip": "--grad-clip", "--critic-betas": "--fake-betas and --disc-betas",
    "--critic-lr": "--fake-lr and --disc-lr", "--critic-updates": "--fake-updates",
    "--critic-warmup": "--student-start", "--decay": "--lr-decay",
    "--disc-framewise": "--disc-granularity frame", "--dmd": "--dmd-weight",
    "--dmd-flow": "--dmd-diff-weight", "--gan": "--gan-weight", "--level-weights":
    "--ode-point-weights", "--levels": "--ode-points", "--r-every": "--r1r2-every",
    "--r-sigma": "--r1r2-sigma", "--r-weight": "--r1r2-weight", "--recompute":
    "--activation-checkpointing", "--stop-motion": "--stop-spread",
    "--stop-distance": "--stop-spread", "--plan": "python experiments/plan.py",
    "--warmup": "--lr-warmup", "--no-compile": "--compile none"}


def default_device():
    """The fastest kind of device that training can use here."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available() and "RANK" not in os.environ:
        return "mps"  # under torchrun gloo needs the CPU
    return "cpu"


def cuda_or_cpu():
    """The default of programs that run in one process."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device):
    """bfloat16 where it is fast."""
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device):
    """Whether a kind of device multiplies bfloat16 in hardware; without, it is up to 20 times
    slower than float32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and capabilities.get("avx512_bf16", False)


def synced_time(device):
    """Seconds, once the device has done all it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Peak memory of this process in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)  # macOS counts bytes, Linux KiB


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    """A command line that complains in one sentence and takes whole flag names only."""

    def __init__(self, description, **options):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        for word in message.replace("=", " ").split():
            if word in RENAMED:
                message = f"{word} is now {RENAMED[word]}"
        self.leave(f"{message}; {self.prog} --help lists every flag")

    def leave(self, message):
        """Say what is wrong, and exit."""
        if not first_process():  # all processes have the same flags
            wait_for_the_first()
        self.exit(2, f"error: {message}\n")

    def parse_args(self, *args, **options):
        """The flags; those that name weights as paths that hold them."""
        args = super().parse_args(*args, **options)
        try:
            for name in WEIGHTS:
                if getattr(args, name, None):
                    setattr(args, name, downloaded(getattr(args, name)))
        except UsageError as error:
            self.leave(error)
        return args


def flag(name):
    """A setting as a command-line flag."""
    return f"--{name.replace('_', '-')}"


def as_words(value):
    """The value of a setting as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def help_texts(config):
    """{field: the comment behind it} of a dataclass and its bases."""
    source = "".join(map(inspect.getsource, config.__mro__[:-1]))
    pattern = r"^    {}: .*?#\s*(.*)$"
    names = [field.name for field in fields(config)]
    return {name: re.search(pattern.format(name), source, re.M).group(1) for name in names}


def add_fields(parser, config, recipes):
    """A flag for every field of a dataclass, its help the comment behind the field. In brackets the
    values that the `recipes` {stage: {name: value}} use."""
    texts = help_texts(config)
    for field in fields(config):
        options = dict(type=field.type)
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif field.type is tuple:
            options = dict(type=type(field.default[0]), nargs="+")
        values = [as_words(recipe.get(field.name, field.default)) for recipe in recipes.values()]
        usual = values[0]
        if len(set(values)) > 1:
            usual = f"stages 0 to 3: {', '.join(values)}"
        text = f"{texts[field.name]} [{usual}]" if usual else texts[field.name]
        parser.add_argument(flag(field.name), default=None, help=text.replace("%", "%%"), **options)
    parser.add_argument("--wan", dest="teacher", help="As --teacher: a download of Wan 2.1.")


def given_values(args):
    """What was typed on the command line, as a dict; lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(args).items() if value is not None}


def inferred_preset(overrides):
    """The preset that was typed, or the one whose shape the teacher's official weights have; the
    toy for a stage of our own or the toy world."""
    teacher = Path(overrides.get("teacher", ""))
    if "preset" in overrides or "teacher" not in overrides or not teacher.exists():
        return overrides.get("preset", "toy")
    if "stage" in config_beside(teacher):  # one of ours
        return config_beside(teacher).get("preset", "toy")
    shaped = open_weights(teacher).preset
    require(shaped, f"{teacher} has the shape of no preset: add --preset, and flags for its shape")
    return shaped


# ---------------------------------------------------------------- checks

def check_stream(cfg):
    """The image, the chunks and the cache fit together."""
    try:
        chunk_bounds(cfg.frames, cfg.first, cfg.chunk)
    except ValueError as error:
        raise UsageError(str(error)) from None
    require(cfg.sink >= cfg.first or cfg.window >= cfg.frames, f"--sink {cfg.sink} is below "
            f"--first {cfg.first}: conditioning frames would leave the cache; use --sink "
            f"{cfg.first}")


def check_network(cfg):
    """Sizes divide as they must."""
    require(cfg.dim % (2 * cfg.num_heads) == 0,
            f"--dim {cfg.dim} does not divide into --num-heads {cfg.num_heads} of even width")
    require(cfg.num_heads % cfg.context_parallel == 0, f"--context-parallel {cfg.context_parallel} "
            f"does not divide the {cfg.num_heads} heads of the network")
    require(cfg.freq_dim % 2 == 0, f"--freq-dim {cfg.freq_dim} must be even")
    require(cfg.in_dim == cfg.out_dim, f"--in-dim {cfg.in_dim} and --out-dim {cfg.out_dim} must be "
            "the same")
    pixels = cfg.codec_patch * cfg.patch
    require(cfg.size % pixels == 0, f"--size {cfg.size} does not divide into patches of {pixels} "
            f"pixels: use --size {max(1, round(cfg.size / pixels)) * pixels}")
    sides = cfg.latent_size
    fits = len(sides) == 2 and all(side % cfg.patch == 0 for side in sides)
    require(fits and (min(sides) > 0 or not any(sides)), f"--latent-size {as_words(sides)} does "
            f"not work: give a height and a width that divide by {cfg.patch}, or 0 0")


def check_training(cfg):
    """Terms, betas, levels and the discriminator's layers make sense."""
    for name in ("betas", "fake_betas", "disc_betas"):
        betas = getattr(cfg, name)
        require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
                f"{flag(name)} takes two numbers, from 0 to below 1")
    weights = cfg.ode_point_weights
    require(len(weights) == cfg.ode_points + 1 and min(weights) >= 0 and sum(weights) > 0,
            f"--ode-point-weights needs {cfg.ode_points + 1} numbers from 0 up, one for each of "
            f"--ode-points {cfg.ode_points} and clean")
    require(cfg.stage != 1 or cfg.ode_context == "noisy" or not weights[-1], f"--ode-context "
            f"{cfg.ode_context} shows a chunk the clean past, and a chunk that is clean itself "
            f"learns nothing: end --ode-point-weights with 0, {as_words(weights[:-1])} 0")
    require(cfg.ode_steps % cfg.ode_points == 0, f"--ode-steps {cfg.ode_steps} is no multiple of "
            f"--ode-points {cfg.ode_points}")
    require(cfg.stage or cfg.iters, f"stage 0 of {cfg.preset} has nothing to train: name the "
            "official weights with --teacher, or give it --iters")
    if cfg.stage < 2:
        return
    require(cfg.dmd_weight or cfg.gan_weight, f"--dmd-weight 0 --gan-weight 0: stage {cfg.stage} "
            "has nothing to learn from, give one of them a weight")
    layers = sorted(set(cfg.disc_layers))
    valid = len(layers) == len(cfg.disc_layers) and 0 <= layers[0] and layers[-1] < cfg.num_layers
    require(not cfg.gan_weight or valid, f"--disc-layers {as_words(cfg.disc_layers)} does not "
            f"work: name different blocks of 0 to {cfg.num_layers - 1}")
    require(cfg.iters > cfg.student_start or not cfg.iters, f"--iters {cfg.iters} end before "
            f"--student-start {cfg.student_start}, so the student does not move: raise the first "
            "or lower the second")


def check_relatives(cfg):
    """What the relatives of AAD-1 switch on fits together."""
    passes = cfg.student_steps
    require(min(passes) >= 1, f"--student-steps {as_words(passes)}: numbers of passes, from 1 up")
    if cfg.stage < 2:
        return
    for given, name in ((cfg.gan_interval, "--gan-interval"),
                        (cfg.gan_real == "more", "--gan-real more"),
                        (not cfg.self_rollout, "--no-self-rollout")):
        require(not given or len(passes) == 1, f"{name} needs one number of --student-steps, not "
                f"{as_words(passes)}")
    require(cfg.self_rollout or not cfg.gan_interval and cfg.gan_real != "more", "--gan-interval "
            "and --gan-real more ask which pass made a clip, and with --no-self-rollout none did: "
            "leave it out")
    require(cfg.gan_real != "more" or passes[0] > 1, "--gan-real more compares clips of n and n + "
            "1 passes: use --student-steps 2 or more")
    bidirectional = cfg.dmd_weight and not cfg.disc_causal
    require(cfg.disc_backbone == "own" or not cfg.gan_weight or bidirectional, f"--disc-backbone "
            f"{cfg.disc_backbone} is the fake score, which is bidirectional and belongs to DMD: "
            "give --dmd-weight a number, and leave out --disc-causal")
    own = cfg.disc_backbone == "own" or not cfg.gan_weight
    levels = cfg.gan_t_max, cfg.gan_shift, cfg.gan_interval
    require(own or levels == (1, 1, False), f"--disc-backbone {cfg.disc_backbone} sees clips at "
            "the levels of the fake score: add --gan-t-max 1 --gan-shift 1 --no-gan-interval")
    require(cfg.gan_real != "teacher" or cfg.gan_loss != "relativistic", "--gan-loss relativistic "
            "compares clips of one image, and --gan-real teacher has others: use --gan-loss "
            "logistic")


def check_compiler(device):
    """torch.compile writes C++ for a CPU, and for a GPU a little C around its kernels."""
    usual = {"cpu": ("CXX", ["clang++" if sys.platform == "darwin" else "g++"]),
             "cuda": ("CC", ["gcc", "clang"])}
    require(device in usual, f"--compile does not work with --device {device}: leave it out")
    variable, names = usual[device]
    names = [os.environ.get(variable), *names] if os.environ.get(variable) else names
    found = [name for name in names if shutil.which(name)]
    require(found, f"--compile needs a compiler, and there is no {' or '.join(names)}: install "
            f"one, name it in {variable}, or use --compile none")
    works = subprocess.run([found[0], "--version"], capture_output=True).returncode == 0
    require(works, f"--compile needs a compiler, and {found[0]} --version fails: repair it, name "
            f"another in {variable}, or use --compile none")


def default_compile(cfg):
    """What to compile of a stage without --compile: on a CPU the networks of whole clips in stages
    0, 1 and 3, in which 200 steps win the half minute back; nothing if the compiler does not work,
    which is tried. Stage 2 is mostly rollouts, and they have a graph for every length of the cache,
    which takes minutes (docs/wan.md). Under torchrun every process would compile."""
    if cfg.device != "cpu" or "RANK" in os.environ or cfg.stage == 2 or cfg.iters < 200:
        return "none"
    try:
        check_compiler(cfg.device)
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:  # whatever a compiler may lack: headers, OpenMP, a place to write
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"stage {cfg.stage} is not compiled, which makes it slower: {reason[0]}",
              file=sys.stderr)
        return "none"
    return "clips"


def check_choice(name, value, choices):
    """One of a few words."""
    require(value in choices, f"{flag(name)} {value} is unknown: choose from {', '.join(choices)}")


def validate(cfg):
    """Raise UsageError, naming the field, for settings that cannot work together."""
    for least, most, words, names in LIMITS:
        for name in names.split():
            value = getattr(cfg, name)
            finite = abs(value) < INF or name == "grad_clip"  # which may be off
            require(least <= value <= most and finite, f"{flag(name)} {value} does not work: it "
                    f"has to be {words}{'' if finite else ', and finite'}")
    check_stream(cfg)
    check_choice("dtype", cfg.dtype, ("bfloat16", "float32"))
    check_choice("gan_loss", cfg.gan_loss, tuple(GAN_LOSSES))
    check_choice("disc_granularity", cfg.disc_granularity, ("clip", "chunk", "frame"))
    check_choice("disc_backbone", cfg.disc_backbone, ("own", "shared", "detached"))
    check_choice("gan_real", cfg.gan_real, ("data", "teacher", "more"))
    check_choice("ode_target", cfg.ode_target, ("end", "consistency"))
    check_choice("ode_context", cfg.ode_context, ("real", "clean", "noisy"))
    require(Path(cfg.tag).name == cfg.tag, f"--tag {cfg.tag} becomes part of a folder's name: use "
            "letters, digits and dashes")
    require(cfg.data != str(Path(cfg.out).resolve()), f"--out {cfg.out} is the folder of the "
            "clips: choose another")
    require(cfg.samples or not cfg.preview_every, "--samples 0 leaves --preview-every nothing to "
            "draw: leave one of them out")
    check_tracker(cfg.log)
    check_network(cfg)
    check_training(cfg)
    check_relatives(cfg)
    check_device(cfg.device)
    check_choice("compile", cfg.compile or "none", ("all", "clips", "none"))
    if cfg.compile in ("all", "clips"):
        check_compiler(cfg.device)
