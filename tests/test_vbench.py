"""The folder that VBench-I2V reads."""
import json
from dataclasses import fields

import pytest
from PIL import Image

import model as M
from experiments import evaluate, vbench
from tests.common import network, small_run, small_vae_and_text_encoder, tiny, write_official
from utils import media
from utils.errors import UsageError

PROMPTS = {"a red disc.": "1.jpg", "a disc, camera pans left": "2.jpg"}


@pytest.fixture
def suite(tmp_path):
    """VBench's files: rows of several dimensions, images in a folder named by their shape."""
    images = tmp_path / "crop" / "7-4"
    images.mkdir(parents=True)
    rows = []
    for i, (prompt, name) in enumerate(PROMPTS.items()):
        Image.new("RGB", (70, 40), (200 - 90 * i, 60, 60)).save(images / name)
        rows.append({"prompt_en": prompt, "image_name": name, "dimension": ["i2v_subject"]})
    (tmp_path / "info.json").write_text(json.dumps([*rows, rows[0]]))
    return tmp_path


def flags(folder, weights, **more):
    """The command line."""
    options = {"vbench": folder / "videos", "vbench-info": folder / "info.json", "vbench-images":
               folder / "crop" / "7-4", "vae": folder / "vae", "text-encoder": folder / "umt5",
               "size": "32x48", "preset": "wan-1.3b", "device": "cpu", "steps": 1, **more}
    return [str(weights), *(str(word) for name, value in options.items() if value
                            for word in (f"--{name}", value))]


@pytest.fixture
def student(suite, monkeypatch):
    """Official weights of a tiny student."""
    cfg = tiny(precondition=False)
    shape = {field.name: getattr(cfg, field.name) for field in fields(M.Config)}
    monkeypatch.setitem(M.PRESETS, "wan-1.3b", shape)
    return write_official(suite / "wan", "generator_ema", network(cfg))


def test_the_folder(suite, student, capsys):
    """Five videos of every prompt, each of its own seed; a second call goes on; other settings are
    refused."""
    small_vae_and_text_encoder(suite)
    evaluate.main(flags(suite, student))
    names = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(5)}
    assert {path.name for path in (suite / "videos").iterdir()} == names
    said = capsys.readouterr().out
    assert "10 videos made, 10 in all" in said and "--ratio 7-4" in said
    assert f'--videos_path "{suite / "videos"}" --dimension $dimension' in said
    paths = [suite / "videos" / f"a red disc.-{i}.mp4" for i in range(5)]
    clips = [media.read_video(path, (32, 48)) for path in paths]
    assert {len(clip) for clip in clips} == {1 + 4 * 6}
    assert len({clip.numpy().tobytes() for clip in clips}) == 5
    gone = suite / "videos" / "a red disc.-3.mp4"
    gone.unlink()
    download = suite / "download"  # one folder for both
    download.mkdir()
    for part, source in (("vae", "vae"), ("text_encoder", "umt5"), ("tokenizer", "umt5")):
        (download / part).symlink_to(suite / source)
    evaluate.main(flags(suite, student, wan=download, vae=None, **{"text-encoder": None}))
    assert "1 videos made" in capsys.readouterr().out
    assert (media.read_video(gone, (32, 48)) == clips[3]).all()
    with pytest.raises(UsageError, match="made with another passes"):
        evaluate.main(flags(suite, student, steps=2))


def test_what_cannot_be_made_is_said_first(suite, student, small_run):
    for more, message in (({"vbench-info": None}, "--vbench needs --vbench-info"),
                          ({"vbench-images": suite}, "1.jpg is not there"),
                          ({"vbench-info": suite / "none"}, "does not exist"),
                          ({"vae": None}, "add --wan, or --vae and --text-encoder")):
        with pytest.raises(UsageError, match=message):
            evaluate.main(flags(suite, student, **more))
    with pytest.raises(UsageError, match="VBench is for Wan students"):
        evaluate.main(flags(suite, small_run / "stage3", preset=None))
    for rows, message in (([{"prompt": "a"}], "no list of prompt_en"), ([], "no list"), (
            [{"prompt_en": "a/b", "image_name": "1.jpg"}], "cannot be a file name"), (
            [{"prompt_en": "a", "image_name": f"{i}.jpg"} for i in (1, 2)], "two images")):
        (suite / "info.json").write_text(json.dumps(rows))
        with pytest.raises(UsageError, match=message):
            evaluate.main(flags(suite, student))
    assert not (suite / "videos").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.mp4").touch()
    with pytest.raises(UsageError, match="not empty and not from this command"):
        vbench.claim(tmp_path / "mine", {"size": 1})


def test_ratios():
    assert vbench.ratio_of("crop/16-9", (480, 832)) == "16-9"
    assert vbench.ratio_of("crop/mine", (480, 832)) == "7-4"
    assert vbench.ratio_of("crop/mine", (512, 512)) == "1-1"
