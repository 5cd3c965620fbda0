"""Videos and captions to latents, for training at Wan scale.

    python -m scale.encode --videos DIR --out DIR_OF_LATENTS --vae DIR_OF_VAE \\
                           --text-encoder DIR_OF_UMT5
    python -m scale.encode --prompts PROMPTS.txt --out DIR_OF_TEXTS --text-encoder DIR_OF_UMT5

Leaves a .safetensors file per clip: `latents` (1 + k, 16, height / 8, width / 8) of 1 + 4 k frames,
and `text` (up to 512, 4096). Captions alone (--prompts) are enough for stages 1 and 2. A second
call goes on where the first ended, and makes again what has another video or caption by now;
unreadable and short videos are skipped and listed at the end.
"""
import contextlib
import itertools
import json
import os
import re
from pathlib import Path

import torch
from tqdm import tqdm

from scale.wan import CaptionEncoder, WanCodec, find_text_encoder, find_vae
from utils.captions import captions_in, some, videos_in
from utils.errors import UsageError, WriteError, check_device, friendly_errors, require
from utils.files import (check_writable, clips_in, content_of, lock_file, read_text, save_finite,
                         shapes_in, write_json)
from utils.media import VIDEO_ENDINGS, iter_frames, parse_size
from utils.settings import Parser, cuda_or_cpu


class Texts:
    """A text encoder that remembers which captions fill it: what is behind its end is not used."""

    def __init__(self, words):
        self.words, self.full = words, []

    def encode(self, caption):
        """str -> (l, d)"""
        text = self.words.encode(caption)
        if len(text) >= self.words.length:
            self.full.append(f'"{caption[:40]}..."')
        return text

    def report(self):
        """A line, if there are any."""
        if self.full:
            print(f"{len(self.full)} captions fill all {self.words.length} tokens, and what is "
                  f"longer is cut: {some(self.full)}")


LONGEST = 255 - len("-0000.safetensors")  # bytes of a video's name, or its clips have no name
PIECE = 2 ** 26  # bytes: of a video that is no longer, all count when it is compared


def clips_by_video(out):
    """{name of a video: its finished clips}. Only all before the last number is the name: dog.mp4's
    are not those of dog.mp4-agility.mp4."""
    found = {}
    for clip in clips_in(out):
        found.setdefault(re.sub(r"-\d{4,}\.safetensors$", "", clip.name), []).append(clip)
    return found


def clip_file(out, name, n):
    """Where clip `n` of a video goes."""
    return Path(out) / f"{name}-{n:04d}.safetensors"


def encode_video(path, caption, codec, words, size, args):
    """Write the clips of one video, one file each, and return how many; the rest at its end is
    dropped. UsageError if it is shorter than a clip."""
    require(len(os.fsencode(path.name)) <= LONGEST, f"{path} has a name of more than {LONGEST} "
            "bytes: use a shorter one")
    require(path.name.encode("utf-8", "ignore").decode() == path.name, f"{path.name!a} is no name "
            "in UTF-8: rename it")
    text, frames, n = words.encode(caption), iter_frames(path, size, args.fps), 0
    clip = list(itertools.islice(frames, args.frames))
    while len(clip) == args.frames:
        latents = codec.encode(torch.stack(clip)[None].float() / 127.5 - 1)[0]
        save_finite(clip_file(args.out, path.name, n), {"latents": latents, "text": text})
        n += 1
        clip = list(itertools.islice(frames, args.frames))
    require(n, f"{path} is shorter than a clip of {args.frames} frames")
    return n


def contents(path):
    """The names of a file's tensors; none if it is empty or cut off."""
    try:
        return shapes_in(path).keys()
    except UsageError:
        return set()


@contextlib.contextmanager
def locked(out):
    """Hold --out for this call alone; UsageError if another one writes there, for each would take
    the other's clips away."""
    check_writable(out / ".lock")
    with lock_file(out / ".lock", f"another scale.encode is writing to {out}: wait for it, or "
                   "choose another --out"):
        yield


