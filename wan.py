"""Wan 2.1's published companions: its video VAE and its text encoder, and the command that makes latents with them.

    python data.py encode --videos DIR_OF_MP4 --out DIR_OF_LATENTS --vae DIR_OF_VAE --text-encoder DIR_OF_UMT5
    python data.py encode --prompts PROMPTS.txt --out DIR_OF_TEXTS --text-encoder DIR_OF_UMT5     captions alone, for stages 1 and 2

Nothing of this is needed at toy scale, where PatchCodec and WordEncoder (data.py) stand in with the same interfaces. Needs
requirements-wan.txt: the models are diffusers' AutoencoderKLWan and transformers' UMT5EncoderModel.

`encode` leaves a .safetensors file per clip: `latents` (1 + k, 16, height / 8, width / 8) of 1 + 4 k frames, and `text` (up to 512,
4096). A second call goes on where the first ended: finished videos are skipped; unreadable and short ones are listed at the end.
"""
import contextlib
import itertools
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data import VIDEO_ENDINGS, Flags, captions_in, check_device, clips_in, frames_of, read_text, save_tensors, videos_in, written_whole
from model import UsageError, first_line, require


# ---------------------------------------------------------------- the VAE and the text encoder

def sides(size):
    """"480x832" -> (480, 832), height and width in pixels."""
    numbers = tuple(map(int, re.findall("[0-9]+", size)))
    require(len(numbers) == 2 and size == "{}x{}".format(*numbers) and all(n and n % 16 == 0 for n in numbers),
            f"--size {size} is not height x width in multiples of 16: use --size 480x832")
    return numbers


@contextlib.contextmanager
def published(path):
    """One sentence for what can go wrong while a published model is loaded from a folder."""
    require(Path(path).is_dir(), f"{path} is not a folder: name the one that the model was downloaded to")
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r requirements-wan.txt") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"the model in {path} cannot be loaded ({first_line(error)}): download it again") from None


class WanCodec:
    """Wan's video VAE (diffusers' AutoencoderKLWan) behind the codec interface: 1 + 4 k frames <-> 1 + k latent frames.

    path: a folder with the VAE's config.json and weights. Needs requirements-wan.txt."""
    ratio = 4  # frames to a latent frame, after the first

    def __init__(self, path, device="cpu"):
        with published(path):
            from diffusers import AutoencoderKLWan
            self.vae = AutoencoderKLWan.from_pretrained(path).eval().requires_grad_(False).to(device)
        column = lambda values: torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        self.mean, self.std = column(self.vae.config.latents_mean), column(self.vae.config.latents_std)

    def encode(self, video):
        """(b, 1 + 4 k, 3, H, W) in [-1, 1] -> (b, 1 + k, c, H / 8, W / 8), normalised"""
        z = self.vae.encode(video.transpose(1, 2).to(self.mean.device)).latent_dist.mode()
        return ((z - self.mean) / self.std).transpose(1, 2)

    def decode(self, latents):
        """The inverse: (b, 1 + k, c, h, w) -> (b, 1 + 4 k, 3, H, W)"""
        return self.decoder()(latents)

    def decoder(self):
        """decode() for a stream, part by part: a callable that goes on where its last call ended, at constant memory."""
        vae, first = self.vae, itertools.chain([True], itertools.repeat(False))
        vae.clear_cache()
        memory = list(vae._feat_map)  # one of its own, so that two streams do not meet

        @torch.autocast(self.mean.device.type, enabled=False)  # the VAE is published in float32
        def decode(latents):
            z = vae.post_quant_conv(latents.float().transpose(1, 2).to(self.mean.device) * self.std + self.mean)
            frames = [vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=next(first))
                      for frame in z.split(1, 2)]  # as AutoencoderKLWan does inside, but for the end of the stream
            return torch.cat(frames, 2).clamp(-1, 1).transpose(1, 2)

        return decode


class CaptionEncoder:
    """Wan's text encoder (transformers' UMT5): captions to embeddings (l, d), one for each token, the padding left out."""

    def __init__(self, path, length=512, device="cpu"):
        with published(path):
            from transformers import AutoTokenizer, UMT5EncoderModel
            self.tokens, self.length, self.device = AutoTokenizer.from_pretrained(path), length, device
            self.model = UMT5EncoderModel.from_pretrained(path).eval().requires_grad_(False).to(device)

    def encode(self, caption):
        """str -> (l, d), l at most `length`"""
        given = self.tokens(caption, max_length=self.length, truncation=True, return_tensors="pt").to(self.device)
        if not given["input_ids"].numel():  # no caption, and a tokenizer that adds no end mark
            return torch.zeros(1, self.model.config.d_model)
        return self.model(**{k: given[k] for k in ("input_ids", "attention_mask")}).last_hidden_state[0].float()


