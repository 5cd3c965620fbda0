"""What sample.py needs around the method: its flags, the stage or the published weights that they
name, the inputs of toy and Wan networks, speeds."""
import bisect
import contextlib
import gc
import math
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch

from data import PatchCodec, WordEncoder, dataset, held_out_ids
from model import PRESETS, Config, build
from utils.errors import UsageError, check_device, require
from utils.files import check_writable, read_finite
from utils.media import FFMPEG, check_rate, parse_size, read_image
from utils.runs import check_codec, newest_stage, read_settings
from utils.settings import Parser, cuda_or_cpu, flag
from utils.weights import check_names, open_weights, same_network

INF = math.inf
LIMITS = {"frames": (0, INF), "fps": (0, 1000), "zoom": (0, 100), "context_level": (-INF, 1),
          "seed": (0, 2 ** 63 - 65), "futures": (1, 64),
          "chunk": (1, INF), "sink": (0, INF), "window": (0, INF),
          "shift": (1e-3, 1000), "guidance": (0, 100)}
STREAM = ("chunk", "sink", "window", "context_level", "absolute_positions")  # a teacher has none
_FORCED = dict(chunk=3, sink=0, window=18, absolute_positions=True, context_level=0.0)
STUDENTS = {  # published students: how they were trained to stream; CausVid's times are its own
    "self-forcing": dict(_FORCED, shift=5.0, student_steps=4),
    "causvid": dict(_FORCED, shift=8.0, student_steps=(1.0, 0.757, 0.522))}
TEACHERS = {  # how the official repository samples its network at 480p
    "wan-1.3b": dict(guidance=6.0, shift=8.0), "wan-14b": dict(guidance=5.0, shift=5.0)}


def flags(description):
    """The parser of sample.py's command line."""
    parser = stream_flags(description)
    add = parser.add_argument
    add("--frames", type=int, default=0, help="Frames to write. Default: as trained; 25 if "
        "no image is named.")
    add("--prompt-at", nargs=2, action="append", default=[], metavar=("FRAME", "CAPTION"),
        help="Another caption for the chunks that begin at this frame or later. Can be repeated.")
    add("--futures", type=int, help="Videos of one image side by side, the first with --seed, the "
        "next with --seed + 1, ... Default: 1; 4 if no image is named.")
    add("--zoom", type=int, default=0, help="Enlarge pixels. Default: toy frames to about 256.")
    add("--out", default="sample.mp4", help="File to write, .mp4 or .gif.")
    return parser


def stream_flags(description):
    """The part of it that experiments/live.py has, too: what is streamed, not where it goes."""
    parser = Parser(description)
    add = parser.add_argument
    add("--weights", help="Folder of a stage, or a published student's weights. "
        "Default: the stage finished last under out/.")
    add("--wan", help="Folder of a download of Wan 2.1, official or -Diffusers: its VAE, its text "
        "encoder and, without --weights, its network, which is the teacher.")
    add("--teacher", help="Wan's network alone, to be sampled as a teacher.")
    add("--vae", help="Wan's VAE alone: folder or file.")
    add("--text-encoder", help="Wan's text encoder alone: folder, or file with google/ beside it.")
    add("--text", help="In place of prompt and encoder: a .safetensors file of scale.encode.")
    add("--text-device", help="Where the text encoder runs. Default: as --device.")
    add("--student", choices=sorted(STUDENTS), help="Stream --weights as this was published.")
    add("--preset", help="Shape of published weights that do not tell it: wan-1.3b or wan-14b.")
    add("--size", help="Height x width for networks trained on latents. Default: 480x832.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", nargs="+", help="Picture to animate; its centre is cut to "
                        "shape. As many as the network was given frames (--first).")
    source.add_argument("--from-data", action="store_true", help="Animate the first frame of a "
                        "held-out clip, with its caption. Default, if there is no --prompt.")
    add("--prompt", help="Caption. Default: that of the held-out clip, or none.")
    add("--steps", type=int, nargs="+", help="Network passes per chunk. Several numbers: one per "
        "chunk, the last for all that follow (4 1 is First-Frame Enhancement).")
    add("--times", type=float, nargs="+", help="In place of --steps: the noise levels of the "
        "passes, falling from 1.")
    add("--shift", type=float, help="Timestep shift of --steps. Default: as trained.")
    add("--guidance", type=float, help="A teacher's classifier-free guidance. 1: none.")
    add("--negative", help="A teacher's negative prompt. Default: Wan's own.")
    add("--chunk", type=int, help="Latent frames per chunk. Default: as trained.")
    add("--sink", type=int, help="Earliest latent frames in the cache. Default: as trained.")
    add("--window", type=int, help="Latest latent frames in the cache; 0: the sink alone. "
        "Default: as trained.")
    add("--absolute-positions", action="store_true", default=None, help="Positions are frame "
        "numbers of the video, not places in the cache.")
    add("--context-level", type=float, help="Noise level of finished chunks in the cache; below 0 "
        "saves the context pass. Default: as trained.")
    add("--seed", type=int, default=0, help="Random seed, and number of the held-out clip.")
    add("--device", default=cuda_or_cpu(), help="cuda, mps or cpu.")
    add("--fps", type=float, default=0, help="Frame rate of the file. Default: 8, for latents 16.")
    return parser


