"""Every command of README and docs, the tables, and the house's own rules."""

import contextlib
import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import data
import sample
import train
from experiments import ablations, bench, evaluate, figures, plan, ship
from scale import encode
from tests.common import (HERE, SMALL, WAN, colour_clip, several_processes, shell,
                          small_vae_and_text_encoder, small_wan)
from utils import runs
from utils.errors import UsageError


PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]


def readme_commands():
    """Every line of every bash block of README and docs, once."""
    blocks = [b for page in PAGES for b in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    return list(dict.fromkeys(line for block in blocks for line in block.strip().splitlines()))


MAINS = {"train.py": train.main, "sample.py": sample.main, "data.py": data.main,
         "experiments/evaluate.py": evaluate.main, "experiments/ablations.py": ablations.main,
         "experiments/figures.py": figures.main, "experiments/plan.py": plan.main,
         "experiments/bench.py": bench.main, "experiments/ship.py": ship.main,
         "scale.encode": encode.main}


def run_readme_command(command, status, cwd):
    """A command of the README: python's in this process, which saves starting it, pytest's and the
    first torchrun's in their own."""
    # a small Wan: on as many processes, but without torchrun's start
    if command[0] == "torchrun" and "--preset" in command:
        several_processes(2, cwd, *command[command.index("train.py") + 1 :])
        return
    if command[0] != "python":
        shell(*command, cwd=cwd, status=status)
        return
    command = [word for word in command if word != "-m"]
    try:
        MAINS[command[1]](command[2:])
        left = 0
    except SystemExit as stop:
        left = stop.code or 0
    except UsageError:
        left = 2
    assert left == status, command


def check_table(command, said):
    """The README's measuring commands print what they should: all rows, and a plan that agrees with
    a real step."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()
            if line.startswith("| ")][1:]
    text = " ".join(command)
    if "bench.py stream" in text:
        kinds = [[steps, how] for steps in "14" for how in ("yes", "reused")]
        assert [row[:4] for row in rows] == [["toy", "8 x 8", *kind] for kind in kinds]
        # 2.5 and more by CPU time, however busy the machine is
        assert float(re.search(r"1 against 4 passes ([\d.]+) times", said)[1]) > 2
        assert "by CPU time" in said and "by the wall" in said
    elif "bench.py step" in text:
        assert [row[:2] for row in rows] == [["toy", "2"], ["toy", "3"]]
        assert all(0.85 < float(row[-1]) < 1.15 for row in rows)
    elif "bench.py load" in text:
        assert [row[:3] for row in rows] == [["toy", "1", "0.005"], ["toy", "2", "0.002"]]
    elif "--plan" in command:
        assert [row[:3] for row in rows] == [["wan-14b", "3", "64"]] and "PFLOP" in said
    elif "--table" in command and "experiments/plan.py" in command:
        sizes = [row[0] + row[2] for row in rows]
        assert sizes == ["wan-1.3b1", "wan-1.3b8", "wan-14b8", "wan-14b64"]


def shortened(line, folder, wan):
    """A line of the README as (command that is over in seconds, exit status); None for pip. `wan`:
    is the extra installed?"""
    latents = "encoded" if "scale.encode" in line else "latents"
    for word, ours in (("pip install -r requirements.txt && ", ""), ("DIR_OF_MP4", "clips"),
                       ("PROMPTS.txt", "prompts.txt"), ("DIR_OF_WAN", "wan"),
                       ("DIR_OF_VAE", "vae"), ("DIR_OF_UMT5", "umt5"), ("DIR_OF_TEXTS", "texts"),
                       ("DIR_OF_LATENTS", latents), ("nproc_per_node 8", "nproc_per_node 2")):
        line = line.replace(word, ours)
    if "bench.py load" in line:
        line = line.replace("wan-1.3b", "toy")
    command = shlex.split(line, comments=True)
    script = next((word for word in command if word.endswith(".py")), "")
    quiet = {"--tag", "--recipe", "torchrun"} & set(command)
    scores = ["--eval-clips", "0", "--samples", "0"] if quiet else ["--eval-clips", "2",
                                                                    "--samples", "2"]
    more = {"train.py": [*SMALL, "--iters", "2", *scores],
            "experiments/evaluate.py": ["--clips", "2"],
            "experiments/figures.py": ["--assets", str(folder / "pictures")],
            "experiments/ship.py": ["--assets", str(folder / "pictures")],
            "experiments/ablations.py": ["--print", "--out", str(folder / "table")]}.get(script, [])
    if "wan-1.3b" in command or "wan-14b" in command:
        # captions alone do not tell it
        more = [*WAN[2:], *(["--latent-size", "8", "8"] if "out/wan-texts" in command else [])]
    if "--plan" in command or script == "experiments/plan.py":
        more = [*WAN[2:], "--batch-size", "64", "--stage", "3"]  # of 64 devices
    if script == "sample.py" and "--vae" in command:
        more = ["--size", "32x48"]
    elif "scale.encode" in command and "--videos" in command:
        more = ["--size", "32x48", "--frames", "9", "--fps", "0"]
    elif "bench.py stream" in line:
        more = ["--rounds", "2", "--seconds", "0.1"]
    elif "bench.py step" in line:
        more = SMALL
    if command[0] == "torchrun":
        command[1:1] = ["--master_port", "29513"]
    # this very run, and one that has tests of its own
    if command[0] in ("pip", "pytest") or script == "experiments/live.py":
        return None
    drawn = script == "experiments/figures.py" and importlib.util.find_spec("matplotlib") is None
    return command + more, 2 if "umt5" in command and not wan or drawn else 0


def part_of_the_readme(line):
    """Which of the three tests runs a line: what measures, what is about Wan, or the toy (which
    includes the tests and your own clips)."""
    if "bench.py" in line or "plan" in line:
        return "measuring"
    return "wan" if re.search("wan|WAN|UMT5|encode", line) else "toy"


@pytest.mark.parametrize("part, least, leaves", [
    ("toy", 11, ("out/toy/stage3/samples.gif", "sample.gif", "out/mine/stage3/samples.gif")),
    ("wan", 5, ("out/wan/stage3/ema.safetensors", "out/wan-texts/stage1/ema.safetensors")),
    pytest.param("measuring", 5, (), marks=pytest.mark.slow)])
def test_readme_commands_run(part, least, leaves, quick_scores, tmp_path, monkeypatch, capfd):
    """All of them, in the README's order, with flags appended that make them short."""
    for name in ("*.py", "experiments", "assets", "goldens", "README.md", "pyproject.toml", "docs",
                 "scale", "utils", "tests"):
        for path in HERE.glob(name):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    colour_clip(tmp_path / "clips", "a.mp4", frames=20)
    (tmp_path / "prompts.txt").write_text("red disc\n")
    small_wan(tmp_path)
    wan = importlib.util.find_spec("diffusers") is not None  # requirements-wan.txt is there
    if wan:
        small_vae_and_text_encoder(tmp_path)
    else:  # what the encoder would have made
        (tmp_path / "texts").mkdir()
        save_file({"text": torch.randn(4, 8)}, tmp_path / "texts" / "0.safetensors")
    for folder in (tmp_path / "table/seed0/stage2", tmp_path / "out/table/seed0/stage2"):
        folder.mkdir(parents=True)
        scores = {"quality_error": 0.1, "energy": 0.2, "spread": 0.5}
        (folder / "scores-report.json").write_text(json.dumps(scores))
    commands = [short for line in readme_commands() if part_of_the_readme(line) == part
                and (short := shortened(line, tmp_path, wan))]
    for command, status in commands:
        run_readme_command(command, status, tmp_path)
        check_table(command, capfd.readouterr().out)
    assert len(commands) >= least and all((tmp_path / name).is_file() for name in leaves)


def test_every_file_of_the_readme_exists():
    for path in re.findall(r"\((assets/[^)]+)\)", (HERE / "README.md").read_text()):
        assert (HERE / path).is_file(), path
    names = re.findall(r"`(losses|train|sample|model|discriminator|data)\.([A-Za-z_]+)`",
                       (HERE / "README.md").read_text())
    for module, name in names:
        assert name == "py" or hasattr(sys.modules[module], name), f"{module}.{name}"


def test_a_mean_of_fewer_seeds_names_them():
    scores = {name: {"quality_error": [0.1] * len(seeds), "seeds": seeds}
              for name, seeds in (("all", [0, 1, 2]), ("two", [0, 2]), ("one", [1]))}
    rows = ablations.table(scores).splitlines()[2:]
    assert [row.split(" |")[0] for row in rows] == ["| all", "| two (seeds 0, 2)", "| one (seed 1)"]


def test_ablations_say_which_seed_failed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablations.main(["--out", str(tmp_path), "--seed", "1"])
    assert stop.value.code == 2 and "are chosen by this script" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--seed 0 .* failed: see the end of .*seed0/output.log"):
        ablations.main(["--out", str(tmp_path), "--seeds", "0", "--size", "7"])
    assert "error: --size 7" in (tmp_path / "seed0" / "output.log").read_text()
    with pytest.raises(UsageError, match="nothing finished"):
        ablations.main(["--out", str(tmp_path), "--print"])


def test_ratios_of_two_rows():
    """Of means; of jitter's distances from the real clips'. Nothing is said of what one row
    lacks."""
    scores = {row: {**{name: [value] * 2 for name in ablations.COLUMNS}, "seeds": [0, 1]}
              for row, value in (("a", 1.0), ("b", 4.0))}
    assert "error 0.25," in ablations.ratios(scores, "a", "b")
    assert "jitter 0.25," in ablations.ratios(scores, "a", "b")
    scores[ablations.REAL.name] = {"jitter": [0.9, 0.9]}
    assert "jitter 0.0323," in ablations.ratios(scores, "a", "b")  # 0.1 / 3.1
    scores["b"]["drift"] = [0.0, 0.0]  # of a student that stands still
    assert "drift" not in ablations.ratios(scores, "a", "b")
    assert not ablations.ratios(scores, "a", "c")
    scores["a"]["energy"] = []  # of one's own clips nobody knows the futures
    assert "energy" not in ablations.ratios(scores, "a", "b")
    scores["a"]["seeds"] = [0]
    assert not ablations.ratios(scores, "a", "b")  # of other seeds


def test_every_row_of_the_tables_can_be_trained():
    """Its flags are known and its settings fit; it comes after the row that it starts from; a
    folder always means the same training."""
    seen = {}
    for rows in ablations.TABLES.values():
        assert len({row.name for row in rows}) == len(rows)
        for row in (row for row in rows if row.folder != "real"
                    and (row.folder not in seen or row != seen[row.folder])):
            stage, _, tag = row.folder.removeprefix("stage").partition("-")
            flags = ["--stage", stage, "--out", "out/toy", "--tag", tag]
            flags += row.flags.format(out="out/toy").split()
            cfg = train.make_config(train.parse(flags), int(stage))
            start, _ = runs.start_from(cfg)
            assert runs.stage_dir(cfg).name == row.folder
            assert cfg.iters > cfg.student_start * (cfg.stage > 1)
            assert row.after == (row.folder if row.steps else start.name
                                 if runs.starts_from_weights(cfg) else "")
            if not row.steps:
                assert row.folder not in seen
                seen[row.folder] = row
    assert {row.after for row in seen.values()} <= {"", *seen}


def test_the_tables_control_is_that_of_training():
    """As many student's steps as stage 3, and the settings of train.py --control."""
    three = train.make_config(train.parse(["--out", "out/toy"]), 3)
    ours = train.parse(["--tag", "control", *ablations.CONTROL.flags.format(out="out/toy").split()])
    steps = three.iters - three.student_start
    assert ours == dict(tag="control", init="out/toy/stage2", student_start=0, stop_spread=0.0,
                        iters=steps)


def test_a_small_table(small_run, quick_scores, tmp_path, monkeypatch, capsys):
    """Rows are trained after what they start from, scored on the clips for tables and printed when
    they are known; a second call does nothing."""
    done, mains = [], {"train.py": train.main, "ablations.py": ablations.main}

    def run(command, folder, threads):
        done.append(f"{Path(command[0]).name} {command[2]}".replace(str(tmp_path), ""))
        mains[Path(command[0]).name](command[1:])

    shutil.copytree(small_run, tmp_path / "seed0")  # its stages are kept
    monkeypatch.setattr(ablations, "run", run)
    # training takes signals
    monkeypatch.setattr(ablations, "ThreadPoolExecutor",
                        lambda jobs: contextlib.nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setitem(ablations.TABLES, "small",
                        [ablations.REAL, ablations.CONTROL,
                         ablations.Row("at 2 passes", "stage2", after="stage2", steps=(2,))])
    command = ["--table", "small", "--out", str(tmp_path), "--seeds", "0",
               *"--clips 2 --jobs 1 --iters 3".split(), *SMALL]
    ablations.main(command)
    scored = "ablations.py /seed0/{}/scores-report{}.json".format
    assert done == ["train.py 0", scored("stage0", ""), scored("real", ""), "train.py 0",
                    scored("stage0-causal-teacher", ""), "train.py 1", scored("stage1", ""),
                    "train.py 2", scored("stage2", ""), "train.py 2",
                    scored("stage2-control", ""), "train.py 2", scored("stage2", "-steps2")]
    said = capsys.readouterr().out
    names = [ablations.REAL.name, ablations.CONTROL.name, "at 2 passes"]
    assert all(f"seed 0: | {name} |" in said and f"\n| {name} |" in said for name in names)
    student, again, real = (json.loads((tmp_path / f"seed0/{name}.json").read_text()) for name in (
        "stage2/scores-report", "stage2/scores-report-steps2", "real/scores-report"))
    assert [student["steps"], again["steps"]] == ["1", "2"] and real["held_out"] == "report"
    last = said.splitlines()[-len(names):]
    for again in (command, [*command[:6], "--print"]):
        ablations.main(again)
        assert len(done) == 13
        assert last == capsys.readouterr().out.splitlines()[-len(names):]


@pytest.mark.slow
def test_a_table_in_processes_of_its_own(tmp_path, monkeypatch, capsys):
    """Two seeds side by side, from nothing."""
    monkeypatch.setitem(ablations.TABLES, "small", [ablations.REAL, ablations.STAGE2])
    flags = "--table small --seeds 0 1 --clips 2 --iters 3"
    ablations.main([*flags.split(), "--out", str(tmp_path), *SMALL])
    said = capsys.readouterr().out
    assert all(f"seed {seed}: | stage 2 |" in said for seed in (0, 1))
    assert re.search(r"\n\| stage 2 \| [\d.e+-]+ \([\d.e+-]+\) \|", said)


@pytest.mark.slow
def test_shortened_recipe_end_to_end(tmp_path):
    """The default recipe, shortened to a few minutes: the teacher learns to move and to turn, stage
    2 mends what stage 1 breaks."""
    out = ["--out", str(tmp_path), "--eval-clips", "64"]
    for flags in ("0 --iters 800", "0 --recipe causal-teacher --iters 100",
                  "1 --iters 150 --trajectories 256", "2 --iters 120",
                  "3 --iters 80 --student-start 40"):
        train.main([*out, "--stage", *flags.split()])
    real, *scores = (json.loads((tmp_path / name / "metrics.json").read_text())
                     for name in ("real", "stage0", "stage1", "stage2", "stage3"))
    assert scores[0]["caption_agreement"] > 0.6 and scores[0]["quality_error"] < 0.15
    assert scores[0]["spread"] > 0.4
    assert scores[2]["error_growth"] < scores[1]["error_growth"]
    assert scores[3]["displacement"] > 0.5 and scores[3]["quality_error"] < 0.3
    assert scores[3]["spread"] > 0.2
    assert all(abs(real["energy"]) < 0.05 < row["energy"]
               and real["quality_error"] < row["quality_error"] for row in scores)