# ---------------------------------------------------------------- videos and captions to latents

def encode_video(path, caption, codec, words, out, size, args):
    """The clips of one video, a file each; what is left at its end is dropped. UsageError where it is shorter than one."""
    text, frames, n = words.encode(caption), frames_of(path, size, args.fps), 0
    while len(clip := list(itertools.islice(frames, args.frames))) == args.frames:
        latents = codec.encode(torch.stack(clip)[None].float() / 127.5 - 1)[0]
        save_tensors(out / f"{path.name}-{n:04d}.safetensors", {"latents": latents, "text": text})
        n += 1
    require(n, f"{path} is shorter than a clip of {args.frames} frames")


def encode_videos(sources, size, words, args):
    """All videos; those that cannot be used are listed and leave nothing."""
    out, bad = Path(args.out), []
    codec, captions, shape = WanCodec(args.vae, args.device), captions_in(args.videos, sources), f"{args.size} {args.frames} frames {args.fps:g} fps"
    for path in tqdm(sources, unit="video"):
        done = out / "done" / path.name
        if done.is_file():
            require(done.read_text() == shape, f"{out} was made with {done.read_text()}, now it is {shape}: choose another --out")
            continue
        try:
            encode_video(path, captions.get(path.name, ""), codec, words, out, size, args)
        except UsageError as error:
            if "cannot write" in str(error):
                raise
            bad.append(str(error))
            for part in [p for p in clips_in(out) if p.name.startswith(f"{path.name}-")]:
                part.unlink()  # of a video that breaks off in the middle
            continue
        with written_whole(done) as temporary:
            temporary.write_text(shape)
    print(f"{len(clips_in(out))} clips in {out}" + "".join(f"\nskipped: {line}" for line in bad))


def encode_prompts(lines, words, out):
    """Captions to a .safetensors each: all that stage 1 needs, and with it stage 2."""
    for n, line in enumerate(tqdm(lines, unit="caption")):
        save_tensors(Path(out) / f"{n:06d}.safetensors", {"text": words.encode(line)})
    print(f"{len(lines)} captions in {out}")


def to_encode(args):
    """(videos, captions) that the command line names, one of them empty. UsageError before anything is loaded."""
    require(args.frames >= 1 and args.frames % 4 == 1, f"--frames {args.frames} is not 4 k + 1: use --frames {max(5, args.frames // 4 * 4 + 1)}")
    require(args.fps >= 0, f"--fps {args.fps} does not work: it has to be at least 0")
    require(bool(args.prompts) != bool(args.videos) and (args.vae or not args.videos), "name either --videos with --vae, or --prompts")
    check_device(args.device)
    if args.videos:
        return videos_in(args.videos), []
    lines, there = [line for line in read_text(args.prompts).splitlines() if line.strip()], len(clips_in(args.out))
    require(lines, f"{args.prompts} has no captions: write one a line")
    require(there <= len(lines), f"{args.out} holds {there} files, {args.prompts} has {len(lines)} captions: choose another --out, "
            "or the others would be trained on too")
    return [], lines


@torch.no_grad()
def main(argv=None):
    """`python data.py encode`"""
    parser = Flags(__doc__, prog="data.py encode")
    parser.add_argument("--videos", help=f"folder of {', '.join(VIDEO_ENDINGS)} or of folders of images; captions as .txt, captions.csv or .jsonl")
    parser.add_argument("--out", required=True, help="folder for the latents")
    parser.add_argument("--prompts", help="instead of videos: a text file with a caption a line, enough for stages 1 and 2")
    parser.add_argument("--vae", help="folder of Wan's VAE, as diffusers saves it")
    parser.add_argument("--text-encoder", required=True, help="folder of Wan's UMT5 encoder and tokenizer, as transformers saves them")
    parser.add_argument("--size", default="480x832", help="height x width in pixels")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip, 4 k + 1")
    parser.add_argument("--fps", type=float, default=16, help="thin frames out to this rate; 0: every frame (of folders of images always)")
    parser.add_argument("--negative", help="what guidance keeps away from; default: the empty caption")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, mps or cpu")
    args = parser.parse_args(argv)
    size, (sources, lines) = sides(args.size), to_encode(args)
    words, negative = CaptionEncoder(args.text_encoder, device=args.device), Path(args.out) / "negative" / "text.safetensors"
    if args.negative is not None or not negative.is_file():
        save_tensors(negative, {"text": words.encode(args.negative or "")})
    if lines:
        encode_prompts(lines, words, args.out)
    else:
        encode_videos(sources, size, words, args)