def arguments(argv, description):
    """The command line, checked as far as it can be without the weights."""
    args = flags(description).parse_args(argv)
    check_stream_flags(args)
    endings = " or ".join(FFMPEG)
    require(Path(args.out).suffix.lower() in FFMPEG, f"{args.out}: use a name that ends in "
            f"{endings}")
    begins = [whole_number(frame, "--prompt-at") for frame, _ in args.prompt_at]
    require(begins == sorted(set(begins)), "--prompt-at takes each frame once, in rising order")
    require(not (args.text and begins), "--text is one embedded prompt: for --prompt-at name "
            "the text encoder and --prompt in its place")
    args.prompt_at = list(zip(begins, [text for _, text in args.prompt_at]))
    for _, words in args.prompt_at:
        check_text(words, "--prompt-at")
    check_writable(args.out)  # before minutes of loading
    check_rate(args.out, args.fps or 8)
    return args


def check_stream_flags(args):
    """Numbers in their limits, a device that is there, pictures that can be read."""
    for name, (least, most) in LIMITS.items():
        value = vars(args).get(name)
        require(value is None or least <= value <= most,
                f"{flag(name)} {value} does not work: use {least} to {most}")
    least = min(args.steps or [1])
    require(least >= 1, f"--steps {least} does not work: use 1 or more")
    times = args.times or [1.0]
    falling = all(t > after for t, after in zip(times, [*times[1:], 0.0]))
    require(falling and times[0] <= 1, f"--times {' '.join(map(str, times))} does not work: give "
            "noise levels that fall, from 1 to above 0")
    require(not (args.times and args.steps), "--times are the passes of a chunk: leave out --steps")
    for name in ("prompt", "negative"):
        check_text(getattr(args, name) or "", flag(name))
    named = [name for name in ("weights", "teacher") if getattr(args, name)]
    require(len(named) < 2, "--weights names a student, --teacher a teacher: leave one out")
    require(not args.text or args.prompt is None and args.negative is None, "--text is an embedded "
            "prompt: leave out --prompt and --negative")
    require(not (args.wan and Path(args.wan).is_file()), f"--wan {args.wan} is a file: name the "
            "folder of the download, or the file with --teacher, --vae or --text-encoder")
    check_device(args.device)
    if args.text_device:
        check_device(args.text_device, "--text-device")
    if args.image:  # before minutes of loading
        read_images(args.image, parse_size(args.size or "16x16"))


def check_text(words, name):
    """UsageError for what was typed in another encoding than UTF-8."""
    try:
        words.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} {words[:40]!r} is no text in UTF-8: type it again, or set the "
                         "terminal to UTF-8") from None


def read_images(paths, size):
    """Image files as one clip (1, number of files, 3, h, w) in [-1, 1]."""
    return torch.cat([read_image(path, size) for path in paths], 1)


def whole_number(text, name):
    """A whole number from 0 that was typed as a part of a flag."""
    require(text.isdecimal() and len(text) < 16, f"{name} {text[:40]} does not work: give a frame "
            "number from 0")
    return int(text)


# ---------------------------------------------------------------- what is sampled

def official_settings(weights, preset):
    """Settings of published weights: their shape, from the preset or the tensors, and the stream of
    the Wan presets."""
    choices = " or ".join(name for name in PRESETS if name != "toy")
    require(preset is None or preset in PRESETS, f"--preset {preset} is unknown: use {choices}")
    require(not (preset and weights.preset and preset != weights.preset), f"{weights.where} has "
            f"the shape of {weights.preset}: leave out --preset {preset}")
    require(preset or weights.shape.get("num_heads"), f"{weights.where} holds weights alone, of an "
            f"unusual width: add --preset {choices}")
    shape = {} if preset else weights.shape
    settings = asdict(Config(**PRESETS[preset or weights.preset or "wan-1.3b"]))
    return {**settings, **shape, "stage": 2, "student_steps": 4, "context_level": 0.0}


