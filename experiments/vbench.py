"""The folder of videos that VBench-I2V reads, from a Wan student: evaluate.py --vbench DIR.

VBench wants five videos of every image and prompt, named PROMPT-0.mp4 to PROMPT-4.mp4, and takes
images and prompts from its own files (download_data.sh in its folder vbench2_beta_i2v). The scores
are computed there, by its networks; the command for it is printed at the end.
"""
import contextlib
import json
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from sample import generate_chunks, load_network
from scale.serve import open_stage, read_images, refuse_teacher, seeded_noise
from utils.errors import require
from utils.files import read_json, write_json
from utils.media import parse_size, video_writer
from utils.runs import fingerprint

VIDEOS = 5  # of every image and prompt
RATIOS = {"1-1": 1, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}  # of the images that VBench offers
DIMENSIONS = ("i2v_subject i2v_background camera_motion subject_consistency background_consistency "
              "motion_smoothness dynamic_degree aesthetic_quality imaging_quality").split()


def read_pairs(info, images):
    """[(prompt, image file)] of VBench's vbench2_i2v_full_info.json, each once.

    Raises UsageError for what cannot be made or would be mixed up: a missing image, a prompt with
    two images, a prompt that is no file name."""
    rows, pairs = read_json(info), {}
    valid = isinstance(rows, list) and rows and all(
        isinstance(row, dict) and {"prompt_en", "image_name"} <= row.keys() for row in rows)
    require(valid, f"{info} is no list of prompt_en and image_name: name VBench's "
            "vbench2_beta_i2v/vbench2_i2v_full_info.json")
    for row in rows:
        prompt, image = row["prompt_en"], Path(images) / row["image_name"]
        require(image.is_file(), f"{image} is not there: name the folder of VBench's cropped "
                "images with --vbench-images, such as vbench2_beta_i2v/data/crop/16-9")
        require(pairs.setdefault(prompt, image) == image, f'{info} has two images for "{prompt}", '
                "whose videos would have one name: remove a row")
        require("/" not in prompt and len(prompt.encode()) < 240, f'"{prompt[:60]}" cannot be a '
                "file name, as VBench wants it: shorten it")
    return list(pairs.items())


def ratio_of(images, size):
    """VBench's word for the shape of the images: their folder's name, or the one nearest to the
    videos' shape."""
    name, (height, width) = Path(images).resolve().name, size
    return name if name in RATIOS else min(RATIOS, key=lambda r: abs(RATIOS[r] - width / height))


def seed_of(prompt, index):
    """A seed that depends on the video's name alone: nobody has chosen it."""
    return zlib.crc32(f"{prompt}-{index}".encode())


def claim(out, settings):
    """Go on in a folder only with the settings that its videos were made with. They lie beside it:
    VBench takes the ending of its videos from the first file in the folder."""
    path = out.with_name(f"{out.name}.json")
    known = read_json(path) if path.is_file() else settings
    changed = [name for name in settings if known.get(name) != settings[name]]
    require(not changed, f"{out} holds videos made with another {' and '.join(changed)}: choose "
            "another --vbench folder, or remove it")
    require(path.is_file() or not out.is_dir() or not any(out.iterdir()), f"{out} is not empty and "
            "not from this command: choose another --vbench folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def wan_student(args, folder):
    """(weights, settings) of a student that was trained on latents, unread."""
    weights, codec, settings = open_stage(folder, args.preset)
    if "where" not in settings:
        refuse_teacher(weights)
    require(codec is None, f"{folder} was trained on frames of a toy: VBench is for Wan students")
    require(settings["stage"] and settings["first"] == 1, f"{folder} does not animate an image as "
            "a stream: name a stage from 1 on that was trained with --first 1")
    require(args.wan or args.vae and args.text_encoder, f"{folder} was trained on latents: add "
            "--wan, or --vae and --text-encoder")
    return weights, settings


def embedded(args, prompts, length):
    """{prompt: its embedding (1, l, d)}. The text encoder leaves before the network comes."""
    from scale.wan import CaptionEncoder  # needs requirements-wan.txt
    words = CaptionEncoder(args.text_encoder or args.wan, length, args.device)
    return {prompt: words.encode(prompt)[None].cpu() for prompt in prompts}


@torch.no_grad()
def make_videos(args, folder):
    """Make what is missing of the videos; prints the command to run in VBench."""
    out, size = Path(args.vbench), parse_size(args.size or "480x832")
    require(args.vbench_info and args.vbench_images, "--vbench needs --vbench-info, VBench's "
            "vbench2_i2v_full_info.json, and --vbench-images, its folder of cropped images")
    pairs = read_pairs(args.vbench_info, args.vbench_images)  # before minutes of loading
    weights, settings = wan_student(args, folder)
    from scale.wan import WanCodec
    codec = WanCodec(args.vae or args.wan, args.device)
    steps, ratio = args.steps or settings["student_steps"], ratio_of(args.vbench_images, size)
    claim(out, {"weights": fingerprint(folder), "size": list(size), "passes": steps,
                "images": ratio, "frames": 1 + codec.ratio * (settings["frames"] - 1)})
    missing = {prompt: [i for i in range(VIDEOS) if not (out / f"{prompt}-{i}.mp4").is_file()]
               for prompt, _ in pairs}
    made, wanted = 0, [prompt for prompt, numbers in missing.items() if numbers]
    texts = embedded(args, wanted, settings["text_len"])
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    net = load_network(weights, settings, args.device, dtype)
    for prompt, image in tqdm(pairs, desc="VBench", unit="prompt"):
        if not missing[prompt]:
            continue
        first = codec.encode(read_images([image], size)).to(args.device)
        text = texts[prompt].to(args.device)
        for i in missing[prompt]:
            randn = seeded_noise(first, seed_of(prompt, i))
            chunks = generate_chunks(net, settings, first, text, randn, settings["frames"], steps)
            write_video(out / f"{prompt}-{i}.mp4", chunks, codec, settings, args.device)
            made += 1
    print(f"{out}: {made} videos made, {VIDEOS * len(pairs)} in all. In VBench's folder:\n"
          f"for dimension in {' '.join(DIMENSIONS)}; do python evaluate_i2v.py --videos_path "
          f"{json.dumps(str(out.resolve()))} --dimension $dimension --ratio {ratio}; done")


def write_video(path, chunks, codec, settings, device):
    """Decode and write a clip chunk by chunk, cut to the trained length."""
    decode, left = codec.decoder(), 1 + codec.ratio * (settings["frames"] - 1)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(video_writer(path, fps=16))
        stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=device == "cuda"))
        for chunk in chunks:
            frames = decode(chunk)[0][:left]
            write(frames)
            left -= len(frames)
