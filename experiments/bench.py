"""How fast, and with how much memory: streaming, a training step against its plan, loading a
checkpoint. The same on CPU and GPU.

    python experiments/bench.py stream --preset wan-1.3b --rounds 3      480 x 832, chunk by chunk
    python experiments/bench.py step --preset wan-1.3b --activation-checkpointing \\
                                --micro-batch 1 --batch-size 1
    python experiments/bench.py load --preset wan-1.3b --processes 1 2   memory while it is read

Weights are random: speed and memory do not depend on them. The video VAE is not part of any of it.
"""

import argparse
import gc
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import train
from experiments.flops import Flops, matrix_rate
from experiments.plan import Rehearsal, plan
from model import PRESETS, Config, build
from sample import rollout
from scale.parallel import local_shard, processes, shard, world
from utils.errors import UsageError, check_device, friendly_errors, require
from utils.files import save_tensors
from utils.settings import Parser, cuda_or_cpu, synced_time
from utils.weights import load_into, open_weights

PAPER = {
    ("wan-1.3b", 1): 43.37,
    ("wan-1.3b", 4): 17.70,
    ("wan-14b", 1): 14.33,
    ("wan-14b", 4): 5.71,
}  # frames/s, one H100, VAE included


def header(device):
    """Device and versions, a line."""
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    rate, python = matrix_rate(device) / 1e12, platform.python_version()
    versions = f"torch {torch.__version__}; Python {python}"
    return f"{name}; {versions}; bfloat16 products {rate:.3g} TFLOP/s"


# ---------------------------------------------------------------- streaming


def clocks(device):
    """(seconds on the wall, seconds of all CPU cores in this process), once the device is done."""
    return synced_time(device), time.process_time()


def timed_chunks(parts, device, chunks, seconds):
    """(chunks, seconds on the wall, CPU seconds) of at least this many chunks, and as many more as
    both clocks take to show `seconds`: a busy host stretches the first, a sleeping process hardly
    moves the second. On a GPU the CPU only hands out work, so the wall alone counts."""
    (wall, cpu), number = clocks(device), 0
    while True:
        next(parts)
        number += 1
        now, spent = clocks(device)
        least = now - wall if device.type == "cuda" else min(now - wall, spent - cpu)
        if number >= chunks and least >= seconds:
            return number, now - wall, spent - cpu


@torch.no_grad()
def stream(net, size, steps, reuse, chunks, seconds):
    """(seconds to the first chunk, frames a second on the wall, frames a CPU second, FLOP/s of the
    last chunk) of the network alone.

    Frames are those of the video: a latent frame of Wan's is four. Rates are of the chunks after
    the window is full, see timed_chunks(). With `reuse`, a finished chunk enters the cache as the
    last pass left it, which saves its context pass."""
    cfg, device, dtype = net.cfg, net.head.modulation.device, net.head.modulation.dtype
    generator = torch.Generator(device).manual_seed(0)
    options = dict(generator=generator, device=device)

    def randn(f):  # latents are float32, as in sample.py
        return torch.randn(1, f, cfg.in_dim, *size, **options)

    text = torch.randn(1, cfg.text_len, cfg.text_dim, **options)
    level = -1.0 if reuse else 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(2):  # the first stream warms the kernels up
            began = synced_time(device)
            parts = rollout(net, randn(cfg.first), text, randn, None, steps, context_level=level)
            next(parts)  # the image
            next(parts)
            first = synced_time(device) - began
        for _ in range(math.ceil(cfg.window / cfg.chunk)):  # until the window is full
            next(parts)
        number, wall, cpu = timed_chunks(parts, device, chunks, seconds)
        work = Flops()
        with work:
            next(parts)
    frames = number * cfg.chunk * (4 if cfg.in_dim == 16 else 1)
    return first, frames / wall, frames / cpu, work.flops * number / wall


def unset(cfg):
    """A network without memory."""
    with torch.device("meta"):
        return build(cfg)


def stream_size(args, preset):
    """Height and width of a latent frame to stream."""
    if args.latent_size:
        return tuple(args.latent_size)
    return (8, 8) if preset == "toy" else (60, 104)


