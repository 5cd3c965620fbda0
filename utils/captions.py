"""Which videos a folder holds, and what their captions are."""
import csv
import functools
import io
import json
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from utils.errors import UsageError, first_process, require
from utils.files import read_text
from utils.media import OTHER_IMAGES, OTHER_VIDEOS, VIDEO_ENDINGS, hidden, image_files

LISTS = ("metadata.csv", "metadata.jsonl", "captions.csv", "captions.jsonl")  # later ones win
LIST_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
FILE_COLUMNS = ("file", "file_name", "filename", "video", "path", "video_path")
TEXT_COLUMNS = ("caption", "text", "prompt", "captions")


@functools.cache
def say_once(text):
    """Print a line, once, in the first process: four stages read the same folder."""
    if first_process():
        print(text, flush=True)


def some(names, most=3):
    """The first few of these names, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------- videos

def numbered(images):
    """Whether images are the frames of one video: one name, and a number that tells them apart."""
    names = [re.fullmatch(r"(.*?)(\d+)(\D*)", image.stem) for image in images]
    if len(images) < 2 or not all(names):  # one picture is a thumbnail
        return False
    around = {(name[1], name[3]) for name in names}
    return len(around) == 1 and len({int(name[2]) for name in names}) == len(images)


def is_video(path):
    """Whether a path is a video file, or a folder of numbered images and of no videos."""
    if hidden(path):
        return False
    if path.is_dir():
        return not video_files(path) and numbered(image_files(path))
    return path.suffix.lower() in VIDEO_ENDINGS


def video_files(folder):
    """The video files right in a folder."""
    return [p for p in folder.iterdir()
            if p.suffix.lower() in VIDEO_ENDINGS and p.is_file() and not hidden(p)]


def others(folder, endings):
    """The files right in a folder that are media of kinds which are not read."""
    return [p for p in folder.iterdir() if p.suffix.lower() in endings and not hidden(p)]


def videos_in(folder):
    """The videos of a folder: files, and folders of numbered images. Media that are not read are
    named. UsageError if there is no video, or if the videos lie one deeper."""
    folder, endings = Path(folder), ", ".join(VIDEO_ENDINGS)
    require(folder.is_dir(), f"{folder} is not a folder of videos: name one with {endings} files")
    found = sorted(p for p in folder.iterdir() if is_video(p))
    known = set(found)
    inside = [p for p in folder.iterdir() if p.is_dir() and not hidden(p)]
    folders = [p for p in inside if p not in known]
    names = {p.stem for p in found if p.is_file()}
    drawn = [p for p in found if p.is_dir() and names]
    pictures_of = [p for p in drawn if names.issuperset(q.stem for q in image_files(p))]
    found = [p for p in found if p not in pictures_of]
    deeper = sorted(p for p in folders if video_files(p) or any(is_video(q) for q in p.iterdir()))
    pictures = sorted(p for p in folders if p not in deeper and image_files(p))
    if deeper and all(p.is_dir() for p in found):
        beside = f", beside the pictures in {some(found)}" if found else ""
        raise UsageError(f"the videos are in {some(deeper)}, one folder deeper than {folder}"
                         f"{beside}: name that folder, or move them together into one")
    if pictures and not found:
        raise UsageError(f"no videos in {folder}, and the pictures in {some(pictures)} are not "
                         "frames of one: number those as 0001.png, 0002.png and so on")
    foreign = [q for p in (folder, *inside) for q in others(p, OTHER_IMAGES)]
    for left, why in ((deeper, "videos in deeper folders"),
                      (pictures_of, "pictures with the names of the videos"),
                      (others(folder, OTHER_VIDEOS), "videos of other kinds: convert them to mp4"),
                      (foreign, "pictures of other kinds: convert them to png"),
                      (image_files(folder), "pictures in no folder of their own"),
                      (pictures, "pictures that are not numbered as the frames of a video")):
        if left:
            say_once(f"{folder}: not read are {some(left)} ({why})")
    require(found, f"no videos in {folder}: put {endings} files or folders of images there")
    read = [p for p in drawn if p not in pictures_of]
    if read:
        say_once(f"{folder}: {some(read)}, beside the video files, are read as videos, a frame a "
                 "picture")
    return found


# ---------------------------------------------------------------- lists of captions

def column(names, choices, path, line):
    """Which of a header's names is one of `choices`; UsageError if none is."""
    spelled = {str(name).strip().lower().replace(" ", "_"): name for name in reversed(names)}
    found = [spelled[choice] for choice in choices if choice in spelled]
    require(found, f"{path}, line {line}, needs a file and a caption and has "
            f"{', '.join(map(repr, names))[:200]}: name the columns of the first line of a csv, or "
            "the keys of every json line, file and caption")
    return found[0]


