"""Sampling: the teacher's ODE, the student's causal rollout, and the command that makes a video.

    python sample.py                                   four futures of one image, side by side
    python sample.py --image assets/example.png --prompt "cyan disc moving left" --out video.mp4
    python sample.py --from-data --frames 1000         stream at constant memory

rollout() is the one function that generates videos chunk by chunk. Training (stages 2 and 3) and
serving both call it, which closes the gap between training and use (Self Forcing, 2506.08009).
"""
import functools
import math
import time
from dataclasses import fields

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from losses import add_noise, guide, make_timesteps, schedule, solver_step, x0_from_flow
from model import Config, KVCache, build
from utils.errors import catch_signals, friendly_errors
from utils.media import side_by_side, video_writer
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
    """Solve the teacher's ODE from noise to a clean clip that begins with `first` (b, k, c, h, w).

    times: of its passes. Returns the clip, and its states before the steps in `keep` (0-based)."""
    k, kept, before = first.shape[1], [], None
    x = torch.cat([first, noise[:, k:]], 1)
    for i, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0])):
        if i in keep:
            kept.append(x)
        x0 = (x - t * velocity(x, make_timesteps(t, x, k)))[:, k:]
        x = torch.cat([first, solver_step(x[:, k:], x0, t, t_next, before).to(x.dtype)], 1)
        before = x0, t
    return x, kept


# ---------------------------------------------------------------- the student
def per_chunk(x):
    """The values of the chunks, as a list. A list of floats is one value: a chunk's times."""
    several = isinstance(x, (list, tuple)) and not any(isinstance(y, float) for y in x)
    return list(x) if several else [x]


def times_of(passes, shift):
    """Times of a chunk's passes: from their number, an int; or as they are, floats."""
    if isinstance(passes, int):
        return schedule(passes, shift)
    assert all(isinstance(t, float) for t in passes), f"{passes}: numbers of passes, or times"
    return list(passes)


def context_pass(model, cache, x, text, level, randn, grad):
    """Put a finished chunk into the cache: one pass over it at `level` (0 in the paper), whose keys
    and values stay. The chunk is detached: no gradient reaches it through later chunks."""
    x, t = x.detach(), make_timesteps(level, x, 0)
    if level > 0:
        x = add_noise(x, randn(x.shape[1]), t)
    with torch.set_grad_enabled(grad):
        model(x, t, text, cache=cache)
    cache.commit()


def denoise(network, x, times, randn, grad):
    """A chunk (b, chunk, c, h, w) from noise x: a pass at each time, a gradient in the last."""
    for i, t in enumerate(times):
        t, final = make_timesteps(t, x, 0), i == len(times) - 1
        with torch.set_grad_enabled(grad and final):
            x0 = x0_from_flow(x, network(x, t), t)
        if not final:
            x = add_noise(x0, randn(x.shape[1]), make_timesteps(times[i + 1], x, 0))
    return x0


