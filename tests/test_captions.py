"""Which videos a folder holds, and how their captions may be written down."""

import json
import re
import shutil
import unicodedata

import pytest

from utils.captions import captions_in, say_once, videos_in
from utils.errors import UsageError


def make(folder, *names):
    """Empty files; names that end in a slash are folders."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
    return folder


def read(folder, capsys):
    """(names of the videos, captions, what was printed)"""
    say_once.cache_clear()
    videos = videos_in(folder)
    captions = captions_in(folder, videos)
    return [video.name for video in videos], captions, capsys.readouterr().out


# ---------------------------------------------------------------- videos

def test_what_programs_leave_behind_is_no_video(tmp_path, capsys):
    make(tmp_path, "one.mp4", "._one.mp4", ".hidden.mp4", ".ipynb_checkpoints/0.jpg",
         "@eaDir/0.jpg", "@eaDir/one.mp4/0.jpg", "__MACOSX/0.png", "#recycle/a.mp4",
         "walk/._00.png", "walk/00.png", "walk/01.png",
         "#cats.mp4", "@me.mp4", "$5.mp4")
    assert read(tmp_path, capsys)[0] == ["#cats.mp4", "$5.mp4", "@me.mp4", "one.mp4", "walk"]


@pytest.mark.parametrize("name", [
    "lost+found", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "@eaDir", "__MACOSX",
    "FOUND.000", "LOST.DIR", "@Recently-Snapshot", "Network Trash Folder", ".Trash-1000"])
def test_folders_of_the_system_are_no_video(tmp_path, capsys, name):
    make(tmp_path, "one.mp4", *(f"{folder}/{n}.jpg" for folder in (name, "lost") for n in (1, 2)))
    found, _, said = read(tmp_path, capsys)
    assert found == ["lost", "one.mp4"] and "not read" not in said
    (tmp_path / "one.mp4").unlink()
    shutil.rmtree(tmp_path / "lost")
    with pytest.raises(UsageError, match="no videos in"):
        videos_in(tmp_path)


def test_first_frames_beside_videos_are_not_taken_for_one(tmp_path):
    make(tmp_path, "videos/a.mp4", "images/0001.png", "images/0002.png", "list.txt")
    with pytest.raises(UsageError, match="the videos are in .*videos, one folder deeper"):
        videos_in(tmp_path)
    make(tmp_path / "photos", "images/cat.png", "images/dog.png")
    with pytest.raises(UsageError, match="pictures in .*images are not frames of one"):
        videos_in(tmp_path / "photos")


@pytest.mark.parametrize("names", [
    ["cat.png", "dog.png"], ["a_1.png", "mask_1.png"], ["1.png", "1.jpg"], ["a1.png", "b2.png"],
    ["0001.jpg"]])
def test_what_is_not_read_is_said(tmp_path, capsys, names):
    make(tmp_path, "a.mp4", "c.M4V", "deep/b.mp4", *(f"stills/{name}" for name in names))
    found, _, said = read(tmp_path, capsys)
    assert found == ["a.mp4"] and said.count("not read are") == 3
    assert all(name in said for name in ("c.M4V", "deep", "stills"))


@pytest.mark.parametrize("name, why", [
    *((f"b.{ending}", "videos of other kinds: convert them to mp4")
      for ending in ("Y4M", "vob", "asf", "m2v", "mxf", "f4v", "mpe", "ogg")),
    ("b.png", "pictures in no folder of their own"),
    *((name, "pictures of other kinds: convert them to png")
      for name in ("walk/3.tif", "other/1.TIFF", "other/1.exr", "b.apng"))])
def test_media_that_are_passed_over_are_said(tmp_path, capsys, name, why):
    """A picture of another kind between the frames of a video, or alone."""
    make(tmp_path, "a.mp4", "walk/1.png", "walk/2.png", name)
    found, _, said = read(tmp_path, capsys)
    assert found == ["a.mp4", "walk"] and said.count("not read are") == 1
    assert f"{name} ({why})" in said
    (tmp_path / "a.mp4").unlink()
    shutil.rmtree(tmp_path / "walk")
    if (tmp_path / name).exists():
        with pytest.raises(UsageError, match="no videos in"):
            read(tmp_path, capsys)
        assert f"{name} ({why})" in capsys.readouterr().out


@pytest.mark.parametrize("names", [
    ["1.png", "2.png", "10.png"], ["frame_1.jpg", "frame_2.JPG"],
    ["take2-005.png", "take2-010.png"]])
def test_numbered_pictures_are_a_video(tmp_path, capsys, names):
    make(tmp_path, *(f"walk/{name}" for name in names))
    assert read(tmp_path, capsys)[0] == ["walk"]


@pytest.mark.parametrize("pictures, found, said", [
    (["1.png", "2.png"], ["1.mp4", "2.mp4"], "not read are .*first .pictures with the names of"),
    (["1.png", "3.png"], ["1.mp4", "2.mp4", "first"], "first, beside the video files, are read")])
def test_first_frames_beside_videos(tmp_path, capsys, pictures, found, said):
    make(tmp_path, "1.mp4", "2.mp4", *(f"first/{name}" for name in pictures))
    names, _, words = read(tmp_path, capsys)
    assert names == found and re.search(said, words)


# ---------------------------------------------------------------- captions

COMPOSED, APART = (unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("video, written", [
    ("a.mp4", "a.mp4"), ("a.mp4", "videos/a.mp4"), ("a.mp4", "./a.mp4"), ("a.mp4", "a"),
    ("a.mp4", "videos\\a.mp4"), ("a.mp4", " a.mp4 "), ("a.mp4", "A.MP4"), ("A.MP4", "a.mp4"),
    ("A.MP4", "a"), ("a.b.mp4", "a.b"), (COMPOSED, APART), (APART, COMPOSED),
    (APART, COMPOSED[:-4].upper())])
def test_a_video_is_found_however_it_is_written(tmp_path, capsys, video, written):
    make(tmp_path, video, "other.mp4")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": written, "caption": "x"}))
    _, captions, said = read(tmp_path, capsys)
    assert captions == {video: "x"}
    assert "2 videos, 1 without a caption (other.mp4), 0 rows without a video" in said


@pytest.mark.parametrize("name, text", [
    ("captions.csv", "file,caption\na.mp4,red disc"),
    ("captions.csv", "File, Caption\na.mp4,red disc"),
    ("captions.csv", "file;caption\na.mp4;red disc"),
    ("captions.csv", 'file, caption, seen\na.mp4, "red disc", "yes, often"'),
    ("captions.csv", "file\tcaption\na.mp4\tred disc"),
    ("captions.csv", "\ufefffile,caption\r\na.mp4,red disc\r\n\r\n"),
    ("captions.csv", "\ufeffsep=;\r\nfile;caption\r\na.mp4;red disc\r\n"),
    ("captions.csv", "sep=,\nfile,caption\na.mp4,red disc"),
    ("captions.csv", '"sep=;"\nfile;caption\na.mp4;red disc'),
    ("captions.csv", "sep=\t\nfile\tcaption\na.mp4\tred disc"),
    ("captions.csv", "SEP=|\nfile|caption\na.mp4|red disc"),
    ("captions.csv", 'sep=;\n"file";"caption";"seen, or not"\na.mp4;red disc;1'),
    ("captions.csv", 'id,prompt,path\n3,"red disc",videos/a.mp4'),
    ("metadata.csv", "file_name,text\na.mp4,red disc"),
    ("metadata.jsonl", '{"file_name": "a.mp4", "text": "red disc"}\n'),
    ("captions.jsonl", '{"video": "a", "caption": "red disc"}'),
    ("a.txt", "red disc\n"), ("a.mp4.txt", "red disc"), ("A.TXT", "red disc")])
def test_captions_in_every_common_form(tmp_path, capsys, name, text):
    make(tmp_path, "a.mp4")
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    _, captions, said = read(tmp_path, capsys)
    assert captions == {"a.mp4": "red disc"}
    assert "1 videos, 0 without a caption, 0 rows without a video" in said


def test_what_fits_nothing_is_counted(tmp_path, capsys):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,x\nb.mp4,\nx.mp4,y\nz.mp4,y\n")
    (tmp_path / "licence.txt").write_text("of all of it")
    said = read(tmp_path, capsys)[2]
    assert ("3 videos, 2 without a caption (b.mp4, c.mp4), 2 rows without a video (x.mp4, z.mp4), "
            "1 text files beside no video (licence.txt)") in said
    make(tmp_path / "lists", "a.mp4", "prompts.csv", "captions.parquet")
    (tmp_path / "lists" / "Metadata.CSV").write_text("file,caption\na.mp4,x\n")
    assert ("1 videos, 0 without a caption, 0 rows without a video, 2 lists not read "
            "(captions.parquet, prompts.csv: ") in read(tmp_path / "lists", capsys)[2]
    make(tmp_path / "none", "a.mp4", "b.mp4")
    assert "2 videos, 2 without a caption, 0 rows" in read(tmp_path / "none", capsys)[2]


def test_a_row_of_a_deeper_video_is_not_of_one_here(tmp_path, capsys):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4", "sub/a.mp4", "sub/b.mp4")
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,red\nsub/a.mp4,blue square\n"
                                           f"{tmp_path}/sub/b.mp4,x\nsub/c.mp4,green\n")
    _, captions, said = read(tmp_path, capsys)
    assert captions == {"a.mp4": "red", "c.mp4": "green"} and "2 rows without a video" in said


def test_the_nearer_text_wins(tmp_path, capsys):
    """An exact name before one in another case, and a whole name before a stem."""
    make(tmp_path, "a.mp4", "B.mp4", "b.mp4", "walk/0.png",
         "walk/1.png")
    for name in ("a.txt", "a.mp4.txt", "B.txt", "b.txt", "walk.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,of the list\n")
    captions = read(tmp_path, capsys)[1]
    assert captions == {"a.mp4": "a.mp4.txt", "B.mp4": "B.txt", "b.mp4": "b.txt",
                        "walk": "walk.txt"}
    for blank in ("\n", " " * 4):  # but not an empty one
        (tmp_path / "a.mp4.txt").write_text(blank)
        assert read(tmp_path, capsys)[1]["a.mp4"] == "a.txt"


def test_an_empty_text_does_not_erase_a_caption(tmp_path, capsys):
    """Neither a file nor a field of a later list; without any other caption it stays empty."""
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4", "b.mp4.txt", "c.txt")
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "d.txt").write_text("of the text")
    (tmp_path / "metadata.csv").write_text("file,caption\na.mp4,x\nb.mp4,y\nd.mp4,z\n")
    (tmp_path / "captions.csv").write_text("file,caption\nb.mp4,\nd.mp4,\n")
    _, captions, said = read(tmp_path, capsys)
    assert captions == {"a.mp4": "x", "b.mp4": "y", "c.mp4": "", "d.mp4": "of the text"}
    assert "4 videos, 1 without a caption (c.mp4)" in said
    assert "2 empty text files, for which the lists count (a.txt, b.mp4.txt)" in said


@pytest.mark.parametrize("name, text, message", [
    ("captions.csv", "sep=;\nfile;caption\nb.mp4;x\na.mp4\n", "line 4, has 1 fields"),
    ("captions.csv", "sep=;\n", "is empty"),
    ("captions.csv", "file,caption\na.mp4,a red disc, moving left\n",
     "line 2, has 3 fields and the first line 2 columns: put a caption .* in double quotes"),
    ("captions.csv", "file,caption\nb.mp4,x\na.mp4\n", "line 3, has 1 fields"),
    ("captions.csv", "a.mp4,a red disc\n", "line 1, needs a file and a caption and has 'a.mp4',"),
    ("captions.csv", "file,words\na.mp4,x\n", "line 1, needs .* has 'file', 'words'"),
    ("captions.csv", "", "is empty"), ("captions.csv", " \n\n", "is empty"),
    ("captions.csv", 'file,caption\na.mp4,"red disc\nb.mp4,blue\n', "is not csv"),
    ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": "b.mp4"}',
     "line 2, needs a file"),
    ("captions.jsonl", '{"file": "a.mp4", "caption": 3}', "line 1, needs a text as file"),
    ("captions.jsonl", '\n["a.mp4", "x"]', "line 2, needs a file and a caption"),
    ("captions.jsonl", '{"file": "a.mp4",\n', "line 1, is not json"),
    ("captions.jsonl", "\n" + "[" * 100_000, "line 2, is not json"),
    ("captions.jsonl", r'{"file": "a.mp4", "caption": "red \ud83d"}',
     r"line 1, has '\\ud83d' in its caption, which is no character: write the caption again"),
    ("captions.csv", "file,caption\na.mp4,re\0d\n", r"line 2, has '\\x00' in its caption"),
    ("a.txt", "\0\0\0", r"a.txt has '\\x00' in its caption"),
    ("captions.csv", 'file,caption\n\nb.gif,"long,\nlonger"\na.mp4,"red\nb.mp4,blue"\n',
     "line 5, has a caption that goes on with the row of the next video: close its quote"),
    ("captions.csv", 'id,file,caption\n3,a,"red\n4,b,blue"\n', "line 2, has a caption that goes"),
    ("captions.csv", 'caption;file;seen\n"red;a.mp4;1\nblue";b.mp4;1\n', "line 2, has a caption"),
    ("captions.csv", "file,caption\na.mp4,x\nvideos/a.mp4,y\n",
     "two captions for a.mp4, in lines 2 and 3"),
    ("captions.csv", "file,caption\nb,x\n", '"b" can be b.gif, b.mp4: write the whole name')])
def test_lists_with_mistakes_are_one_sentence(tmp_path, name, text, message):
    make(tmp_path, "a.mp4", "b.mp4", "b.gif")
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        captions_in(tmp_path, videos_in(tmp_path))


def test_of_two_lists_that_differ_in_case_none_is_guessed(tmp_path):
    make(tmp_path, "a.mp4")
    for name in ("Captions.csv", "captions.csv"):
        (tmp_path / name).write_text(f"file,caption\na.mp4,{name}\n")
    if len(list(tmp_path.iterdir())) == 3:  # else the file system knows no case
        with pytest.raises(UsageError, match="has Captions.csv and captions.csv: remove one"):
            captions_in(tmp_path, videos_in(tmp_path))