def read_marker(path):
    """What a finished video was made from; {} if it is not finished, or of an older version."""
    try:
        made = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def content_of_encoder(args):
    """{what: fingerprint} of the text encoder, the same whether it is named or the download that it
    lies in."""
    parts = [args.text_encoder]
    if Path(args.text_encoder).exists():
        encoder, _, tokenizer = find_text_encoder(args.text_encoder)
        parts = [encoder] if encoder == tokenizer else [encoder, tokenizer]
    return {"text encoder": " ".join(map(content_of, parts))}


def content_of_models(args):
    """content_of_encoder(), and the same of the VAE."""
    vae = find_vae(args.vae)[0] if Path(args.vae).exists() else args.vae
    return {"vae": content_of(vae), **content_of_encoder(args)}


def check_prompts(lines, args):
    """What all captions of the folder have in common: the text encoder. UsageError if it holds
    clips, captions of another encoder, or more than are written now."""
    out, present = Path(args.out), clips_in(args.out)
    clips = [path.name for path in present if contents(path) - {"text"}]
    clips += [path.name for path in (out / "done").glob("*") if "video" in read_marker(path)]
    require(not clips, f"{out} holds clips of videos ({some(clips)}): choose another --out for "
            "captions alone")
    require(len(present) <= len(lines), f"{out} holds {len(present)} files, {args.prompts} has "
            f"{len(lines)} captions: choose another --out, or the others would be trained on too")
    common = content_of_encoder(args)
    made = {**common, **read_marker(out / "done" / "prompts")}  # an older version left no marker
    require(made == common, f"{out} was made with another text encoder than {args.text_encoder}: "
            "choose another --out")
    return common


def source_of(path):
    """Where a video lies. Its folder is followed through links, the video itself is not: a link
    that names another file by now is a video that has changed."""
    return str(path.parent.resolve() / path.name)


def check_sources(sources, args):
    """UsageError if the folder holds clips of another video of the same name, which still lies in
    another folder: they would be taken away. A folder of videos that was moved is the same."""
    for path in sources:
        made = read_marker(Path(args.out) / "done" / path.name)
        before = str(made.get("source", ""))  # an older version did not write it down
        elsewhere = before and before != source_of(path) and os.path.exists(before)
        require(not elsewhere or content_of(path, PIECE) == made.get("video"), f"{args.out} holds "
                f"clips of {before}, and {path} is another video of that name: choose another "
                "--out, or rename one of the two")


def check_folder(sources, args):
    """What all clips of the folder have in common: settings, VAE and text encoder, by their
    content. UsageError if it holds clips that were made with others, clips of other videos of the
    same names, or captions alone."""
    alone = [path.name for path in clips_in(args.out) if contents(path) == {"text"}]
    require(not alone, f"{args.out} holds captions alone ({some(alone)}): choose another --out for "
            "clips of videos")
    common = {"settings": f"{args.size} {args.frames} frames {args.fps:g} fps",
              **content_of_models(args)}
    for marker in sorted((Path(args.out) / "done").glob("*")):
        made = read_marker(marker)
        for name, value in common.items() if "video" in made else ():
            before, now = made.get(name), value
            if name != "settings":
                before, now = f"another {name} than {getattr(args, name.replace(' ', '_'))}", "this"
            require(made.get(name) == value, f"{args.out} was made with {before}, now it is {now}: "
                    "choose another --out")
    check_sources(sources, args)
    return common


def is_finished(made, origin, path, clips):
    """Whether a video's marker says that it was made from just this, and whether all of its clips
    are there and can be read."""
    if "clips" in made:
        names = {clip_file("", path.name, n).name for n in range(len(clips))}
        counted = made["clips"] == len(clips) and names == {clip.name for clip in clips}
    else:  # of an older version, which did not count, and looked at fewer bytes
        origin, counted = {**origin, "video": content_of(path, 2 ** 16)}, True
    same = all(made.get(name) == value for name, value in origin.items())
    return bool(same and counted and clips) and all(map(contents, clips))