def path_of(cell):
    """What a list calls a file, as a path; Windows separates its parts by backslashes."""
    return PurePosixPath(cell.strip().replace("\\", "/"))


def swallowed(row, file, caption, separator, videos):
    """Whether the caption of a row has taken in another row, because a quote is missing: beside the
    end of a line, where a row has its file, stands a video, written as this row's is."""
    lines, ending = row[caption].split("\n"), path_of(row[file]).suffix.lower()
    for line in lines[1:] if file < caption else lines[:-1]:
        cells = line.split(separator)
        place = file if file < caption else file - len(row) + len(cells)
        name = path_of(cells[place]) if 0 <= place < len(cells) > 1 else PurePosixPath()
        if name.suffix.lower() == ending and videos.find(name.name):
            return True
    return False


def csv_rows(path, videos):
    """(line, file, caption) of a csv whose first line names its columns; commas, semicolons or tabs
    separate them, as a line "sep=;" before it may say (Excel's). videos: their Names."""
    text = read_text(path)
    said = re.match(r'\s*"?sep=(.)"?[,;\t ]*(\n|$)', text, re.I)
    if said:  # its line stays, empty: mistakes are named by their lines
        text = "\n" * text[:said.end()].count("\n") + text[said.end():]
    require(text.strip(), f"{path} is empty: write file,caption and then a row per video, or "
            "remove it")
    header = text.lstrip().split("\n")[0]
    separator = said[1] if said else max(",;\t", key=header.count)
    # a quoted caption may span several lines
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True,
                        skipinitialspace=True)  # or quotes after a space would not be any
    names, rows, end = None, [], 0
    try:
        for row in reader:
            start, end = end + 1, reader.line_num
            if not any(field.strip() for field in row):
                continue
            if names is None:
                names = row
                file = names.index(column(names, FILE_COLUMNS, path, reader.line_num))
                caption = names.index(column(names, TEXT_COLUMNS, path, reader.line_num))
                continue
            require(len(row) == len(names), f"{path}, line {reader.line_num}, has {len(row)} "
                    f"fields and the first line {len(names)} columns: put a caption that has a "
                    f"{separator!r} in it in double quotes")
            require(not swallowed(row, file, caption, separator, videos), f"{path}, line {start}, "
                    "has a caption that goes on with the row of the next video: close its quote")
            rows.append((reader.line_num, row[file], row[caption]))
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}, is not csv ({error}): put captions in "
                         "double quotes, and double those inside them") from None
    return rows


def json_rows(path):
    """(line, file, caption) of a file with one json object a line."""
    rows = []
    for n, line in enumerate(read_text(path).split("\n"), 1):  # U+2028 is no end of a line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter for brackets in brackets
            raise UsageError(f"{path}, line {n}, is not json ({error}): write one object a line, "
                             '{"file": "a.mp4", "caption": "..."}') from None
        names = list(row) if isinstance(row, dict) else [row]
        file = column(names, FILE_COLUMNS, path, n)
        caption = column(names, TEXT_COLUMNS, path, n)
        both = isinstance(row[file], str) and isinstance(row[caption], str)
        require(both, f"{path}, line {n}, needs a text as file and a text as caption: correct it")
        rows.append((n, row[file], row[caption]))
    return rows


# ---------------------------------------------------------------- from names to videos

def plain(name):
    """A name without what systems change on the way: case, and how accents are put together."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def stem_of(video):
    """A video's name without its ending; a folder has none."""
    return video.name if video.is_dir() else video.stem


class Names:
    """Videos by name: exactly, then but for case and accents, then by stem, then by both."""

    def __init__(self, videos):
        self.tables = []
        for key in (lambda v: v.name, lambda v: plain(v.name), stem_of,
                    lambda v: plain(stem_of(v))):
            table = {}
            for video in videos:
                table.setdefault(key(video), []).append(video)
            self.tables.append(table)

    def find(self, name):
        """The videos that a name can mean: of the first rule by which there are any."""
        for table, key in zip(self.tables, (name, plain(name), name, plain(name))):
            if key in table:
                return table[key]
        return []


