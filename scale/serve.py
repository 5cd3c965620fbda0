"""What sample.py needs around the method: its flags, the stage or the published weights that they
name, the inputs of toy and Wan networks, speeds."""
import gc
import math
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch

from data import PatchCodec, WordEncoder, dataset, held_out_ids
from model import PRESETS, Config, build
from utils.errors import check_device, require
from utils.files import read_tensors
from utils.media import FFMPEG, parse_size, read_image
from utils.runs import newest_stage, read_settings
from utils.settings import Parser, cuda_or_cpu, flag
from utils.weights import check_names, open_weights

INF = math.inf
LIMITS = {"frames": (0, INF), "fps": (0, 1000), "zoom": (0, 100), "context_level": (-INF, 1),
          "seed": (0, 2 ** 63 - 1), "chunk": (1, INF), "sink": (0, INF), "window": (0, INF),
          "shift": (1e-3, 1000), "guidance": (0, 100)}
STREAM = ("chunk", "sink", "window", "context_level", "absolute_positions")  # a teacher has none
_FORCED = dict(chunk=3, sink=0, window=18, absolute_positions=True, context_level=0.0)
STUDENTS = {  # published students: how they were trained to stream; CausVid's times are its own
    "self-forcing": dict(_FORCED, shift=5.0, student_steps=4),
    "causvid": dict(_FORCED, shift=8.0, student_steps=(1.0, 0.757, 0.522))}
TEACHERS = {  # how the official repository samples its network at 480p; the solver here is Euler's
    "wan-1.3b": dict(guidance=6.0, shift=8.0), "wan-14b": dict(guidance=5.0, shift=5.0)}


def flags(description):
    """The parser of sample.py's command line."""
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
                        "held-out clip, with its caption.")
    add("--prompt", help="Caption. Default: that of the held-out clip, or none.")
    add("--frames", type=int, default=0, help="Frames to write. Default: as trained.")
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
    add("--zoom", type=int, default=0, help="Enlarge pixels. Default: toy frames to about 256.")
    add("--out", default="sample.mp4", help="File to write, .mp4 or .gif.")
    return parser


def arguments(argv, description):
    """The command line, checked as far as it can be without the weights."""
    args = flags(description).parse_args(argv)
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        require(value is None or least <= value <= most,
                f"{flag(name)} {value} does not work: use {least} to {most}")
    least = min(args.steps or [1])
    require(least >= 1, f"--steps {least} does not work: use 1 or more")
    times = args.times or [1.0]
    falling = all(t > after for t, after in zip(times, [*times[1:], 0.0]))
    require(falling and times[0] <= 1, f"--times {' '.join(map(str, times))} does not work: give "
            "noise levels that fall, from 1 to above 0")
    require(not (args.times and args.steps), "--times are the passes of a chunk: leave out --steps")
    named = [name for name in ("weights", "teacher") if getattr(args, name)]
    require(len(named) < 2, "--weights names a student, --teacher a teacher: leave one out")
    endings = " or ".join(FFMPEG)
    require(Path(args.out).suffix.lower() in FFMPEG, f"{args.out}: use a name that ends in "
            f"{endings}")
    check_device(args.device)
    if args.image:  # before minutes of loading
        read_images(args.image, parse_size(args.size or "16x16"))
    return args


def read_images(paths, size):
    """Image files as one clip (1, number of files, 3, h, w) in [-1, 1]."""
    return torch.cat([read_image(path, size) for path in paths], 1)


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
    with torch.device("meta"):
        net = build(Config(**{field.name: settings[field.name] for field in fields(Config)}))
    check_names(net, weights, weights.where)
    return weights, codec, settings


def as_teacher(settings, preset):
    """The settings of Wan's own network: a text-to-video teacher."""
    return {**settings, "stage": 0, "ode_steps": 50, "first": 0, "sink": 0,
            **TEACHERS.get(preset, TEACHERS["wan-14b"])}