def ratio_in_words(wall, cpu, gpu):
    """Ratios of frames a second, one a round, by both clocks; the one to quote comes first."""
    words = [f"{statistics.median(ratio):.2f} times the frames by {clock} ({min(ratio):.2f} to "
             f"{max(ratio):.2f} in {len(ratio)} rounds)"
             for clock, ratio in (("CPU time", cpu), ("the wall", wall))]
    quoted, other = words[::-1] if gpu else words
    return f"{quoted}, which is the one to quote; {other}"


def bench_stream(args, device):
    """The table of streaming speeds: medians of rounds in which the streams take turns, so that a
    busy moment of the machine hits all. The ratio below it is that of CPU seconds on a CPU, which
    other programs do not change much, and that of the wall on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak, ratios = matrix_rate(device, dtype), []
    kinds = [(steps, reuse) for steps in args.steps for reuse in (False, True)]
    print("| preset | latent | passes | context pass | s to first chunk | frames/s | "
          "frames/CPU s | of matrix rate | paper, one H100 with VAE |\n|" + "---|" * 9)
    for preset in args.preset:
        net = unset(Config(**PRESETS[preset])).to(dtype).to_empty(device=device)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02)
        size = stream_size(args, preset)
        rounds = [[stream(net, size, *kind, args.chunks, args.seconds) for kind in kinds]
                  for _ in range(args.rounds)]
        for (steps, reuse), streams in zip(kinds, zip(*rounds)):
            first, wall, cpu, flops = map(statistics.median, zip(*streams))
            print(f"| {preset} | {size[0]} x {size[1]} | {steps} | {'reused' if reuse else 'yes'} |"
                  f" {first:.3f} | {wall:.2f} | {cpu:.2f} | {flops / peak:.0%} | "
                  f"{PAPER.get((preset, steps), '')} |", flush=True)
        few, many = min(args.steps), max(args.steps)
        one, two = (kinds.index((steps, False)) for steps in (few, many))
        wall, cpu = ([streams[one][i] / streams[two][i] for streams in rounds] for i in (1, 2))
        ratios.append(f"{preset}, with the context pass: {few} against {many} passes "
                      + ratio_in_words(wall, cpu, device.type == "cuda"))
        del net
    print("\n" + "\n".join(ratios))


# ---------------------------------------------------------------- a training step


def measured_step(cfg):
    """(seconds, peak bytes) of a training step with random weights; on a CPU the peak is that of
    PyTorch's allocations on top of weights and optimizer states, on a GPU the whole."""
    gc.collect()  # checkpointed blocks are cycles, and would still be there
    run = Rehearsal(replace(cfg, student_start=0, probe_every=0))
    train.STEPS[cfg.stage](run)  # the first warms the kernels up
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        began = synced_time(run.device)
        train.STEPS[cfg.stage](run)
        return synced_time(run.device) - began, torch.cuda.max_memory_allocated()
    began = synced_time(run.device)
    train.STEPS[cfg.stage](run)
    seconds = synced_time(run.device) - began
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        train.STEPS[cfg.stage](run)
    alive = peak = 0
    for event in sorted(
        (e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        alive += event.nbytes()
        peak = max(peak, alive)
    return seconds, peak


def bench_step(args, device, rest):
    """A table of training steps: seconds, and the peak against what plan.py said."""
    given = train.parse(rest)
    given = {
        **given,
        "device": device.type,
        **({"latent_size": tuple(args.latent_size)} if args.latent_size else {}),
    }
    print(
        "| preset | stage | clips | s a step | peak GB | planned GB | planned / peak |\n|"
        + "---|" * 7
    )
    for preset in args.preset:
        for stage in args.stages:
            cfg = train.make_config({**given, "preset": preset}, stage)
            seconds, peak = measured_step(cfg)
            costs = plan(cfg, 1)
            planned = costs["total"] if device.type == "cuda" else costs["activations"]
            print(
                f"| {preset} | {stage} | {cfg.batch_size} | {seconds:.2f} | {peak / 1e9:.3f} | "
                f"{planned / 1e9:.3f} | {planned / peak:.3f} |",
                flush=True,
            )


# ---------------------------------------------------------------- loading


def anonymous():
    """Bytes of this process that are its own. Pages of a mapped file are not: the system takes them
    back when it likes."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise UsageError("bench.py load reads /proc/self/status, which only Linux has")


def load_here(preset, path):
    """Load `path` into a sharded network; prints this process's share and the most it held at once
    beyond the start, in bytes."""
    cfg, most, done = Config(**PRESETS[preset]), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    with processes("cpu"):
        net = shard(unset(cfg))
        before = anonymous()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        load_into(net.to_empty(device="cpu"), open_weights(path), path, local_shard)
        done.set()
        watcher.join()
        share = sum(local_shard(p)[0].numel() * 4 for p in net.parameters())
        sys.stdout.write(
            f"rank {world()[0]}: {share} {max(most[0], anonymous()) - before}\n"
        )  # line and end at once: the others write too
        sys.stdout.flush()
        del net


def load_in_processes(preset, folder, number):
    """load_here() in `number` processes: (share, peak) of the one with the largest quotient."""
    command = [__file__, "load-here", "--preset", preset, "--path", folder]
    if number > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc_per_node", str(number), *command]
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if out.returncode:
        why = [f"exit status {out.returncode}, was it short of memory?"]
        why += [line for line in out.stderr.splitlines() if "rror" in line]
        raise UsageError(f"loading failed: {why[-1]}")
    lines = [line for line in out.stdout.splitlines() if line.startswith("rank")]
    rows = [tuple(map(int, line.split(": ")[1].split())) for line in lines]
    return max(rows, key=lambda row: row[1] / row[0])


def bench_load(args):
    """Host memory while the weights of a fabricated checkpoint are read, sharded over some
    processes."""
    print(
        "| preset | processes | share GB | peak GB | peak / share | largest tensor GB |\n|"
        + "---|" * 6
    )
    for preset in args.preset:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            shapes = {
                name: p.shape for name, p in unset(Config(**PRESETS[preset])).named_parameters()
            }
            save_tensors(
                Path(folder) / "model.safetensors",
                {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
            )
            for number in args.processes:
                share, peak = load_in_processes(preset, folder, number)
                print(
                    f"| {preset} | {number} | {share / 1e9:.3f} | {peak / 1e9:.3f} | "
                    f"{peak / share:.2f} | "
                    f"{max(s.numel() for s in shapes.values()) * 4 / 1e9:.3f} |",
                    flush=True,
                )


def flags():
    """The parser of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["stream", "step", "load", "load-here"])
    parser.add_argument("--preset", nargs="+", default=["toy"], help="shapes to measure")
    parser.add_argument("--device", default=cuda_or_cpu(), help="cuda or cpu")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 4], help="stream: passes per chunk"
    )
    parser.add_argument("--chunks", type=int, default=4, help="stream: chunks of a measurement, at "
                        "least")
    parser.add_argument("--seconds", type=float, default=0.5, help="stream: seconds of a "
                        "measurement, at least, on the wall and of CPU time")
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="stream: measurements of each, of which the medians are printed",
    )
    parser.add_argument(
        "--latent-size",
        type=int,
        nargs=2,
        help="stream and step: height and width of a latent frame; default: 60 104",
    )
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        default=[2, 3],
        help="step: stages to measure; further flags are train.py's",
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="load: numbers of processes"
    )
    parser.add_argument(
        "--scratch", help="load: folder for the fabricated checkpoint; default: the system's"
    )
    parser.add_argument("--path", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """One bench, its table."""
    args, rest = flags().parse_known_args(argv)
    require(
        min(args.chunks, args.rounds, *args.steps) >= 1 and args.seconds >= 0,
        "--chunks, --steps and --rounds must be at least 1, --seconds at least 0",
    )
    for preset in args.preset:
        require(
            preset in PRESETS, f"--preset {preset} is unknown: choose from {', '.join(PRESETS)}"
        )
    require(
        not rest or args.what == "step",
        f"{' '.join(rest)}: unknown; bench.py --help lists every flag",
    )
    if args.what == "load-here":
        return load_here(args.preset[0], args.path)
    check_device(args.device)
    device = torch.device(args.device)
    print(header(device) + "\n")
    if args.what == "stream":
        bench_stream(args, device)
    elif args.what == "step":
        bench_step(args, device, rest)
    else:
        bench_load(args)


if __name__ == "__main__":
    with friendly_errors():
        main()