def open_stage(folder, preset=None):
    """(weights unread, codec or None, settings dict) of a stage's folder, or of published weights.

    Raises UsageError if they are missing, or are not what their settings say."""
    folder, settings, codec = Path(folder), read_settings(folder), None
    if settings is None:
        weights = open_weights(folder)
        settings = official_settings(weights, preset)
    else:
        require(not preset, f"{folder} knows its shape: leave out --preset")
        weights = open_weights(folder / "ema.safetensors")
        codec = PatchCodec.load(folder / "codec.safetensors")
        check_codec(folder, settings)
    with torch.device("meta"):
        net = build(Config(**{field.name: settings[field.name] for field in fields(Config)}))
    check_names(net, weights, weights.where)
    return weights, codec, settings


def as_teacher(settings, preset):
    """The settings of Wan's own network: a text-to-video teacher."""
    return {**settings, "stage": 0, "ode_steps": 50, "first": 0, "sink": 0,
            **TEACHERS.get(preset, TEACHERS["wan-14b"])}


def refuse_teacher(weights):
    """UsageError for a teacher's published weights, which would stream as well, and give a poor
    video without a word."""
    require(weights.role != "teacher", f"{weights.where} is Wan's own network, a teacher, which "
            "does not stream: name it with --teacher to sample it, or a student with --weights (if "
            "this is one, name its file alone, away from the teacher's config.json)")


def as_student(args, weights, settings):
    """The settings of published weights that stream. UsageError for a teacher's, and where nothing
    says how."""
    where = weights.where
    with contextlib.suppress(UsageError):  # --wan may hold no network
        if args.wan and not weights.role and same_network(where, args.wan):
            weights.role = "teacher"
    refuse_teacher(weights)
    typed = args.chunk and args.window is not None and (args.steps or args.times)
    require(args.student or typed, f"nothing says how the weights in {where} stream: add "
            f"--student {' or '.join(sorted(STUDENTS))} if they are one of these, or --chunk, "
            "--sink, --window and --steps as they were trained (a teacher takes --teacher)")
    return {**settings, **STUDENTS.get(args.student, {})}


def chosen_stage(args):
    """(weights unread, codec, settings, where) of what the command line names, with what it
    overrides. Everything is checked before anything large is read."""
    teacher = args.teacher or (None if args.weights else args.wan)
    weights, codec, settings = open_stage(args.weights or teacher or newest_stage(), args.preset)
    where = settings.get("where", str(weights.where))
    own = "where" in settings
    require(not teacher or weights.role != "student", f"{where} is a student's generator, no "
            "teacher: name it with --weights, and Wan's own network with --teacher")
    require(not (own and args.student), f"{where} knows how it streams: leave out --student")
    if not own:
        name = args.preset or weights.preset
        settings = as_teacher(settings, name) if teacher else as_student(args, weights, settings)
    overrides = {name: getattr(args, name) for name in (*STREAM, "shift", "guidance")
                 if getattr(args, name) is not None}
    settings |= overrides
    check_teacher_and_student(args, settings, overrides, where)
    image, given, wanted = settings["first"], len(args.image or []), 0
    remedy = "leave out --image and add --prompt"
    if image:  # latent frames -> frames of the video
        wanted = 1 + (codec.ratio if codec else 4) * (image - 1)
        remedy = f"give --image {wanted} files"
    require(given in (0, wanted), f"{where} was trained with --first {image}: {remedy}")
    if codec is None:
        print(weights.note())
    return weights, codec, settings, where


def check_teacher_and_student(args, settings, overrides, where):
    """Teachers get no flags of streams, students none of guidance: it would change nothing."""
    streamed = set(STREAM) & overrides.keys() or len(args.steps or [0]) > 1 or args.prompt_at
    require(settings["stage"] or not (streamed or args.student), f"{where} is a teacher, which "
            "follows its ODE and takes no settings of streams: leave out --student, --chunk, "
            "--sink, --window, --context-level, --absolute-positions and --prompt-at, give "
            "--steps one number, or name a later stage with --weights")
    guided = args.guidance is not None or args.negative is not None
    require(not (settings["stage"] and guided), f"{where} is a student, whose guidance is trained "
            "in: leave out --guidance and --negative")
    causal = settings.get("teacher_forcing") == 1
    require(not (causal and guided), f"{where} is a causal teacher, which is "
            "sampled without guidance: leave out --guidance and --negative")


