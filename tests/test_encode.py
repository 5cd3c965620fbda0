"""Encoding that is interrupted, repeated, or given other inputs: nothing lost, nothing mixed.

The models are stand-ins, a "video" is a file with the number of its frames."""

from pathlib import Path
from types import SimpleNamespace

import json
import os

import pytest
import torch

from scale import encode
from utils import files
from utils.errors import UsageError
from utils.files import clips_in, read_tensors


MIB = 2 ** 20


class Vae:
    """One latent, everywhere what its weights say."""

    def __init__(self, path, device="cpu"):
        self.value = float((Path(path) / "model.safetensors").read_text())

    def encode(self, x):
        assert (x == -1).all()  # black, of [-1, 1]
        return torch.full((1, 2, 1, 1, 1), self.value)


class Words:
    """A caption's length."""
    length = 9

    def __init__(self, path, device="cpu"):
        pass

    def encode(self, caption):
        return torch.full((min(self.length, len(caption.split()) + 1), 2), float(len(caption)))


def frames(path, size, fps=0.0):
    """As many frames as the file says, after which a broken one stops."""
    number, _, broken = path.read_text().partition(" ")
    yield from torch.zeros(int(number), 3, 16, 16)
    if broken:
        raise UsageError(f"{path} cannot be read as a video")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that encodes the videos of tmp_path/clips and gives the names of the clips made
    by this call, and what was said."""
    for name, value in (("WanCodec", Vae), ("CaptionEncoder", Words), ("iter_frames", frames)):
        monkeypatch.setattr(encode, name, value)
    for folder in ("clips", "vae", "umt5"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text("1")
    (tmp_path / "clips" / "model.safetensors").unlink()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    (tmp_path / "umt5" / "config.json").write_text('{"model_type": "umt5"}')
    (tmp_path / "umt5" / "tokenizer.json").touch()

    def call(*more):
        before = {p: p.stat().st_mtime_ns for p in clips_in(tmp_path / "out")}
        encode.main(["--videos", str(tmp_path / "clips"), "--out", str(tmp_path / "out"), "--vae",
                     str(tmp_path / "vae"), "--text-encoder", str(tmp_path / "umt5"), "--size",
                     "16x16", "--frames", "5", *more])
        made = [p.name for p in clips_in(tmp_path / "out") if before.get(p) != p.stat().st_mtime_ns]
        return [name.removesuffix(".safetensors") for name in made], capsys.readouterr().out

    return call


@pytest.fixture
def write(run, tmp_path):
    """A function that encodes captions, by default into the folder where videos go."""
    def call(*captions, out="out"):
        (tmp_path / "prompts.txt").write_text("\n".join(captions))
        encode.main(["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / out),
                     "--text-encoder", str(tmp_path / "umt5")])
        return [read_tensors(p)["text"][0, 0] for p in clips_in(tmp_path / out)]

    return call


def test_a_bad_video_leaves_the_clips_of_others(run, tmp_path):
    """`dog` is too short, and begins as dog-agility and dog-0000.mp4 do."""
    videos = {"dog.mp4": "3", "dog.mp4-agility.mp4": "10", "dog.mp4-0000.mp4": "5"}
    for name, number in videos.items():
        (tmp_path / "clips" / name).write_text(number)
    expected = ["dog.mp4-0000.mp4-0000", "dog.mp4-agility.mp4-0000", "dog.mp4-agility.mp4-0001"]
    assert run()[0] == expected
    made, said = run()
    assert made == [] and "3 clips" in said and "skipped" in said
    assert len(clips_in(tmp_path / "out")) == 3


def test_what_has_changed_is_made_again(run, tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "out"
    for name in "abc":
        (clips / f"{name}.mp4").write_text("10")
    assert len(run()[0]) == 6
    assert run()[0] == []
    (clips / "a.txt").write_text("red")  # a caption
    made, said = run()
    assert made == ["a.mp4-0000", "a.mp4-0001"] and "1 videos were made again" in said
    assert read_tensors(out / "a.mp4-0000.safetensors")["text"][0, 0] == 3
    (clips / "b.mp4").write_text("05")  # another video of the same name and length of file
    assert run()[0] == ["b.mp4-0000"]
    assert not (out / "b.mp4-0001.safetensors").exists()  # of the longer one before
    (clips / "c.mp4").unlink()
    made, said = run()
    assert made == [] and "also holds clips of 1 videos that are not in" in said
    assert "(c.mp4)" in said and len(clips_in(out)) == 5  # said, and not lost
    (clips / "b.mp4").write_text("10 broken")
    made, said = run()
    assert made == [] and "skipped: " in said and len(clips_in(out)) == 4
    (out / "a.mp4-0000.safetensors").unlink()
    (out / "a.mp4-0001.safetensors").unlink()  # lost with the marker still there
    assert len(run()[0]) == 2


@pytest.mark.parametrize("damage, older", [
    (lambda clip: clip.unlink(), False),
    (lambda clip: clip.rename(clip.with_name("a.mp4-0007.safetensors")), False),
    (lambda clip: clip.write_bytes(clip.read_bytes()[:-1]), False),
    (lambda clip: clip.write_bytes(b""), True)])
def test_a_clip_that_is_lost_or_cut_is_made_again(run, tmp_path, damage, older):
    """One of three, at the end or in the middle; of an older version's folder what can be known."""
    (tmp_path / "clips" / "a.mp4").write_text("15")
    made = run()[0]
    marker = tmp_path / "out" / "done" / "a.mp4"
    for name in made[1:]:
        if older:
            as_of_an_older_version(marker, tmp_path / "clips" / "a.mp4")
        assert run()[0] == []
        damage(tmp_path / "out" / f"{name}.safetensors")
        assert run()[0] == made and run()[0] == []
    assert len(clips_in(tmp_path / "out")) == 3


