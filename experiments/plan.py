"""What a stage costs before it runs: memory per device and work per step, for every stage of a
preset.

    python experiments/plan.py --preset wan-14b --stage 3 --gpus 64     flags are train.py's
    python experiments/plan.py --preset wan-1.3b --gpus 8
    python experiments/plan.py --table                                  the table of docs/wan.md

Weights, gradients, optimizer states, running average and frozen networks are counted from shapes,
tensor by tensor, and cut as FSDP2 cuts them. Activations are not guessed by a formula: the very
training step of train.py runs on tensors that have a shape and no memory, and the most bytes that
were alive at once are its peak; its FLOPs are counted on the way.
"""

import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from discriminator import has_heads
from experiments.flops import Flops
from model import PRESETS
from scale.parallel import blocks_of, shard
from scale.run import Batch, Run, latent_sides, network_config
from utils.errors import friendly_errors, require
from utils.settings import Parser

DEPTHS = 6, 9  # blocks of the two rehearsals of a deeper network


# ---------------------------------------------------------------- a step on tensors without memory


class Alive(Flops):
    """Bytes of all tensors that operations have made and that are still alive: `now`, and the most
    there were: `peak`. And the `flops` of all matrix products. Numbers that a program reads off a
    tensor without memory are 1."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = weakref.WeakKeyDictionary()  # storage -> its bytes, 0 once it is left out

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = function is torch.ops.aten._local_scalar_dense.default
        if read and isinstance(args[0], FakeTensor):
            return 1 if not args[0].dtype.is_floating_point else 1.0
        out = super().__torch_dispatch__(function, types, args, kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.watch(x.untyped_storage())
        return out

    def watch(self, storage):
        if storage in self.storages:
            return
        count = [storage.nbytes()]
        self.storages[storage] = count
        self.now += count[0]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, count)

    def forget(self, count):
        self.now -= count[0]
        count[0] = 0

    def leave_out(self, x):
        """A tensor that is counted elsewhere."""
        count = self.storages.get(x.untyped_storage())
        if count:
            self.forget(count)


class Rehearsal(Run):
    """A stage at work on clips of noise, with weights of any kind: what a step costs does not
    depend on them."""

    def __init__(self, cfg):
        self.cfg, self.new_network, self.device = cfg, train.new_network, torch.device(cfg.device)
        self.nets, self.optimizers, self.bad_steps = {}, {}, {}
        self.step = self.past_steps = self.tokens = self.rank = 0
        self.world, self.clips_per_rank = 1, cfg.batch_size
        self.is_main, self.negative = False, None
        for name, (_, groups) in train.networks(cfg).items():
            self.add_network(name, self.build_sharded(name, bool(groups)), groups)

    def build_sharded(self, name, trained):
        module = super().build_sharded(name, trained)
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.02)
        return module

    def batch(self, clips, purpose):
        cfg, draws = self.cfg, self.draws(clips, purpose)
        x0 = draws.randn(cfg.frames, cfg.in_dim, *latent_sides(cfg))
        self.tokens = x0[0, :, 0].numel() // cfg.patch**2
        return Batch(clips, x0, draws.randn(cfg.text_len, cfg.text_dim), draws)

    def trajectory(self, draws):
        cfg = self.cfg
        x0 = draws.randn(cfg.frames, cfg.in_dim, *latent_sides(cfg))
        states = x0[:, None].expand(-1, cfg.ode_points + 1, -1, -1, -1, -1)
        text = draws.randn(cfg.text_len, cfg.text_dim)
        return states, text, None if cfg.ode_context == "noisy" else x0


class Imagined(Rehearsal):
    """The same with networks that have shapes and no memory."""

    def __init__(self, cfg, gpus):
        half = cfg.dtype == "bfloat16" and gpus > 1  # as FSDP's policy gathers the weights
        self.weights_in = torch.bfloat16 if half else torch.float32
        self.shapes, self.alive = FakeTensorMode(allow_non_fake_inputs=True), Alive()
        super().__init__(replace(cfg, device="cpu"))

    def build_sharded(self, name, trained):
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.weights_in)
        try:
            with self.shapes:
                module = train.new_network(network_config(self.cfg, name), name)
        finally:
            torch.set_default_dtype(before)
        return shard(module, self.cfg.activation_checkpointing and trained)

    def add_network(self, name, module, groups=()):
        super().add_network(name, module, groups)
        kept = [x for optimizer in self.optimizers[name] for state in optimizer.state.values()
                for x in state.values()]
        # these and the gradients are counted from shapes, below
        for x in (*module.parameters(), *kept):
            self.alive.storages[x.untyped_storage()] = [0]
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.alive.leave_out(p.grad))


REHEARSED = {}  # what rehearse() remembers


def rehearse(cfg, gpus):
    """(bytes of activations at the peak, FLOPs, tokens of a clip) of one pass of a training step
    with all terms; remembered.

    Blocks are all alike, so a deep network is rehearsed at two small depths and the difference
    continued."""
    cfg = replace(cfg, batch_size=cfg.micro_batch or cfg.batch_size, offload=False)
    key = repr((cfg, gpus > 1))
    if key not in REHEARSED and cfg.num_layers <= DEPTHS[1]:
        REHEARSED[key] = rehearsed(cfg, gpus)
    elif key not in REHEARSED:
        taps = len(cfg.disc_layers)
        small = [replace(cfg, num_layers=n, disc_layers=tuple(range(n - taps, n))) for n in DEPTHS]
        one, two = (rehearsed(shallow, gpus) for shallow in small)
        more = (cfg.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        REHEARSED[key] = *(round(a + more * (b - a)) for a, b in zip(one[:2], two[:2])), one[2]
    return REHEARSED[key]


def rehearsed(cfg, gpus):
    """rehearse() at the depth that the network has."""
    once = replace(cfg, batch_size=cfg.micro_batch or cfg.batch_size, student_start=0,
                   fake_updates=1, disc_updates=1, probe_every=0)
    run = Imagined(once, gpus)
    with run.alive:
        train.STEPS[cfg.stage](run)
        peak, flops = run.alive.peak, run.alive.flops
        updates_of = [("fake", train.fake_score_step, cfg.fake_updates),
                      ("disc", train.disc_step, cfg.disc_updates)]
        if has_heads(cfg, "fake"):
            updates_of = [("fake", train.disc_step, cfg.disc_updates)]
        for name, step, updates in updates_of:
            if name in run.nets and updates > 1:  # the others cost what one costs
                before, batch = run.alive.flops, next(run.batches(name))
                step(run, [(batch, batch.x0)], 0, 0)
                flops += (updates - 1) * (run.alive.flops - before)
    return peak, flops, run.tokens


# ---------------------------------------------------------------- what is counted from shapes


def rows_of_one(shape, gpus):
    """Elements of a parameter that the first process holds: FSDP2 cuts rows as torch.chunk does."""
    count = 1
    for n in shape[1:]:
        count *= n
    return -(-shape[0] // gpus) * count if shape else 1


def static_bytes(cfg, gpus):
    """{what: bytes} on one of `gpus` devices: all weights are cut into `gpus` parts, and what is
    made of them with them."""
    bytes_of = dict.fromkeys("weights gradients optimizer average frozen gathered host".split(), 0)
    half, blocks, rest, gradients = cfg.dtype == "bfloat16", 0, 0, {}
    for name, (_, groups) in train.networks(cfg).items():
        with torch.device("meta"):
            module = train.new_network(network_config(cfg, name), name)
        several = [(prefix,) if isinstance(prefix, str) else prefix for prefix, _ in groups]
        prefixes = tuple(prefix for part in several for prefix in part)
        for key, p in module.named_parameters():
            n = rows_of_one(p.shape, gpus)
            if name == "ema":
                bytes_of["average"] += 4 * n
            elif not groups:
                bytes_of["frozen"] += (2 if half and cfg.device == "cuda" else 4) * n
            elif key.startswith(prefixes):
                muon = name == "student" and cfg.muon_lr and "blocks." in key and p.ndim == 2
                bytes_of["weights"] += 4 * n
                gradients[name] = gradients.get(name, 0) + 4 * n
                bytes_of["optimizer"] += (4 if muon else 8) * n
            else:
                bytes_of["frozen"] += 4 * n
        if gpus > 1:
            block = sum(p.numel() for p in blocks_of(module)[0].parameters())
            whole = sum(p.numel() for p in module.parameters())
            rest += 4 * (whole - block * len(blocks_of(module)))
            blocks = max(blocks, (2 if half else 4) * 2 * block + (2 * 4 * block if groups else 0))
        if cfg.offload and cfg.stage > 1 and not groups:  # on the device: the block that runs, and
            key = "average" if name == "ema" else "frozen"  # what is in no block
            each = 2 if half and cfg.device == "cuda" and name != "ema" else 4
            sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(module)]
            outside = sum(p.numel() for p in module.parameters()) - sum(sizes)
            bytes_of["host"] += bytes_of[key]
            bytes_of[key] = each * (sizes[0] + outside) if gpus == 1 else 0
    # networks are updated one after the other, and an update lets go of its gradients
    bytes_of["gradients"] = max(gradients.values())
    # whole while it runs: a block, the next one on its way, their gradients; whole all the time:
    # what is in no block
    return {**bytes_of, "gathered": blocks + rest}


def cache_bytes(cfg, tokens):
    """Keys and values of a full stream, for one micro-batch: (sink + window + chunk) frames in
    every block."""
    frames = min(cfg.frames, cfg.sink + cfg.window + cfg.chunk)
    each = 2 if cfg.dtype == "bfloat16" else 4
    clips = cfg.micro_batch or cfg.batch_size
    numbers = 2 * cfg.num_layers * frames * tokens // cfg.frames * cfg.dim
    return numbers * each * clips // cfg.context_parallel


def micro_batch(cfg, gpus):
    """(clips of a pass, clips of a step) on one device; UsageError where the batch does not
    divide."""
    groups = gpus // cfg.context_parallel
    require(cfg.batch_size % groups == 0, f"--batch-size {cfg.batch_size} does not divide over "
            f"{groups} devices or groups of them")
    share = cfg.batch_size // groups
    return min(cfg.micro_batch or share, share), share


def plan(cfg, gpus):
    """{what: bytes per device}, with `flops` of a step over all devices and `passes` of a device.
    With --context-parallel the activations are those of one device over the number that shares a
    clip: a lower bound, since text, time and a discriminator's heads do not get smaller."""
    micro, share = micro_batch(cfg, gpus)
    cfg = replace(cfg, micro_batch=micro)
    peak, flops, tokens = rehearse(cfg, gpus)
    passes = -(-share // cfg.micro_batch)
    clip = cfg.frames * cfg.in_dim * math.prod(latent_sides(cfg))
    held = 0
    if cfg.stage > 1:  # for fake score and discriminator
        held = (passes - 1) * cfg.micro_batch * 4 * (2 * clip + cfg.text_len * cfg.text_dim)
    costs = {**static_bytes(cfg, gpus), "activations": peak // cfg.context_parallel}
    costs["host" if cfg.offload else "activations"] += held
    return {
        **costs,
        "total": sum(costs.values()) - costs["host"],
        "cache": cache_bytes(cfg, tokens) if cfg.stage > 1 else 0,
        "flops": flops * cfg.batch_size // cfg.micro_batch,
        "passes": passes,
        "micro": cfg.micro_batch,
    }


def trajectories(cfg):
    """What stage 1 does before its first step, in words: teacher passes and bytes on the disk."""
    passes = cfg.trajectories * cfg.ode_steps * (1 if cfg.guidance == 1 else 2)
    clip = cfg.frames * cfg.in_dim * math.prod(latent_sides(cfg))
    size = 4e-9 * cfg.trajectories * (clip * (cfg.ode_points + 1) + cfg.text_len * cfg.text_dim)
    return (f"{cfg.trajectories:,} trajectories of {cfg.ode_steps} steps, {passes:,} passes of the "
            f"teacher, {size:,.2f} GB on disk")


# ---------------------------------------------------------------- the command

COLUMNS = "weights gradients optimizer average frozen gathered activations total cache".split()


def row(cfg, gpus):
    """One line of the table."""
    costs = plan(cfg, gpus)
    digits = 3 if cfg.preset == "toy" else 1
    sizes = [f"{costs[name] / 1e9:.{digits}f}" for name in COLUMNS]
    clips, work = f"{costs['micro']} x {costs['passes']}", f"{costs['flops'] / 1e15:.3g}"
    return f"| {cfg.preset} | {cfg.stage} | {gpus} | {clips} | {' | '.join(sizes)} | {work} |"


def table(rows):
    """Markdown, header included."""
    names = ["preset", "stage", "GPUs", "clips x passes", *COLUMNS[:-1], "of which KV",
             "PFLOP a step"]
    return "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *rows])


def main(argv=None):
    """Settings are train.py's, and its flags are taken; what is planned for is a GPU, whatever this
    machine has."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1],
                        help="devices that share the weights")
    parser.add_argument("--table", action="store_true",
                        help="the rows of docs/wan.md: 1.3B on 1 and 8 devices, 14B on 8 and 64")
    args, rest = parser.parse_known_args(argv)
    given = train.parse(rest)
    require(not given.pop("control", False), "--control trains; a plan does not take it")
    share = given.get("context_parallel", 1)
    fits = min(*args.gpus, share) >= 1 and not any(n % share for n in args.gpus)
    require(fits, f"--gpus {' '.join(map(str, args.gpus))}: at least 1, and a multiple of "
            "--context-parallel")
    chosen = [(given.get("preset", "toy"), n) for n in args.gpus]
    if args.table:
        chosen = [("wan-1.3b", 1), ("wan-1.3b", 8), ("wan-14b", 8), ("wan-14b", 64)]
    require(chosen[0][0] in PRESETS, f"--preset {chosen[0][0]} is unknown: choose from "
            f"{', '.join(PRESETS)}")
    notes, jobs = {}, []
    for preset, gpus in chosen:
        every = (0, 1, 2, 3) if preset == "toy" else (1, 2, 3)
        for stage in every if given.get("stage", -1) < 0 else [given["stage"]]:
            asked = {"dtype": "bfloat16", **given, "preset": preset}
            cfg = train.make_config({**asked, "device": "cpu"}, stage)  # it need not be here
            jobs.append((replace(cfg, device=given.get("device", "cuda")), gpus))
            micro_batch(*jobs[-1])
    print(table([]))
    for cfg, gpus in jobs:
        print(row(cfg, gpus), flush=True)
        if cfg.stage == 1:
            notes[cfg.preset] = trajectories(cfg)
    print("\nGB (1e9 bytes) per device; `gathered` is FSDP's: weights that are whole while their "
          "block runs")
    for preset, note in notes.items():
        print(f"{preset}, stage 1, before the first step: {note}")


if __name__ == "__main__":
    with friendly_errors():
        main()
