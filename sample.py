"""Sampling: the teacher's ODE, the student's causal rollout, and the command that makes a video.

    python sample.py --from-data                       animate a held-out toy image
    python sample.py --image assets/example.png --prompt "cyan disc moving left" --out video.mp4
    python sample.py --from-data --frames 1000         stream at constant memory

rollout() is the one function that generates videos chunk by chunk. Training (stages 2 and 3) and
serving both call it, which closes the gap between training and use (Self Forcing, 2506.08009).
"""
import math
import signal
import time
from dataclasses import fields

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from losses import add_noise, guide, make_timesteps, schedule, x0_from_flow
from model import Config, KVCache, build
from scale.serve import arguments, chosen_stage, open_stage, rates, toy_inputs, wan_inputs
from utils.errors import catch_signals, friendly_errors
from utils.media import video_writer
from utils.settings import synced_time
from utils.weights import load_into


# ---------------------------------------------------------------- the teacher
def with_cfg(model, text, scale, negative=None):
    """The model's flow under classifier-free guidance: callable (x_t, t) -> flow.

    text (b, l, d); negative (l, d): embedded negative prompt; default: no text, all zeros."""
    def velocity(x, t):
        if scale == 1:
            return model(x, t, text)
        away = torch.zeros_like(text)
        if negative is not None:
            away = negative.to(text).expand(len(text), -1, -1)
        both = pad_sequence([*text, *away], batch_first=True)
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(cond, uncond, scale)

    return velocity


@torch.no_grad()
def sample_ode(velocity, noise, first, times, keep=()):
    """Euler's method from noise to a clean clip; the k >= 0 frames of `first` (b, k, c, h, w) stay.

    times: from schedule(). Returns the clip (b, f, c, h, w) and the states before the steps in
    `keep`."""
    k, kept = first.shape[1], []
    x = torch.cat([first, noise[:, k:]], 1)
    for i, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0])):
        if i in keep:
            kept.append(x)
        v = velocity(x, make_timesteps(t, x, k))
        x = torch.cat([first, x[:, k:] + (t_next - t) * v[:, k:].to(x.dtype)], 1)
    return x, kept


# ---------------------------------------------------------------- the student
def times_of(steps, shift):
    """Times of a chunk's passes, from their number or as they are."""
    return list(steps) if isinstance(steps, tuple) else schedule(steps, shift)


def context_pass(model, cache, x, text, level, randn, grad):
    """Put a finished chunk into the cache: one pass over it at `level` (0 in the paper), whose keys
    and values stay. The chunk is detached: no gradient reaches it through later chunks."""
    x, t = x.detach(), make_timesteps(level, x, 0)
    if level > 0:
        x = add_noise(x, randn(x.shape[1]), t)
    with torch.set_grad_enabled(grad):
        model(x, t, text, cache=cache)
    cache.commit()


def rollout(model, first, text, randn, frames, steps=1, exit_step=None, grad=False,
            context_level=0.0, cache_grad=False, start=None):
    """Generate a video chunk by chunk: yields the image `first`, then chunks (b, chunk, c, h, w).

    model          causal student; model.cfg has chunk, sink, window and shift (paper eq. 1)
    first          (b, k, c, h, w) conditioning image, a chunk of its own; k = 0 for none
    randn          callable (number of frames) -> noise (b, number, c, h, w)
    frames         stop at this many, the image included; the last chunk is whole. None: endless
    steps          passes per chunk, or a tuple of their times; a list: one per chunk, the last for
                   all that follow
    exit_step      leave after this pass (0-based), not the last (Self Forcing draws it at random)
    grad           the exit pass of every chunk carries a gradient
    context_level  noise level of image and finished chunks in the cache (Diagonal Forcing: 0.1);
                   below 0: the cache keeps what the last pass left, and there is no context pass
    cache_grad     gradients also reach the weights through the context passes, which trains what
                   a chunk leaves for later chunks (Self Gradient Forcing, 2607.20368)
    start          (b, f, c, h, w) noise for the first pass of every chunk, in place of randn's
    """
    cfg = model.cfg
    cache = KVCache(cfg.sink, cfg.window, not cfg.absolute_positions, not cache_grad)
    plan = list(steps) if isinstance(steps, list) else [steps]
    done, finished = first.shape[1], None
    if done:
        yield first
        finished = first
    while frames is None or done < frames:
        if finished is first or finished is not None and context_level >= 0:
            level = max(0.0, context_level)
            context_pass(model, cache, finished, text, level, randn, grad and cache_grad)
        elif finished is not None:
            cache.commit()
        times = times_of(plan.pop(0) if len(plan) > 1 else plan[0], cfg.shift)
        last = len(times) - 1 if exit_step is None else min(exit_step, len(times) - 1)
        x = randn(cfg.chunk) if start is None else start[:, done:done + cfg.chunk]
        for i, t in enumerate(times[:last + 1]):
            t = make_timesteps(t, x, 0)
            with torch.set_grad_enabled(grad and i == last):
                x0 = x0_from_flow(x, model(x, t, text, cache=cache), t)
            if i < last:
                x = add_noise(x0, randn(cfg.chunk), make_timesteps(times[i + 1], x, 0))
        done, finished = done + cfg.chunk, x0
        yield x0


