"""Sampling: the teacher's ODE, the student's causal rollout, and the command that turns an image and a prompt to video.

    python sample.py --from-data                           animate a held-out toy image with the newest finished stage
    python sample.py --image assets/example.png --prompt "cyan disc moving left" --out video.mp4
    python sample.py --from-data --frames 1000 --steps 1   stream: memory stays constant, frames are written as they come

rollout() is the one function that writes videos chunk by chunk. Training (stages II and III) and serving both use it,
which is what closes the train-test gap (Self Forcing, 2506.08009).
"""
import math
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (FFMPEG, Flags, PatchCodec, WordEncoder, asked_to_stop, check_device, dataset, explain, held_out, read_image, read_json,
                  video_writer)
from losses import add_noise, guide, shift_time, x0_from_flow
from model import PRESETS, Config, KVCache, build, load_into, open_weights, require
from parallel import now
from wan import CaptionEncoder, WanCodec, sides


def schedule(steps, shift):
    """Times of the network passes of a `steps`-step sampler: 1 > ... > 0, the final 0 left out.

    schedule(4, 5) is Wan's 1000, 750, 500, 250 after the shift: 1, .9375, .8333, .625."""
    return [shift_time(1 - i / steps, shift) for i in range(steps)]


def frame_times(level, like, given):
    """(b, f) times for a clip: `level` (number or (b, 1)) everywhere, 0 on the first `given` frames, which are clean."""
    t = torch.zeros(like.shape[:2], device=like.device) + level
    t[:, :given] = 0
    return t


def guided(model, text, scale, negative=None):
    """The teacher's velocity under classifier-free guidance: callable (x_t, t) -> flow.

    text (b, l, d); negative (l, d): the embedded text to keep away from (Wan's negative prompt); default: no text, all zeros."""
    def velocity(x, t):
        if scale == 1:
            return model(x, t, text)
        away = torch.zeros_like(text) if negative is None else negative.to(text).expand(len(text), -1, -1)
        both = pad_sequence([*text, *away], batch_first=True)  # zeros after the shorter ones
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(cond, uncond, scale)
    return velocity


@torch.no_grad()
def sample_ode(velocity, noise, first, times, keep=()):
    """Euler's method from noise to a clean clip; `first` (b, k, c, h, w) given frames stay as they are, k may be 0.

    times: from schedule(). Returns the clip (b, f, c, h, w), and the states at the step numbers in `keep`."""
    k, kept = first.shape[1], []
    x = torch.cat([first, noise[:, k:]], 1)
    for i, (t, s) in enumerate(zip(times, [*times[1:], 0.0])):
        if i in keep:
            kept.append(x)
        v = velocity(x, frame_times(t, x, k))
        x = torch.cat([first, x[:, k:] + (s - t) * v[:, k:].to(x.dtype)], 1)
    return (x, kept) if keep else x