# ---------------------------------------------------------------- its inputs

def inputs(args, codec, settings, where):
    """(codec, image latents (b, k, c, h, w), text, captions in words, embedded negative prompt (l,
    d) or None) of --futures equal rows. All captions are encoded, then the text encoder is freed.

    text: (b, l, d), or with --prompt-at a callable for rollout(), latent frame -> (b, l, d)."""
    latent = codec is None
    codec, first, encode, caption = one_input(args, codec, settings, where)
    number = args.futures or 1
    first = first.expand(number, -1, -1, -1, -1)
    begins = [math.ceil((frame - 1) / codec.ratio) + 1 if frame else 0
              for frame, _ in args.prompt_at]
    if begins:
        image, chunk, latents = settings["first"], settings["chunk"], settings["frames"]
        if args.frames:
            latents = math.ceil((args.frames - 1) / codec.ratio) + 1
        require(begins[-1] <= image + (latents - image - 1) // chunk * chunk, "--prompt-at "
                f"{args.prompt_at[-1][0]}: no chunk begins there or later, so its caption would "
                "not be seen; raise --frames, or leave it out")
    captions = [caption, *(words for _, words in args.prompt_at)]
    texts = [encode(words).expand(number, -1, -1) for words in captions]
    negative = negative_text(args, settings, encode) if latent else None
    del encode
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    said = ", ".join([f'"{caption}"', *(f'from frame {frame} "{words}"'
                                        for frame, words in args.prompt_at)])
    if not begins:
        return codec, first, texts[0], said, negative
    return codec, first, lambda frame: texts[bisect.bisect_right(begins, frame)], said, negative


def one_input(args, codec, settings, where):
    """(codec, image latents (1, k, c, h, w), callable caption -> (1, l, d), caption). The callable
    holds the text encoder."""
    if codec is None:
        codec, first, encode, caption = wan_inputs(args, settings, where)
    else:
        codec, first, encode, caption = toy_inputs(args, codec, settings, where)
    first = first.to(args.device)[:, :settings["first"]]
    return codec, first, lambda words: encode(words).to(args.device), caption


def seeded_noise(first, seed):
    """randn for rollout(): row i of the batch is drawn from a seed of its own, `seed` + i."""
    streams = [torch.Generator().manual_seed(seed + i) for i in range(len(first))]

    def randn(number):
        rows = [torch.randn(number, *first.shape[2:], generator=stream) for stream in streams]
        return torch.stack(rows).to(first.device)

    return randn


def check_frames(chunk, pixels, where):
    """UsageError for frames that are not finite."""
    require(chunk.isfinite().all() and pixels.isfinite().all(), f"{where} gives frames that are "
            "not finite (NaN): its weights or its VAE's are damaged, or overflow in half precision")


def steps_of(args):
    """What the command line says of a chunk's passes, for rollout(); None: as trained."""
    if args.times:
        return tuple(args.times)
    if len(args.steps or ()) == 1:  # a number: for all chunks
        return args.steps[0]
    return args.steps


def is_guided(settings):
    """Whether these settings go away from a negative prompt; a causal teacher does not."""
    return (settings["stage"] == 0 and settings.get("teacher_forcing") != 1
            and settings["guidance"] != 1)


def negative_text(args, settings, encode):
    """The embedded negative prompt (l, d) of a teacher that was trained on latents, or None."""
    if not is_guided(settings):
        return None
    if args.text:
        return fitting(stored_text(negative_beside(args.text)), settings)
    from scale.wan import NEGATIVE
    return encode(NEGATIVE if args.negative is None else args.negative)[0]


def stored_text(path):
    """The embedding (l, d) in a file of scale.encode, or UsageError."""
    tensors = read_finite(path)
    require("text" in tensors, f"{path} holds no embedded text ({', '.join(sorted(tensors))}): "
            "name a file of python -m scale.encode")
    return tensors["text"]


def negative_beside(text):
    """Where scale.encode has left the negative prompt of an embedded prompt."""
    return Path(text).parent / "negative" / "text.safetensors"


def fitting(text, settings):
    """An embedding (l, d) of the width that the network takes, or UsageError."""
    width = text.shape[1]
    require(width == settings["text_dim"], f"the text encoder's embeddings are {width} wide, the "
            f"network takes {settings['text_dim']}: name the one it was trained with")
    return text