def as_of_an_older_version(marker, video):
    """Leave in a marker what was written before clips were counted."""
    made = json.loads(marker.read_text())
    del made["clips"], made["source"]
    marker.write_text(json.dumps({**made, "video": files.content_of(video, 2 ** 16)}))


def test_a_video_that_changed_between_its_ends_is_made_again(run, tmp_path, monkeypatch):
    """A megabyte, of which one byte between beginning and middle is another one by now."""
    monkeypatch.setattr(encode, "iter_frames", lambda *_: iter(torch.zeros(5, 3, 16, 16)))
    video, marker = tmp_path / "clips" / "a.mp4", tmp_path / "out" / "done" / "a.mp4"
    video.write_bytes(bytes(MIB))
    assert len(run()[0]) == 1
    as_of_an_older_version(marker, video)
    assert run()[0] == [] and "clips" not in json.loads(marker.read_text())  # it is accepted
    marker.unlink()
    assert len(run()[0]) == 1
    video.write_bytes(bytes(MIB // 5) + bytes([1]) + bytes(MIB - MIB // 5 - 1))
    assert len(run()[0]) == 1 and run()[0] == []


def test_another_folders_video_of_the_same_name_is_refused(run, tmp_path):
    """It would take the first one's clips away. Copied, moved or changed in place it is not."""
    clips, other = tmp_path / "clips", tmp_path / "other"
    other.mkdir()
    (clips / "a.mp4").write_text("10")
    for name in ("a.mp4", "b.mp4"):
        (other / name).write_text("5")
    assert run()[0] == ["a.mp4-0000", "a.mp4-0001"]
    with pytest.raises(UsageError, match="a.mp4 is another video of that name: choose another --o"):
        run("--videos", str(other))
    assert len(clips_in(tmp_path / "out")) == 2
    (other / "a.mp4").write_text("10")
    assert run("--videos", str(other))[0] == ["b.mp4-0000"]  # a copy
    other.rename(tmp_path / "moved")
    assert run("--videos", str(tmp_path / "moved"))[0] == []
    (tmp_path / "moved" / "a.mp4").write_text("5")
    assert run("--videos", str(tmp_path / "moved"))[0] == ["a.mp4-0000"]
    (tmp_path / "moved" / "a.mp4").unlink()
    assert len(run()[0]) == 2  # the old one is gone


def test_two_calls_do_not_write_to_one_folder(run, tmp_path, monkeypatch):
    """The second one begins while the first is in its first video."""
    (tmp_path / "clips" / "a.mp4").write_text("5")

    class Twice(Vae):
        def encode(self, x):
            with pytest.raises(UsageError, match="another scale.encode is writing to .*: wait"):
                run("--fps", "3")
            return super().encode(x)

    monkeypatch.setattr(encode, "WanCodec", Twice)
    assert run()[0] == ["a.mp4-0000"]


@pytest.mark.parametrize("folder, message", [
    ("vae", "was made with another vae than"), ("umt5", "was made with another text encoder than")])
def test_other_models_are_not_mixed_in(run, tmp_path, folder, message):
    (tmp_path / "clips" / "a.mp4").write_text("5")
    run()
    (tmp_path / folder / "model.safetensors").write_text("2")
    with pytest.raises(UsageError, match=message):
        run()
    (tmp_path / folder / "model.safetensors").write_text("1")
    with pytest.raises(UsageError, match="made with 16x16 5 frames 16 fps, now it is 16x16 9"):
        run("--frames", "9")
    assert run()[0] == []


def test_a_download_and_its_parts_are_the_same_models(run, tmp_path):
    """Named together or one by one; another tokenizer is another text encoder."""
    root = tmp_path / "wan"
    (root / "tokenizer").mkdir(parents=True)
    (tmp_path / "vae").rename(root / "vae")
    (tmp_path / "umt5").rename(root / "text_encoder")
    (root / "text_encoder" / "tokenizer.json").rename(root / "tokenizer" / "tokenizer.json")

    def content(vae=root, text_encoder=root):
        return encode.content_of_models(SimpleNamespace(vae=vae, text_encoder=text_encoder))

    parts = content(root / "vae", root / "text_encoder")
    assert content() == parts
    (root / "transformer").mkdir()
    (root / "transformer" / "w.safetensors").touch()
    assert content() == parts  # the network has no part in it
    (root / "tokenizer" / "tokenizer.json").write_text("other")
    assert content()["vae"] == parts["vae"]
    assert content()["text encoder"] != parts["text encoder"]


def test_an_interrupted_video_leaves_no_clips_of_other_settings(run, tmp_path, monkeypatch):
    """Killed after its second clip, then called with longer clips."""
    (tmp_path / "clips" / "a.mp4").write_text("20")
    save = encode.save_finite

    def killed(path, tensors):
        if path.name.endswith("-0002.safetensors"):
            raise KeyboardInterrupt
        save(path, tensors)

    monkeypatch.setattr(encode, "save_finite", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(encode, "save_finite", save)
    assert len(clips_in(tmp_path / "out")) == 2
    run("--frames", "17")
    assert [p.name for p in clips_in(tmp_path / "out")] == ["a.mp4-0000.safetensors"]


def test_a_folder_of_an_older_version_is_made_again(run, tmp_path):
    (tmp_path / "clips" / "a.mp4").write_text("5")
    run()
    (tmp_path / "out" / "done" / "a.mp4").write_text("16x16 5 frames 16 fps")
    assert run()[0] == ["a.mp4-0000"]


def test_a_name_that_is_too_long_is_skipped_and_listed(run, tmp_path):
    for name in ("a.mp4", "b" * 238 + ".mp4", "é" * 120 + ".mp4", "z.mp4"):
        (tmp_path / "clips" / name).write_text("5")
    made, said = run()
    assert made == ["a.mp4-0000", "z.mp4-0000"]
    assert said.count("skipped: ") == 2 and said.count("use a shorter one") == 2


def test_a_name_that_is_no_utf8_is_skipped_and_listed(run, tmp_path):
    """Of an archive from elsewhere: safetensors could not be read under it."""
    for name in (b"a.mp4", b"\xb0\xa1.mp4"):
        with open(os.fsencode(tmp_path / "clips") + b"/" + name, "w") as file:
            file.write("5")
    made, said = run()
    assert made == ["a.mp4-0000"] and "is no name in UTF-8: rename it" in said


def test_latents_that_are_not_finite_are_not_written(run, tmp_path):
    (tmp_path / "clips" / "a.mp4").write_text("5")
    (tmp_path / "vae" / "model.safetensors").write_text("nan")
    with pytest.raises(UsageError, match="a.mp4-0000.safetensors is not written, its latents"):
        run()
    assert not clips_in(tmp_path / "out")


def test_nothing_usable_is_an_error(run, tmp_path):
    (tmp_path / "clips" / "a.mp4").write_text("3")
    with pytest.raises(UsageError, match="holds no clip: none of 1 videos"):
        run()


def test_the_negative_prompt_stays_the_one_that_was_named(run, tmp_path):
    (tmp_path / "clips" / "a.mp4").write_text("5")
    for flags, length in (((), 0), (("--negative", "blur"), 4), ((), 4), (("--negative", ""), 0)):
        run(*flags)
        text = read_tensors(tmp_path / "out" / "negative" / "text.safetensors")["text"]
        assert text[0, 0] == length


def test_only_ends_of_lines_end_a_prompt(tmp_path):
    """Not U+2028, a vertical tab, a form feed or NEL inside it."""
    texts = ["one\u2028two", "three\x0bfour\x0cfive", "six\x85seven"]
    (tmp_path / "prompts.txt").write_text("\r\n".join(texts) + "\n", "utf-8", newline="")
    args = encode.arguments(["--prompts", str(tmp_path / "prompts.txt"), "--out",
                             str(tmp_path / "out"), "--text-encoder", "t", "--device", "cpu"])
    assert encode.inputs(args) == ([], texts)


def test_captions_of_two_encoders_are_not_mixed(write, tmp_path, monkeypatch):
    """Not in a folder that an interrupted call has left, either."""
    encoder = tmp_path / "umt5" / "model.safetensors"
    assert write("red", "disc") == [3, 4]
    (tmp_path / "out" / "done" / "prompts").unlink()  # as an older version leaves it
    assert write("red", "disc", "blue") == [3, 4, 4]
    encoder.write_text("2")
    with pytest.raises(UsageError, match="was made with another text encoder than .*: choose anot"):
        write("red", "disc", "blue")
    encode_negative = encode.encode_negative
    monkeypatch.setattr(encode, "encode_negative", lambda *_: 1 / 0)  # stopped as it begins
    with pytest.raises(ZeroDivisionError):
        write("red", out="new")
    monkeypatch.setattr(encode, "encode_negative", encode_negative)
    assert write("red", out="new") == [3]
    encoder.write_text("1")
    with pytest.raises(UsageError, match="was made with another text encoder"):
        write("red", out="new")


def test_captions_alone_and_clips_have_folders_of_their_own(run, write, tmp_path):
    """Whichever came first, and also where only a clip or only its marker is left."""
    (tmp_path / "clips" / "prompts.mp4").write_text("5")
    write("red", out="texts")
    with pytest.raises(UsageError, match="texts holds captions alone .*: choose another --out"):
        run("--out", str(tmp_path / "texts"))
    run()
    marker = tmp_path / "out" / "done" / "prompts.mp4"
    for left in (marker, marker.rename(marker.with_name("prompts")), *clips_in(tmp_path / "out")):
        with pytest.raises(UsageError, match="holds clips of videos .*: choose another --out"):
            write("red", "disc")
        left.unlink(missing_ok=True)
    assert write("red", "disc") == [3, 4]


@pytest.mark.parametrize("place", ["a.txt", "a.txt/b", "a.txt/b/c", "link"])
def test_a_file_in_the_way_of_a_folder_is_said(tmp_path, place):
    (tmp_path / "a.txt").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="cannot write .* a part of the path is a file"):
        files.check_writable(tmp_path / place / "x.mp4")


def test_content_tells_files_and_folders_apart(tmp_path):
    """Size, beginning, middle, end and names count; where it lies and hidden files do not."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "w.safetensors").write_bytes(bytes(5 * MIB))
    assert files.content_of(a) == files.content_of(b)
    (b / ".cache").write_text("x")
    assert files.content_of(a) == files.content_of(b)
    seen = {files.content_of(a)}
    for place in (0, 5 * MIB // 2, 5 * MIB - 1):
        changed = bytearray(5 * MIB)
        changed[place] = 1
        (b / "w.safetensors").write_bytes(changed)
        seen.add(files.content_of(b))
    (a / "w.safetensors").rename(a / "v.safetensors")
    seen.add(files.content_of(a))
    assert len(seen) == 5 and files.content_of(tmp_path / "nowhere") == ""


def test_captions_that_are_cut_are_said(run, tmp_path):
    for name, words in (("a", 3), ("b", 20)):
        (tmp_path / "clips" / f"{name}.mp4").write_text("5")
        (tmp_path / "clips" / f"{name}.txt").write_text(name + " red" * words)
    said = run()[1]
    assert '1 captions fill all 9 tokens, and what is longer is cut: "b red' in said
