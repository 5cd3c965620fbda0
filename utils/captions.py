"""Which videos a folder holds, and what their captions are."""
import csv
import io
import json
from pathlib import Path

from utils.errors import UsageError, require
from utils.files import read_text
from utils.media import VIDEO_ENDINGS, image_files


def videos_in(folder):
    """The videos of a folder: files, and folders of numbered images. UsageError if none."""
    folder, endings = Path(folder), ", ".join(VIDEO_ENDINGS)
    require(folder.is_dir(), f"{folder} is not a folder of videos: name one with {endings} files")
    found = [p for p in folder.iterdir()
             if p.suffix.lower() in VIDEO_ENDINGS or p.is_dir() and any(image_files(p))]
    require(found, f"no videos in {folder}: put {endings} files or folders of images there")
    return sorted(found)


def caption_rows(path):
    """{file: caption} of a captions.csv (columns file, caption) or captions.jsonl; {} if none."""
    if not path.is_file():
        return {}
    lines = io.StringIO(read_text(path), newline="")  # a quoted caption may span several lines
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(lines))
        else:
            rows = [json.loads(line) for line in lines if line.strip()]
        return {row["file"]: row["caption"].strip() for row in rows}
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise UsageError(f"{path} needs a file and a caption in every row, as columns of a csv or "
                         "keys of json lines") from None


def text_file_beside(path):
    """Where a video's caption would be: a.txt beside a.mp4, walk.txt beside the folder walk."""
    return path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")


def captions_in(folder, videos):
    """{name of a video: caption}, from captions.csv, captions.jsonl and .txt files beside the
    videos; the later ones win."""
    captions = {}
    for name in ("captions.csv", "captions.jsonl"):
        captions |= caption_rows(Path(folder) / name)
    for video in videos:
        beside = text_file_beside(video)
        if beside.is_file():
            captions[video.name] = read_text(beside).strip()
    return captions