def rollout(model, first, text, randn, frames, steps=1, exit_step=None, grad=False, context_level=0.0, cache_grad=False,
            start=None):
    """Write a video chunk after chunk; yields (b, chunk, c, h, w), the given frames `first` before all others.

    model          causal student; model.cfg says chunk, sink, window and shift (paper eq. 1)
    first          (b, k, c, h, w) conditioning image, a chunk of its own; k = 0 for none
    randn          callable (number of frames) -> noise (b, number, c, h, w)
    frames         stop once so many are written, the given ones included (the last chunk is always whole); None: endless
    steps          network passes a chunk; a list gives every chunk its own, the last entry for all that follow
    exit_step      leave after this pass (0-based) instead of the last (Self Forcing draws it at random)
    grad           let the exit pass of every chunk carry a gradient
    context_level  noise level at which a finished chunk enters the cache (0 in the paper; Diagonal Forcing: 0.1);
                   below 0: the cache is what the last pass left, and the context pass is saved
    cache_grad     let gradients reach the weights through the context passes too: what a chunk leaves in the cache is
                   then trained for the chunks that read it. Never from one chunk's pixels to another's (Self Gradient
                   Forcing, 2607.20368, has the idea)
    start          (b, f, c, h, w) noise that the chunks start from, instead of randn's
    """
    cfg = model.cfg
    cache = KVCache(cfg.sink, cfg.window, detach=not cache_grad)
    context = None  # a finished chunk on its way into the cache, and its times

    def finished(x):
        level = max(0.0, context_level)
        noisy = add_noise(x, randn(x.shape[1]), frame_times(level, x, 0)) if level else x
        return noisy.detach(), frame_times(level, x, 0)

    def flow(x, t):
        nonlocal context
        if context is None:
            return model(x, t, text, cache=cache)
        before, n = context, context[0].shape[1]
        context = None
        if grad and torch.is_grad_enabled() != cache_grad:  # two calls, for only one of the two passes is to carry a gradient; else one does both
            with torch.set_grad_enabled(cache_grad):
                model(*before, text, cache=cache)
                cache.commit()
            return model(x, t, text, cache=cache)
        v = model(torch.cat([before[0], x], 1), torch.cat([before[1], t], 1), text, cache=cache, closing=n)
        cache.commit(n)
        return v

    written, plan = first.shape[1], list(steps) if isinstance(steps, (list, tuple)) else [steps]
    if written:
        yield first
        context = finished(first)
    while frames is None or written < frames:
        times = schedule(plan.pop(0) if len(plan) > 1 else plan[0], cfg.shift)
        last = len(times) - 1 if exit_step is None else min(exit_step, len(times) - 1)
        x = randn(cfg.chunk) if start is None else start[:, written:written + cfg.chunk]
        for i, t in enumerate(times[:last + 1]):
            t = frame_times(t, x, 0)
            with torch.set_grad_enabled(grad and i == last):
                x0 = x0_from_flow(x, flow(x, t), t)
            if i < last:
                x = add_noise(x0, randn(cfg.chunk), frame_times(times[i + 1], x, 0))
        written += x0.shape[1]
        yield x0
        if context_level < 0:
            cache.commit()
        else:
            context = finished(x0)


@torch.no_grad()
def parts(net, settings, first, text, randn, frames, steps=None):
    """A clip (b, f, c, h, w) by the network of a stage, part after part: the teacher's whole ODE for stage 0, else the causal rollout."""
    if settings["stage"] == 0:
        times = schedule(steps or settings["ode_steps"], net.cfg.shift)
        yield sample_ode(guided(net, text, settings["guidance"]), randn(frames), first, times)
    else:
        yield from rollout(net, first, text, randn, frames, steps or settings["student_steps"], context_level=settings["context_level"])


def animate(net, settings, first, text, randn, frames, steps=None):
    """The parts as one clip of `frames` frames."""
    return torch.cat(list(parts(net, settings, first, text, randn, frames, steps)), 1)[:, :frames]


def read_settings(folder):
    """The settings that train.py left in a stage's folder, as a dict; None where `folder` is not a stage's, but a file
    or folder of official weights. UsageError where it is missing or damaged."""
    folder, config, beside = Path(folder), Path(folder) / "config.json", Path(folder).parent / "config.json"
    require(not (folder.is_file() and beside.is_file() and "stage" in read_json(beside)),
            f"{folder} is part of a stage: name its folder, {folder.parent}")
    settings = read_json(config) if config.is_file() else {}
    require(isinstance(settings, dict), f"{config} is damaged: train the stage again")
    if "stage" in settings:
        missing = [field.name for field in fields(Config) if field.name not in settings]
        require(not missing, f"{config} does not say {', '.join(missing)}: train the stage again")
        return {"context_level": 0.0, **settings, "where": str(folder)}  # of runs older than that field
    require(folder.is_file() or any(p.suffix in (".safetensors", ".pt") for p in folder.glob("*")),
            f"{folder} holds no finished stage and no weights: train it first (python train.py --stage N), or name another")
    return None


def load_stage(folder, preset=None, device="cpu", dtype=torch.float32):
    """(network, codec or None, settings as a dict) of what train.py left in a stage's folder, or of a student's official
    weights, to which `preset` gives the shape. UsageError where they are missing. Weights are read one tensor at a time."""
    folder, settings = Path(folder), read_settings(folder)
    path, codec = (folder, None) if settings is None else (folder / "ema.safetensors", PatchCodec.load(folder / "codec.safetensors"))
    if settings is None:
        require(preset in PRESETS, f"{folder} holds weights without settings: say --preset {' or '.join(p for p in PRESETS if p != 'toy')}")
        settings = {**asdict(Config(**PRESETS[preset])), "stage": 2, "student_steps": 4, "context_level": 0.0}
    with torch.device("meta"):
        net = build(Config(**{field.name: settings[field.name] for field in fields(Config)})).to(dtype)
    return load_into(net.to_empty(device=device), open_weights(path), path), codec, settings


