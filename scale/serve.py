"""What sample.py needs around the method: its flags, the inputs of toy and Wan networks, speeds."""
import bisect
import math
from pathlib import Path
from types import SimpleNamespace

import torch

from data import WordEncoder, dataset, held_out_ids
from utils.errors import check_device, require
from utils.media import FFMPEG, parse_size, read_image
from utils.settings import Parser, cuda_or_cpu, flag

INF = math.inf
LIMITS = {"frames": (0, INF), "fps": (0, 1000), "zoom": (0, 100), "context_level": (-INF, 1),
          "seed": (0, 2 ** 63 - 65), "futures": (1, 64),
          "chunk": (1, INF), "sink": (0, INF), "window": (1, INF)}


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
    add("--weights", help="Folder of a stage, or a student's official weights. "
        "Default: the stage finished last under out/.")
    add("--preset", help="Shape of official weights: wan-1.3b or wan-14b.")
    add("--vae", help="Folder of Wan's VAE, for networks trained on latents.")
    add("--text-encoder", help="Folder of Wan's text encoder, for networks trained on latents.")
    add("--size", help="Height x width for networks trained on latents. Default: 480x832.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", nargs="+", help="Picture to animate; its centre is cut to "
                        "shape. As many as the network was given frames (--first).")
    source.add_argument("--from-data", action="store_true", help="Animate the first frame of a "
                        "held-out clip, with its caption. Default, if there is no --prompt.")
    add("--prompt", help="Caption. Default: that of the held-out clip, or none.")
    add("--steps", type=int, nargs="+", help="Network passes per chunk. Several numbers: one per "
        "chunk, the last for all that follow (4 1 is First-Frame Enhancement).")
    add("--chunk", type=int, help="Latent frames per chunk. Default: as trained.")
    add("--sink", type=int, help="Earliest latent frames in the cache. Default: as trained.")
    add("--window", type=int, help="Latest latent frames in the cache. Default: as trained.")
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
    args.prompt_at = list(zip(begins, [text for _, text in args.prompt_at]))
    return args


def check_stream_flags(args):
    """Numbers in their limits, a device that is there, pictures that can be read."""
    for name, (least, most) in LIMITS.items():
        value = vars(args).get(name)
        require(value is None or least <= value <= most,
                f"{flag(name)} {value} does not work: use {least} to {most}")
    least = min(args.steps or [1])
    require(least >= 1, f"--steps {least} does not work: use 1 or more")
    check_device(args.device)
    if args.image:  # before minutes of loading
        read_images(args.image, parse_size(args.size or "16x16"))


def read_images(paths, size):
    """Image files as one clip (1, number of files, 3, h, w) in [-1, 1]."""
    return torch.cat([read_image(path, size) for path in paths], 1)


def whole_number(text, name):
    """A whole number from 0 that was typed as a part of a flag."""
    require(text.isdecimal() and len(text) < 16, f"{name} {text[:40]} does not work: give a frame "
            "number from 0")
    return int(text)


def inputs(args, codec, settings, where):
    """(codec, image latents (b, k, c, h, w), text, captions in words) of --futures equal rows.

    text: (b, l, d), or with --prompt-at a callable for rollout(), latent frame -> (b, l, d)."""
    codec, first, encode, caption = one_input(args, codec, settings, where)
    number = args.futures or 1
    first = first.expand(number, -1, -1, -1, -1)
    begins = [math.ceil((frame - 1) / codec.ratio) + 1 if frame else 0
              for frame, _ in args.prompt_at]
    captions = [caption, *(words for _, words in args.prompt_at)]
    texts = [encode(words).expand(number, -1, -1) for words in captions]
    said = ", ".join([f'"{caption}"', *(f'from frame {frame} "{words}"'
                                        for frame, words in args.prompt_at)])
    if not begins:
        return codec, first, texts[0], said
    return codec, first, lambda frame: texts[bisect.bisect_right(begins, frame)], said


def one_input(args, codec, settings, where):
    """(codec, image latents (1, k, c, h, w), callable caption -> (1, l, d), caption)."""
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


def wan_inputs(args, settings, where):
    """(codec, image latents, callable caption -> (1, l, d), caption) for a network that was trained
    on latents."""
    from scale.wan import CaptionEncoder, WanCodec  # needs requirements-wan.txt
    complete = args.vae and args.text_encoder and (args.image or args.prompt)
    require(complete, f"{where} was trained on latents: add --vae, --text-encoder, and --image or "
            "--prompt")
    codec = WanCodec(args.vae, args.device)
    words = CaptionEncoder(args.text_encoder, settings["text_len"], args.device)
    height, width = parse_size(args.size or "480x832")
    first = torch.empty(1, 0, settings["in_dim"], height // 8, width // 8)  # no image
    if args.image:
        first = codec.encode(read_images(args.image, (height, width)))
    return codec, first, lambda caption: words.encode(caption)[None], args.prompt or ""


def toy_inputs(args, codec, settings, where):
    """The same for a network that was trained on frames. Nothing named: four futures of a held-out
    clip."""
    image = settings["first"]
    require(not (args.vae or args.text_encoder or args.size), f"{where} has its own codec and text "
            "encoder: leave out --vae, --text-encoder and --size")
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