def remove_video(out, name, clips):
    """Take a video's marker and clips away, the marker first: what has none is made again."""
    (out / "done" / name).unlink(missing_ok=True)
    for clip in clips:
        clip.unlink(missing_ok=True)


def encode_videos(sources, size, words, common, args):
    """All videos. Those that cannot be used are listed and leave nothing."""
    out, skipped, again = Path(args.out), [], 0
    codec, captions = WanCodec(args.vae, args.device), captions_in(args.videos, sources)
    before = clips_by_video(out)
    for path in tqdm(sources, unit="video"):
        caption, clips = captions.get(path.name, ""), before.get(path.name, [])
        origin = {**common, "caption": caption, "video": content_of(path, PIECE)}
        marker, source = out / "done" / path.name, source_of(path)
        made = read_marker(marker)
        if is_finished(made, origin, path, clips):
            if made.get("source", source) != source:  # it was moved
                write_json(marker, {**made, "source": source})
            continue
        again += bool(made)
        remove_video(out, path.name, clips)
        try:
            number = encode_video(path, caption, codec, words, size, args)
        except WriteError:
            raise
        except UsageError as error:
            skipped.append(str(error))
            written = (clip_file(out, path.name, n) for n in itertools.count())
            remove_video(out, path.name, itertools.takewhile(os.path.exists, written))
            continue
        write_json(marker, {**origin, "source": source, "clips": number})
    report(sources, skipped, again, args)


def report(sources, skipped, again, args):
    """What the folder holds now. UsageError if that is nothing."""
    clips, total = clips_by_video(args.out), len(clips_in(args.out))
    changed = (f"; {again} videos were made again, their file or caption has changed, or clips of "
               "theirs were lost")
    print(f"{total} clips in {args.out}{changed if again else ''}")
    for line in skipped:
        print(f"skipped: {line}")
    gone = clips.keys() - {path.name for path in sources}
    if gone:
        print(f"{args.out} also holds clips of {len(gone)} videos that are not in {args.videos} "
              f"({some(gone)}): remove them, or they are trained on too")
    require(total, f"{args.out} holds no clip: none of {len(sources)} videos could be used")


def encode_prompts(lines, words, out):
    """Captions, one .safetensors file each."""
    for n, line in enumerate(tqdm(lines, unit="caption")):
        save_finite(Path(out) / f"{n:06d}.safetensors", {"text": words.encode(line)})
    print(f"{len(lines)} captions in {out}")


def encode_negative(words, args):
    """The negative prompt: the one that is named now, else the one before, else the empty one."""
    folder = Path(args.out) / "negative"
    before = read_marker(folder / "made.json")
    if args.negative is None and not before and (folder / "text.safetensors").is_file():
        return  # of an older version, which did not write down the text
    text = before.get("text", "") if args.negative is None else args.negative
    save_finite(folder / "text.safetensors", {"text": words.encode(text)})
    write_json(folder / "made.json", {"text": text})


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
    # a caption may hold U+2028 and the like, which str.splitlines() takes for the end of a line
    lines = [line for line in read_text(args.prompts).split("\n") if line.strip()]
    require(lines, f"{args.prompts} has no captions: write one a line")
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
    with locked(Path(args.out)):
        common = check_folder(sources, args) if sources else check_prompts(lines, args)
        words = Texts(CaptionEncoder(args.text_encoder, device=args.device))
        if lines:  # before the first caption: an interrupted call goes on with this encoder alone
            write_json(Path(args.out) / "done" / "prompts", common)
        encode_negative(words, args)
        if lines:
            encode_prompts(lines, words, args.out)
        else:
            encode_videos(sources, size, words, common, args)
        words.report()


if __name__ == "__main__":
    with friendly_errors():
        main()