def rollout(model, first, text, randn, frames, steps=1, exit_step=None, grad=False,
            context_level=0.0, cache_grad=False, grad_chunks=0, ode=False):
    """Generate a video chunk by chunk: yields the image `first`, then chunks (b, chunk, c, h, w).

    model          causal student; model.cfg has chunk, sink, window and shift (paper eq. 1)
    first          (b, k, c, h, w) conditioning image, a chunk of its own; k = 0 for none
    randn          callable (number of frames) -> noise (b, number, c, h, w)
    frames         stop at this many, the image included; the last chunk is whole. None: endless
    text           (b, l, d), or a callable (first frame of a chunk) -> that chunk's text
    steps          passes per chunk, or their times; a list of these: one per chunk, then the last
    exit_step      end a chunk after this pass (0-based), not after its last; a list like `steps`
    grad           the pass that ends a chunk carries a gradient; the others never do
    grad_chunks    ... in the last so many chunks alone (One-Forcing); 0: in all
    context_level  noise level of image and finished chunks in the cache (Diagonal Forcing: 0.1);
                   below 0: chunks have no context pass, their last pass stays in the cache
    cache_grad     gradients also reach the weights through the context passes, which trains what
                   a chunk leaves for later chunks (Self Gradient Forcing, 2607.20368)
    ode            between passes follow the flow instead of adding new noise
    """
    cfg = model.cfg
    cache = KVCache(cfg.sink, cfg.window, not cfg.absolute_positions, not cache_grad)
    passes, exits = per_chunk(steps), per_chunk(exit_step)
    text_at = text if callable(text) else lambda frame: text
    done, finished = first.shape[1], None  # frames so far, and the chunk that the cache lacks
    if done:
        yield first
        finished = first
    words = text_at(0)
    while frames is None or done < frames:
        carries = grad and not (grad_chunks and frames - done > grad_chunks * cfg.chunk)
        # the image is given, so that no pass has left it in the cache
        if finished is first or (finished is not None and context_level >= 0):
            level = max(0.0, context_level)
            context_pass(model, cache, finished, words, level, randn, carries and cache_grad)
        elif finished is not None:
            cache.commit()
        words = text_at(done)  # after the context pass, which keeps the finished chunk's own text
        times = times_of(passes[0], cfg.shift)
        if exits[0] is not None:
            times = times[:exits[0] + 1]
        passes, exits = passes[1:] or passes, exits[1:] or exits  # the last serves all that follow
        network, noise = functools.partial(model, text=words, cache=cache), randn(cfg.chunk)
        finished = (sample_ode(network, noise, noise[:, :0], times)[0] if ode else
                    denoise(network, noise, times, randn, carries))
        done += cfg.chunk
        yield finished


@torch.no_grad()
def generate_chunks(net, settings, first, text, randn, frames, steps=None, negative=None):
    """A stage's clip, chunk by chunk; a bidirectional teacher's comes at once, guided away from the
    embedded `negative` prompt (l, d). A causal teacher follows its ODE in each chunk, unguided."""
    if settings["stage"] == 0 and settings.get("teacher_forcing") == 1:
        yield from rollout(net, first, text, randn, frames, steps or settings["ode_steps"],
                           ode=True)
    elif settings["stage"] == 0:
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
    weights; `preset` says their shape where it cannot be inferred.

    Raises UsageError if they are missing, or Wan's own, which do not stream."""
    from scale.serve import open_stage, refuse_teacher
    weights, codec, settings = open_stage(folder, preset)
    if "where" not in settings:
        refuse_teacher(weights)
    return load_network(weights, settings, device, dtype), codec, settings


# ---------------------------------------------------------------- the command
@torch.no_grad()
def main(argv=None):
    """Write one clip to one file."""
    from scale import serve  # the plumbing
    args = serve.arguments(argv, __doc__)
    weights, codec, settings, where = serve.chosen_stage(args)
    # the text encoder has left memory before the network comes
    codec, first, text, caption, negative = serve.inputs(args, codec, settings, where)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    net = load_network(weights, settings, args.device, dtype)
    randn = serve.seeded_noise(first, args.seed)
    frames = args.frames or 1 + codec.ratio * (settings["frames"] - 1)
    latents = 1 + math.ceil((frames - 1) / codec.ratio)
    fps, zoom = (8, max(1, 256 // settings["size"])) if codec.ratio == 1 else (16, 1)
    chunks = generate_chunks(net, settings, first, text, randn, latents, serve.steps_of(args),
                             negative)
    decode = codec.decoder()
    precision = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    began, marks, written = time.perf_counter(), [], 0
    with precision, video_writer(args.out, args.fps or fps, args.zoom or zoom) as write:
        with catch_signals() as received:
            for chunk in tqdm(chunks, unit="chunk"):
                pixels = side_by_side(decode(chunk))[:frames - written]
                serve.check_frames(chunk, pixels, where)
                drawn = synced_time(first.device)
                write(pixels)
                written += len(pixels)
                marks.append((time.perf_counter() - began, time.perf_counter() - drawn, written))
                if received:  # Ctrl-C, SIGTERM: keep what has been written of a long stream
                    break
    print(f"{args.out}: {written} frames of {serve.what(args, caption, where)}; "
          f"{serve.rates(marks, first.shape[1] > 0)}")


if __name__ == "__main__":
    with friendly_errors():
        main()