def wan_inputs(args, settings, where):
    """(codec, image latents, callable caption -> (1, l, d), caption) for a network that was trained
    on latents. With --text the callable gives the stored embedding, whatever the caption."""
    from scale.wan import CaptionEncoder, WanCodec, find_text_encoder, find_vae  # needs diffusers
    vae, encoder = args.vae or args.wan, args.text_encoder or args.wan
    require(vae and (args.text or encoder), f"{where} was trained on latents: add --wan, or "
            "--vae and --text-encoder")
    require(args.image or args.text or args.prompt is not None, f"{where} was trained on latents, "
            "and nothing says what to show: add --image or --prompt")
    find_vae(vae)  # all is there before anything large is read
    if args.text:
        stored = stored_text(args.text)
        beside = negative_beside(args.text)
        require(beside.is_file() or not is_guided(settings), f"guidance needs a negative prompt, "
                f"and {beside} does not exist: encode with --negative, or use --guidance 1")
    else:
        find_text_encoder(encoder)
    height, width = parse_size(args.size or "480x832")
    codec = WanCodec(vae, args.device)
    require(codec.channels == settings["in_dim"], f"the VAE in {vae} has {codec.channels} "
            f"channels, the network takes {settings['in_dim']}: name the VAE it was trained with")
    first = torch.empty(1, 0, settings["in_dim"], height // 8, width // 8)  # no image
    if args.image:
        first = codec.encode(read_images(args.image, (height, width)))
    if args.text:
        return codec, first, lambda _: fitting(stored, settings)[None], args.text
    words = CaptionEncoder(encoder, settings["text_len"], args.text_device or args.device)
    return (codec, first, lambda caption: fitting(words.encode(caption), settings)[None],
            args.prompt or "")


def toy_inputs(args, codec, settings, where):
    """The same for a network that was trained on frames. Nothing named: four futures of a held-out
    clip."""
    image = settings["first"]
    foreign = [flag(name) for name in ("wan", "vae", "text_encoder", "text", "text_device", "size",
                                     "negative") if getattr(args, name)]
    require(not foreign, f"{where} has its own codec and text encoder: leave out "
            f"{' and '.join(foreign)}")
    require(image or args.from_data or args.prompt, f"{where} was trained without an image: add "
            "--prompt, or --from-data for a held-out clip's caption")
    if image and not (args.image or args.from_data or args.prompt):
        args.from_data = True
        args.futures = args.futures or 4
        if settings["stage"]:  # a teacher makes clips of the trained length
            args.frames = args.frames or 25  # long enough to see the futures part
    require(not image or args.image or args.from_data, f"{where} animates an image: add --image, "
            "or --from-data for a held-out clip's")
    pixels, caption = torch.zeros(1, 1, 3, settings["size"], settings["size"]), ""
    if args.image:
        pixels = read_images(args.image, settings["size"])
    elif args.from_data:
        folder = settings["data"]
        require(not folder or Path(folder).is_dir(), f"the clips of {where} are gone from "
                f"{folder}: use --image")
        clip_ids = held_out_ids(args.seed % 100_000 + 1)[-1:]
        clip = dataset(SimpleNamespace(**settings)).batch(clip_ids)
        pixels, caption = clip["video"][:, :max(1, image)], clip["text"][0]
    if args.prompt is not None:
        caption = args.prompt
    words = WordEncoder(settings["text_len"], settings["text_dim"])
    return codec, codec.encode(pixels), lambda caption: words.encode([caption]), caption


def what(args, said, where):
    """What a video shows, for the command's last line."""
    number = args.futures or 1
    if number == 1:
        return f"{said} by {where}"
    return (f"{said} by {where}, {number} futures side by side: one image, seeds {args.seed} to "
            f"{args.seed + number - 1}")


def rates(marks, image):
    """Speed in words, from (seconds, seconds spent writing, frames) at the end of every chunk;
    image: the first chunk was given."""
    start = min(int(image), len(marks) - 1)
    seconds, writing, frames = (end - begin for begin, end in zip(marks[start], marks[-1]))
    words = f"first chunk after {marks[start][0]:.3f} s"
    if frames:
        writing = sum(mark[1] for mark in marks[start + 1:])
        words += (f", then {frames / seconds:.1f} frames a second, without writing the file "
                  f"{frames / (seconds - writing):.1f}")
    return words
