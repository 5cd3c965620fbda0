"""Videos and captions to latents, for training at Wan scale.

    python -m scale.encode --videos DIR --out DIR_OF_LATENTS --vae DIR_OF_VAE \\
                           --text-encoder DIR_OF_UMT5
    python -m scale.encode --prompts PROMPTS.txt --out DIR_OF_TEXTS --text-encoder DIR_OF_UMT5

Leaves a .safetensors file per clip: `latents` (1 + k, 16, height / 8, width / 8) of 1 + 4 k frames,
and `text` (up to 512, 4096). Captions alone (--prompts) are enough for stages 1 and 2. A second
call goes on where the first ended; unreadable and short videos are skipped and listed at the end.
"""
import itertools
from pathlib import Path

import torch
from tqdm import tqdm

from scale.wan import CaptionEncoder, WanCodec, find_vae
from utils.captions import captions_in, videos_in
from utils.errors import UsageError, check_device, friendly_errors, require
from utils.files import atomic_write, clips_in, read_text, save_tensors
from utils.media import VIDEO_ENDINGS, iter_frames, parse_size
from utils.settings import Parser, cuda_or_cpu


def encode_video(path, caption, codec, words, size, args):
    """The clips of one video, one file each; the rest at its end is dropped. UsageError if it is
    shorter than a clip."""
    text, frames, n = words.encode(caption), iter_frames(path, size, args.fps), 0
    clip = list(itertools.islice(frames, args.frames))
    while len(clip) == args.frames:
        latents = codec.encode(torch.stack(clip)[None].float() / 127.5 - 1)[0]
        file = Path(args.out) / f"{path.name}-{n:04d}.safetensors"
        save_tensors(file, {"latents": latents, "text": text})
        n += 1
        clip = list(itertools.islice(frames, args.frames))
    require(n, f"{path} is shorter than a clip of {args.frames} frames")


def is_done(marker, shape):
    """Whether a video is finished; UsageError if it was encoded in another shape."""
    if not marker.is_file():
        return False
    before = marker.read_text()
    require(before == shape, f"{marker.parent.parent} was made with {before}, now it is {shape}: "
            "choose another --out")
    return True


def encode_videos(sources, size, words, args):
    """All videos. Those that cannot be used are listed and leave nothing."""
    out, skipped, codec = Path(args.out), [], WanCodec(args.vae, args.device)
    captions = captions_in(args.videos, sources)
    shape = f"{args.size} {args.frames} frames {args.fps:g} fps"
    for path in tqdm(sources, unit="video"):
        marker = out / "done" / path.name
        if is_done(marker, shape):
            continue
        try:
            encode_video(path, captions.get(path.name, ""), codec, words, size, args)
        except UsageError as error:
            if "cannot write" in str(error):
                raise
            skipped.append(str(error))
            for part in clips_in(out):  # of a video that breaks off in the middle
                if part.name.startswith(f"{path.name}-"):
                    part.unlink()
            continue
        with atomic_write(marker) as temporary:
            temporary.write_text(shape)
    print(f"{len(clips_in(out))} clips in {out}")
    for line in skipped:
        print(f"skipped: {line}")


def encode_prompts(lines, words, out):
    """Captions, one .safetensors file each."""
    for n, line in enumerate(tqdm(lines, unit="caption")):
        save_tensors(Path(out) / f"{n:06d}.safetensors", {"text": words.encode(line)})
    print(f"{len(lines)} captions in {out}")


def inputs(args):
    """(videos, captions) that the command line names, one of them empty. UsageError before anything
    is loaded."""
    fitting = max(5, args.frames // 4 * 4 + 1)
    require(args.frames >= 1 and args.frames % 4 == 1, f"--frames {args.frames} is not 4 k + 1: "
            f"use --frames {fitting}")
    require(args.fps >= 0, f"--fps {args.fps} does not work: it has to be at least 0")
    args.vae, args.text_encoder = args.vae or args.wan, args.text_encoder or args.wan
    require(args.text_encoder, "add --wan with the folder of a download of Wan 2.1, or "
            "--text-encoder (and --vae for videos)")
    either = bool(args.prompts) != bool(args.videos)
    complete = either and (args.vae or not args.videos)
    require(complete, "use either --videos with --wan or --vae, or --prompts")
    if args.videos and Path(args.vae).exists():
        find_vae(args.vae)  # before the text encoder is read
    check_device(args.device)
    if args.videos:
        return videos_in(args.videos), []
    lines = [line for line in read_text(args.prompts).splitlines() if line.strip()]
    require(lines, f"{args.prompts} has no captions: write one a line")
    present = len(clips_in(args.out))
    require(present <= len(lines), f"{args.out} holds {present} files, {args.prompts} has "
            f"{len(lines)} captions: choose another --out, or the others would be trained on too")
    return [], lines


def arguments(argv):
    """The command line."""
    parser = Parser(__doc__, prog="python -m scale.encode")
    add = parser.add_argument
    add("--videos", help=f"Folder of {', '.join(VIDEO_ENDINGS)} files or folders of images, with "
        "captions as .txt, captions.csv or captions.jsonl.")
    add("--out", required=True, help="Folder for the latents.")
    add("--prompts", help="In place of videos: a text file with one caption a line.")
    add("--wan", help="Folder of a download of Wan 2.1, official or -Diffusers: VAE, text encoder.")
    add("--vae", help="Wan's VAE alone: folder or file.")
    add("--text-encoder", help="Wan's UMT5 encoder alone: folder, or file with google/ beside it.")
    add("--size", default="480x832", help="Height x width in pixels.")
    add("--frames", type=int, default=81, help="Frames of a clip, 4 k + 1.")
    add("--fps", type=float, default=16, help="Thin frames to this rate. 0: keep all.")
    add("--negative", help="Negative prompt of guidance. Default: the empty caption.")
    add("--device", default=cuda_or_cpu(), help="cuda, mps or cpu.")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    """Encode a folder of videos, or a file of captions."""
    args = arguments(argv)
    size, (sources, lines) = parse_size(args.size), inputs(args)
    words = CaptionEncoder(args.text_encoder, device=args.device)
    negative = Path(args.out) / "negative" / "text.safetensors"
    if args.negative is not None or not negative.is_file():
        save_tensors(negative, {"text": words.encode(args.negative or "")})
    if lines:
        encode_prompts(lines, words, args.out)
    else:
        encode_videos(sources, size, words, args)


if __name__ == "__main__":
    with friendly_errors():
        main()