def as_student(args, weights, settings):
    """The settings of published weights that stream. UsageError for a teacher's, which would stream
    as well and give a poor video without a word; and where nothing says how."""
    where = weights.where
    require(weights.role != "teacher", f"{where} is Wan's own network, a teacher, which does not "
            "stream: name it with --teacher to sample it, or a student with --weights (if this is "
            "one, name its file alone, away from the teacher's config.json)")
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
    require(not (own and args.student), f"{where} knows how it streams: leave out --student")
    if not own:
        name = args.preset or weights.preset
        settings = as_teacher(settings, name) if teacher else as_student(args, weights, settings)
    overrides = {name: getattr(args, name) for name in (*STREAM, "shift", "guidance")
                 if getattr(args, name) is not None}
    plain = not set(STREAM) & overrides.keys() and len(args.steps or [0]) == 1
    require(settings["stage"] or plain and not args.student, f"{where} is a teacher, which makes a "
            "clip at once: leave out --student, --chunk, --sink, --window, --context-level and "
            "--absolute-positions, give --steps one number, or name a later stage with --weights")
    require(not settings["stage"] or not (args.guidance or args.negative), f"{where} is a student, "
            "whose guidance is trained in: leave out --guidance and --negative")
    image, given = settings["first"], len(args.image or [])
    wanted = 1 + (codec.ratio if codec else 4) * (image - 1) if image else 0  # frames of the video
    remedy = f"give --image {wanted} files" if image else "leave out --image and add --prompt"
    require(given in (0, wanted), f"{where} was trained with --first {image}: {remedy}")
    if codec is None:
        print(weights.note())
    return weights, codec, {**settings, **overrides}, where


# ---------------------------------------------------------------- its inputs

def embedded(args, settings):
    """(embedded prompt (l, d), embedded negative prompt or None): from the stored file, or by the
    text encoder, which is freed again."""
    guided = settings["stage"] == 0 and settings["guidance"] != 1
    if args.text:
        require(not (args.prompt or args.negative), "--text is an embedded prompt: leave out "
                "--prompt and --negative")
        beside = Path(args.text).parent / "negative" / "text.safetensors"
        require(beside.is_file() or not guided, f"guidance needs a negative prompt, and {beside} "
                "does not exist: encode with --negative, or use --guidance 1")
        files = [args.text, beside] if guided else [args.text]
        texts = [read_tensors(file)["text"] for file in files]
    else:
        from scale.wan import NEGATIVE, CaptionEncoder
        device = args.text_device or args.device
        words = CaptionEncoder(args.text_encoder or args.wan, settings["text_len"], device)
        negative = NEGATIVE if args.negative is None else args.negative
        captions = [args.prompt or "", *([negative] if guided else [])]
        texts = [words.encode(caption).cpu() for caption in captions]
        del words
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    width = texts[0].shape[1]
    require(width == settings["text_dim"], f"the text encoder's embeddings are {width} wide, the "
            f"network takes {settings['text_dim']}: name the one it was trained with")
    return texts[0], texts[1] if guided else None


def wan_inputs(args, settings, where):
    """(codec, image latents, embedded text, caption, embedded negative prompt or None) for a
    network that was trained on latents."""
    from scale.wan import WanCodec, find_vae, find_text_encoder  # needs requirements-wan.txt
    vae, text = args.vae or args.wan, args.text or args.text_encoder or args.wan
    complete = vae and text and (args.image or args.prompt or args.text)
    require(complete, f"{where} was trained on latents: add --wan, or --vae and --text-encoder; "
            "and --image or --prompt")
    find_vae(vae)
    if not args.text:
        find_text_encoder(text)
    height, width = parse_size(args.size or "480x832")
    codec = WanCodec(vae, args.device)
    require(codec.channels == settings["in_dim"], f"the VAE in {vae} has {codec.channels} "
            f"channels, the network takes {settings['in_dim']}: name the VAE it was trained with")
    words, negative = embedded(args, settings)
    first = torch.empty(1, 0, settings["in_dim"], height // 8, width // 8)  # no image
    if args.image:
        first = codec.encode(read_images(args.image, (height, width)))
    return codec, first, words[None], args.prompt or args.text or "", negative


def toy_inputs(args, codec, settings, where):
    """The same for a network that was trained on frames."""
    image = settings["first"]
    foreign = [flag(name) for name in ("wan", "vae", "text_encoder", "text", "size", "negative")
               if getattr(args, name)]
    require(not foreign, f"{where} has its own codec and text encoder: leave out "
            f"{' and '.join(foreign)}")
    require(image or args.from_data or args.prompt, f"{where} was trained without an image: add "
            "--prompt, or --from-data for a held-out clip's caption")
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
    return codec, codec.encode(pixels), words.encode([caption]), caption, None


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