# ---------------------------------------------------------------- the command

def newest_stage(root="out"):
    """The stage that was finished last in a folder under out/."""
    done = sorted(Path(root).glob("*/stage*/ema.safetensors"), key=lambda p: p.stat().st_mtime)
    require(done, f"no finished stage under {root}/: run python train.py first, or name one with --weights")
    return done[-1].parent


def inputs(args, codec, settings):
    """What the command line asks for: (codec, first latent frames, embedded text, caption)."""
    where, given = settings.get("where", "this network"), settings["first"]
    require(not args.image or given == 1, f"{where} was trained " + (
        f"to go on from {given} frames (--first), one --image is not enough" if given else
        "without an image (--first 0): leave out --image and give it a --prompt"))
    if codec is None:
        require(args.vae and args.text_encoder and (args.image or args.prompt),
                f"{where} was trained on latents: name --vae, --text-encoder, and --image or --prompt as well")
        codec, words = WanCodec(args.vae, args.device), CaptionEncoder(args.text_encoder, settings["text_len"], args.device)
        size, caption = sides(args.size or "480x832"), args.prompt or ""
        nothing = torch.empty(1, 0, settings["in_dim"], size[0] // 8, size[1] // 8)  # text alone: no chunk is given
        return codec, codec.encode(read_image(args.image, size)) if args.image else nothing, words.encode(caption)[None], caption
    require(not (args.vae or args.text_encoder or args.size), f"{where} brings its own codec and words: leave out --vae, --text-encoder and --size")
    require(given or args.from_data or args.prompt,
            f"{where} was trained without an image: say with --prompt what shall be seen, or take a held-out clip's caption with --from-data")
    require(not given or args.image or args.from_data,
            f"{where} animates an image: name one with --image, or take a held-out clip's with --from-data")
    pixels, caption = torch.zeros(1, 1, 3, settings["size"], settings["size"]), ""  # for their shape
    if args.image:
        pixels = read_image(args.image, settings["size"])
    elif args.from_data:
        require(not settings["data"] or Path(settings["data"]).is_dir(), f"the clips of {where} are gone from {settings['data']}: name an --image")
        clip = dataset(SimpleNamespace(**settings)).batch([held_out(args.seed % 100_000 + 1)[-1]])
        pixels, caption = clip["video"][:, :max(1, given)], clip["text"][0]
    caption = caption if args.prompt is None else args.prompt
    return codec, codec.encode(pixels), WordEncoder(settings["text_len"], settings["text_dim"]).encode([caption]), caption


def arguments(argv):
    """The command line, checked as far as it can be without the weights."""
    parser = Flags(__doc__)
    parser.add_argument("--weights", help="folder of a stage, or a student's official weights; default: the stage finished last under out/")
    parser.add_argument("--preset", help="shape of official weights: wan-1.3b or wan-14b")
    parser.add_argument("--vae", help="folder of Wan's VAE, for networks that were trained on latents")
    parser.add_argument("--text-encoder", help="folder of Wan's text encoder and tokenizer, for those")
    parser.add_argument("--size", help="height x width in pixels, for those; default: 480x832")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", help="picture to animate, cut to shape around its centre; networks on latents also go by the prompt alone")
    source.add_argument("--from-data", action="store_true", help="first frame and caption of a held-out clip")
    parser.add_argument("--prompt", help="what shall happen; default: the caption of the clip, or nothing")
    parser.add_argument("--frames", type=int, default=0, help="frames to write, any number; default: as trained")
    parser.add_argument("--steps", type=int, nargs="+", help="network passes per chunk; several: one for each chunk, the last "
                                                             "for all that follow (4 1 is First-Frame Enhancement)")
    for name, text in (("chunk", "latent frames written together"), ("sink", "earliest latent frames that stay in the cache"),
                       ("window", "latest latent frames that stay in the cache")):
        parser.add_argument(f"--{name}", type=int, help=f"{text}; default: as trained, of official weights as the preset says")
    parser.add_argument("--context-level", type=float, help="noise level at which a finished chunk enters the cache; below 0: it stays "
                                                            "there as its last pass left it, which saves a pass; default: as trained")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the choice of the clip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, mps or cpu")
    parser.add_argument("--fps", type=float, default=0, help="frames a second of the file; default: 8, of latents 16")
    parser.add_argument("--zoom", type=int, default=0, help="enlarge pixels; default: to about 256 pixels")
    parser.add_argument("--out", default="sample.mp4", help="file to write, .mp4 or .gif")
    args = parser.parse_args(argv)
    for name, least, most in (("frames", 0, math.inf), ("fps", 0, 1000), ("zoom", 0, 100), ("context_level", -math.inf, 1), ("seed", 0, 2 ** 63 - 1),
                              ("chunk", 1, math.inf), ("sink", 0, math.inf), ("window", 1, math.inf)):
        value = getattr(args, name)
        require(value is None or least <= value <= most, f"--{name.replace('_', '-')} {value} does not work: use {least} to {most}")
    require(min(args.steps or [1]) >= 1, f"--steps {min(args.steps or [1])} does not work: use 1 or more")
    require(Path(args.out).suffix.lower() in FFMPEG, f"{args.out}: write to a name that ends in {' or '.join(FFMPEG)}")
    check_device(args.device)
    if args.image:
        read_image(args.image, sides(args.size or "16x16"))  # or a picture that cannot be read, before minutes of loading
    return args


def main(argv=None):
    """The command: one clip to one file. UsageError for what the user can mend."""
    args = arguments(argv)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    net, codec, settings = load_stage(args.weights or newest_stage(), preset=args.preset, device=args.device, dtype=dtype)
    where = settings.get("where")
    given = {name: getattr(args, name) for name in ("chunk", "sink", "window", "context_level") if getattr(args, name) is not None}
    require(not args.preset or not where, f"{where} says its own shape: leave out --preset")
    require(settings["stage"] or not given and len(args.steps or [0]) == 1, f"{where} is a teacher, which makes a clip at once: leave out "
            "--chunk, --sink, --window and --context-level, give --steps one number, or name a later stage with --weights")
    settings["context_level"] = given.pop("context_level", settings["context_level"])
    for name, value in given.items():
        setattr(net.cfg, name, value)
    codec, first, text, caption = inputs(args, codec, settings)
    first, text = first.to(args.device)[:, :settings["first"]], text.to(args.device)
    noise = torch.Generator().manual_seed(args.seed)
    randn = lambda frames: torch.randn(1, frames, *first.shape[2:], generator=noise).to(args.device)
    frames = args.frames or 1 + codec.ratio * (settings["frames"] - 1)
    steps = args.steps[0] if args.steps and len(args.steps) == 1 else args.steps  # the teacher takes a number
    zoom = args.zoom or (1 if codec.ratio > 1 else max(1, 256 // settings["size"]))

    latents, decode = 1 + math.ceil((frames - 1) / codec.ratio), codec.decoder()
    began, writing, written, chunks = time.perf_counter(), 0.0, 0, []
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    with (torch.no_grad(), half, video_writer(args.out, args.fps or (16 if codec.ratio > 1 else 8), zoom) as write,
          asked_to_stop(signal.SIGINT, signal.SIGTERM) as came):
        for part in tqdm(parts(net, settings, first, text, randn, latents, steps), unit="chunk"):
            pixels = decode(part)[0][:frames - written]
            drawn = now(first.device)
            write(pixels)
            ended, written = time.perf_counter(), written + len(pixels)
            writing += ended - drawn
            chunks.append((ended - began, ended - began - writing, written))
            if came:  # Ctrl-C or SIGTERM: what has been written of a long stream is kept
                break
    print(f"{args.out}: {written} frames of \"{caption}\"; {rates(chunks, image=first.shape[1] > 0)}")


def rates(chunks, image):
    """Speed in words, from (seconds, seconds without writing the file, frames) at the end of every chunk; `image`: the first one was given."""
    (seconds, alone, frames), (seconds_end, alone_end, frames_end) = chunks[min(int(image), len(chunks) - 1)], chunks[-1]
    words = f"first chunk after {seconds:.3f} s"
    if (more := frames_end - frames):
        words += f", then {more / (seconds_end - seconds):.1f} frames a second, without writing the file {more / (alone_end - alone):.1f}"
    return words


if __name__ == "__main__":
    with explain():
        main()