@torch.no_grad()
def generate_chunks(net, settings, first, text, randn, frames, steps=None, negative=None):
    """A clip from the network of a stage, chunk by chunk: the teacher's whole ODE in stage 0, away
    from the embedded `negative` prompt (l, d); the causal rollout after it."""
    if settings["stage"] == 0:
        times = times_of(steps or settings["ode_steps"], net.cfg.shift)
        velocity = with_cfg(net, text, settings["guidance"], negative)
        yield sample_ode(velocity, randn(frames), first, times)[0]
    else:
        steps = steps or settings["student_steps"]
        yield from rollout(net, first, text, randn, frames, steps,
                           context_level=settings["context_level"])


def generate(net, settings, first, text, randn, frames, steps=None):
    """generate_chunks() as one clip of `frames` frames."""
    chunks = list(generate_chunks(net, settings, first, text, randn, frames, steps))
    return torch.cat(chunks, 1)[:, :frames]


def load_network(weights, settings, device="cpu", dtype=torch.float32):
    """The network that a stage's settings describe, filled one tensor at a time."""
    cfg = Config(**{field.name: settings[field.name] for field in fields(Config)})
    with torch.device("meta"):
        net = build(cfg)
    return load_into(net.to(dtype).to_empty(device=device), weights, weights.where)


def load_stage(folder, preset=None, device="cpu", dtype=torch.float32):
    """(network, codec or None, settings dict) of a stage's folder, or of a student's official
    weights; `preset` says their shape where it cannot be inferred. UsageError if missing."""
    weights, codec, settings = open_stage(folder, preset)
    return load_network(weights, settings, device, dtype), codec, settings


# ---------------------------------------------------------------- the command
@torch.no_grad()
def main(argv=None):
    """Write one clip to one file."""
    args = arguments(argv, __doc__)
    weights, codec, settings, where = chosen_stage(args)
    if codec is None:  # the text encoder has left memory before the network comes
        codec, first, text, caption, negative = wan_inputs(args, settings, where)
    else:
        codec, first, text, caption, negative = toy_inputs(args, codec, settings, where)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    net = load_network(weights, settings, args.device, dtype)
    first, text = first.to(args.device)[:, :settings["first"]], text.to(args.device)
    noise = torch.Generator().manual_seed(args.seed)
    frames = args.frames or 1 + codec.ratio * (settings["frames"] - 1)
    latents = 1 + math.ceil((frames - 1) / codec.ratio)
    steps = args.steps[0] if args.steps and len(args.steps) == 1 else args.steps
    steps = tuple(args.times) if args.times else steps
    fps, zoom = 16, 1
    if codec.ratio == 1:
        fps, zoom = 8, max(1, 256 // settings["size"])

    def randn(number):
        return torch.randn(1, number, *first.shape[2:], generator=noise).to(args.device)

    chunks = generate_chunks(net, settings, first, text, randn, latents, steps, negative)
    decode = codec.decoder()
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    began, marks, written = time.perf_counter(), [], 0
    with half, video_writer(args.out, args.fps or fps, args.zoom or zoom) as write:
        with catch_signals(signal.SIGINT, signal.SIGTERM) as received:
            for chunk in tqdm(chunks, unit="chunk"):
                pixels = decode(chunk)[0][:frames - written]
                drawn = synced_time(first.device)
                write(pixels)
                written += len(pixels)
                marks.append((time.perf_counter() - began, time.perf_counter() - drawn, written))
                if received:  # Ctrl-C or SIGTERM: keep what has been written of a long stream
                    break
    print(f'{args.out}: {written} frames of "{caption}"; {rates(marks, first.shape[1] > 0)}')


if __name__ == "__main__":
    with friendly_errors():
        main()