def is_deeper(file, folder):
    """Whether a row names a file that lies in a deeper folder, which is none of the videos."""
    place, folder = (Path(os.path.abspath(p)) for p in (folder / file, folder))
    return folder in place.parent.parents and os.path.exists(place)


def stripped(caption, where):
    """A caption without the space around it. UsageError for what no text has: zero bytes, as of a
    file that was not written out, and halves of characters, which cannot be encoded."""
    bad = re.search("[\0\ud800-\udfff]", caption)
    require(not bad, f"{where} has {bad and bad[0]!a} in its caption, which is no character: write "
            "the caption again")
    return caption.strip()


def listed_captions(path, names):
    """({video's name: caption}, [files that are no video]) of one list."""
    captions, lines, left = {}, {}, []
    is_csv = path.suffix.lower() == ".csv"
    for n, file, caption in csv_rows(path, names) if is_csv else json_rows(path):
        found = names.find(path_of(file).name)
        if not found or is_deeper(path_of(file), path.parent):
            left.append(file.strip() or f"line {n}")
            continue
        require(len(found) == 1, f'{path}, line {n}: "{file}" can be {some(v.name for v in found)}'
                ": write the whole name")
        video, caption = found[0].name, stripped(caption, f"{path}, line {n},")
        require(captions.get(video, caption) == caption, f"{path} has two captions for {video}, in "
                f"lines {lines.get(video)} and {n}: remove one")
        captions[video], lines[video] = caption, n
    return captions, left


def text_files(folder, names):
    """({video's name: (text file, its text)}, [text files that fit no video]). a.txt and a.mp4.txt
    belong to a.mp4, walk.txt to the folder walk; of two, one that is not blank wins, then the
    nearer name."""
    beside, left = {}, []
    files = [p for p in folder.iterdir() if p.suffix.lower() == ".txt" and not hidden(p)]
    # exact names last, a whole name after a stem: later ones win
    files.sort(key=lambda p: (p.stem in names.tables[0], p.stem in names.tables[2], p.name))
    for file in files:
        found = names.find(file.stem)
        text = stripped(read_text(file), file) if found else ""
        for video in found:
            if text or video.name not in beside:
                beside[video.name] = file, text
        if not found:
            left.append(file.name)
    return beside, left


def captions_in(folder, videos):
    """{name of a video: caption}, from metadata.csv, metadata.jsonl, captions.csv, captions.jsonl
    and .txt files beside the videos; the later ones win. Prints how many videos have none, and
    which rows fit no video."""
    folder, names, captions, left = Path(folder), Names(videos), {}, []
    lists = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in LIST_ENDINGS and path.is_file() and not hidden(path):
            same = lists.setdefault(path.name.lower(), path)
            require(same == path, f"{folder} has {same.name} and {path.name}: remove one of them")
    for name in LISTS:
        if name in lists:
            found, unknown = listed_captions(lists.pop(name), names)
            captions |= {video: text for video, text in found.items()
                         if text or video not in captions}  # an empty field says nothing
            left += unknown
    beside, texts = text_files(folder, names)
    empty = [file.name for video, (file, text) in beside.items()
             if not text and captions.get(video)]
    captions |= {video: text for video, (_, text) in beside.items()
                 if text or not captions.get(video)}
    without = [video.name for video in videos if not captions.get(video.name)]
    words = [f"{len(videos)} videos, {len(without)} without a caption"
             + (f" ({some(without)})" if without and len(without) < len(videos) else ""),
             f"{len(left)} rows without a video" + (f" ({some(left)})" if left else "")]
    if empty:
        words.append(f"{len(empty)} empty text files, for which the lists count ({some(empty)})")
    if texts:
        words.append(f"{len(texts)} text files beside no video ({some(texts)})")
    if lists:
        unread = some(p.name for p in lists.values())
        words.append(f"{len(lists)} lists not read ({unread}: use {' or '.join(LISTS[:2])})")
    say_once(f"{folder}: {', '.join(words)}")
    return captions
