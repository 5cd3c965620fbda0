"""Folders of a run: <out>/stageN or <out>/stageN-TAG, what they hold, whether to go on there."""
import contextlib
import hashlib
import json
import math
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from model import Config
from utils.errors import UsageError, require
from utils.files import atomic_write, listing_of, lock_file, read_json, write_json
from utils.layouts import files_of, listed, network_folder, one_deeper, weight_files
from utils.tracking import open_tracker

CAUSAL_TEACHER = "stage0-causal-teacher"  # of a run whose recipe has one
SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "student"

# Settings that may change when a stage is resumed: they do not change its numbers.
FREE = ("out resume device micro_batch activation_checkpointing context_parallel compile offload "
        "max_bad_steps save_every samples eval_clips preview_every log").split()


def stage_dir(cfg):
    """Where a stage leaves its results."""
    return Path(cfg.out) / (f"stage{cfg.stage}-{cfg.tag}" if cfg.tag else f"stage{cfg.stage}")


def starts_from_weights(cfg):
    """Whether a stage starts from another's weights; a teacher may be trained from scratch."""
    return cfg.stage > 0 or bool(cfg.init)


def start_from(cfg):
    """Folders of the student's and the teacher's weights that a stage starts from. Stage 1 learns
    from a causal teacher, if chunks of its trajectories continue real clips."""
    continues = cfg.stage == 1 and cfg.ode_context == "real"
    teacher = Path(cfg.teacher or Path(cfg.out) / (CAUSAL_TEACHER if continues else "stage0"))
    if cfg.stage == 0:  # a teacher has no teacher
        teacher = Path(cfg.init or teacher)
    before = teacher if cfg.stage < 2 else Path(cfg.out) / f"stage{cfg.stage - 1}"
    return Path(cfg.init or before), teacher


def placed(path, out):
    """A path; within a run its place there, since the run may have moved."""
    path, out = Path(path).resolve(), Path(out).resolve()
    return path.relative_to(out) if path.is_relative_to(out) else path


def trajectory_dirs(cfg):
    """Where the teacher's trajectories may be: here, in the stages that this one comes from, the
    nearest first, in stage 1 of this run, or of the run that it starts from."""
    start = folder = start_from(cfg)[0]
    stages = [stage_dir(cfg)]
    while folder not in stages and (folder / "config.json").is_file():
        stages.append(folder)
        settings = read_json(folder / "config.json")
        if not isinstance(settings, dict) or settings.get("stage", 0) < 1:
            break
        before = settings.get("init")
        folder = folder.parent / (placed(before, settings.get("out") or folder.parent) if before
                                  else f"stage{settings['stage'] - 1}")
    stages += [Path(cfg.out) / "stage1", start.parent / "stage1"]
    return [stage / "trajectories" for stage in stages]


def newest_stage(root="out"):
    """The stage that was finished last in a run under `root`; without one, the toy's student that
    comes with the repository (experiments/ship.py)."""
    done = Path(root).glob("*/stage*/ema.safetensors")
    done = sorted(done, key=lambda path: path.stat().st_mtime)
    if done:
        return done[-1].parent
    require(SHIPPED.is_dir(), f"no finished stage under {root}/ and none in {SHIPPED}: run python "
            "train.py first, or name one with --weights")
    return SHIPPED


def read_settings(folder):
    """The settings dict in a stage's folder; None if `folder` holds official weights instead.

    Raises UsageError if it is missing or damaged."""
    folder, config = Path(folder), Path(folder) / "config.json"
    beside = folder.parent / "config.json"
    require(not (folder.is_file() and beside.is_file() and "stage" in read_json(beside)),
            f"{folder} is part of a stage: name its folder, {folder.parent}")
    settings = read_json(config) if config.is_file() else {}
    require(isinstance(settings, dict), f"{config} is damaged: train the stage again")
    if "stage" in settings:
        settings = {"absolute_positions": False, **settings}  # runs older than this setting
        missing = [field.name for field in fields(Config) if field.name not in settings]
        require(not missing, f"{config} lacks {', '.join(missing)}: train the stage again")
        return {**settings, "where": "assets/student" if folder == SHIPPED else str(folder)}
    stage = "0 --recipe causal-teacher" if folder.name == CAUSAL_TEACHER else "N"
    require(folder.exists(), f"{folder} does not exist: check the path, or train the stage first "
            f"(the same command with --stage {stage})")
    inner = network_folder(folder) if folder.is_dir() else folder
    repository = (folder / "model_index.json").is_file() and not weight_files(inner)
    require(not repository, f"{folder} lacks the network, its folder transformer: download the "
            "rest, or name the network with --teacher or --weights")
    if folder.is_dir() and not weight_files(inner):
        deeper = one_deeper(folder)
        require(not deeper, f"{folder} holds no weights itself: name a folder in it that does, "
                f"{listed(deeper)}")
        raise UsageError(f"{folder} holds no finished stage and no weights: train it first (python "
                         "train.py --stage N), or name another")
    return None


def steps_before(cfg):
    """Steps already made of this stage's clips and noise: those of the stage it starts from, if
    that has the same number (--stage 2 --init out/toy/stage2 goes on with new clips), else 0."""
    settings = (read_settings(start_from(cfg)[0]) if starts_from_weights(cfg) else None) or {}
    if settings.get("stage") != cfg.stage:
        return 0
    return settings.get("steps_before", 0) + settings.get("iters", 0)


def fingerprint(path):
    """A short text that changes with the weights in `path`: their sizes, first and last bytes."""
    path, digest = Path(path), hashlib.sha256()
    files = [path / "ema.safetensors"]
    if not files[0].is_file():
        files = files_of(network_folder(path) if path.is_dir() else path)
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as f:
            start = f.read(2 ** 20)
            f.seek(max(0, size - 2 ** 20))
            digest.update(str(size).encode() + start + f.read())
    return digest.hexdigest()[:16]


def origins(cfg):
    """Fingerprints of the weights that a stage starts from."""
    sources = [*start_from(cfg), *([Path(cfg.real_score)] if cfg.real_score else [])]
    return [fingerprint(path) for path in sources] if starts_from_weights(cfg) else []


@contextlib.contextmanager
def locked(folder):
    """Hold a stage's folder for this run alone; UsageError if another run trains there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(folder.with_name(f".{folder.name}.lock"), f"another run is training in {folder}"
                   ": wait for it, or choose another --out or --tag"):
        yield


# ---------------------------------------------------------------- go on, keep, or start again

def check_codec(folder, settings):
    """UsageError if a stage of the toy world has lost its codec; one of latents has none."""
    there = (Path(folder) / "codec.safetensors").is_file()
    require(there or settings.get("data"), f"{folder} has lost its codec.safetensors: copy that of "
            "another stage of the run, or train it again with --no-resume")


def saved_states(folder):
    """The complete saved states of a stage, newest first."""
    found = (path.parent for path in (folder / "state").glob("step-*/.metadata"))
    return sorted(found, reverse=True)


def same_setting(name, old, new, outs):
    """Whether a setting is what it was; paths may be written differently. outs: the folders of the
    run, then and now."""
    if name in ("data", "init", "teacher", "real_score") and old and new:
        return placed(old, outs[0]) == placed(new, outs[1])
    return old == new or [old] == new  # one number where a list is allowed now


def decide_resume(cfg, defaults):
    """What to do with a stage's folder: "keep" what is finished, "train" (on), or train "anew".

        --no-resume                                  anew
        no settings there, or nothing trained        train; UsageError if there is a saved state
        settings or weights to start from differ     UsageError
        they are the same                            keep if finished, else train on

    defaults: the settings of a run that is older than a field. Changes nothing."""
    folder = stage_dir(cfg)
    if not cfg.resume:
        return "anew"
    config, states = folder / "config.json", saved_states(folder)
    before = read_json(config) if config.is_file() else None
    require(isinstance(before, dict | None), f"{config} is damaged: --no-resume trains the stage "
            "again")
    require(before or not states, f"{folder} holds a saved state but no config.json: --no-resume "
            "trains it again, another --out or --tag keeps it")
    begun = any((folder / left).exists() for left in ("trajectories", "metrics.json"))
    if not before or not (states or begun):
        return "train"
    known = {**as_json(defaults), **before}
    for name, value in as_json(cfg).items():
        same = name in FREE or same_setting(name, known[name], value, (known["out"], cfg.out))
        require(same, f"{folder} was trained with {name} {known[name]!r}, now it is {value!r}: "
                "choose another --out or --tag to keep it, or --no-resume to train it again")
    origin, sources = origins(cfg), " and ".join(map(str, start_from(cfg)))
    require(known.get("origin", origin) == origin, f"{folder} was started from other weights than "
            f"those that are now in {sources}: --no-resume trains it again, another --out or --tag "
            "keeps it")
    files = data_files(cfg)
    if known.get("data_files", files) != files:
        print(f"the files in {cfg.data} are not those that {folder} was begun with: clips have "
              "other numbers now, and what is finished has not seen the change (--no-resume trains "
              "it again)", file=sys.stderr)
    made = all((folder / name).is_file() for name in ("metrics.json", "ema.safetensors"))
    return "keep" if made else "train"


def data_files(cfg):
    """What --data holds, in short; "" for the toy world."""
    return listing_of(cfg.data) if cfg.data else ""


def as_json(cfg):
    """A config as its JSON file gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(cfg)))


def init_stage_dir(cfg, anew):
    """Prepare a stage's folder: empty if it is trained anew, with its settings."""
    folder = stage_dir(cfg)
    if anew and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**asdict(cfg), "origin": origins(cfg),
                                        "data_files": data_files(cfg),
                                        "steps_before": steps_before(cfg)})


def read_log(folder, steps):
    """The first `steps` rows of a stage's log.jsonl, without those that a killed run or a damaged
    disk has left broken."""
    path = folder / "log.jsonl"
    if not steps or not path.is_file():
        return []
    rows = map(row_in, path.read_text(errors="replace").splitlines())
    return [{name: math.nan if value is None else value for name, value in row.items()}
            for row in rows if row and row["step"] <= steps]


def row_in(line):
    """The row that a line of the log holds, or None."""
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) and row["step"] + row["minutes"] >= 0 else None
    except (ValueError, KeyError, TypeError):
        return None


def as_line(row):
    """A row of the log as a line of JSON, which has no NaN: it becomes null."""
    plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def reason_to_stop(rows, fraction):
    """Why stage 2 ends after the steps whose log is `rows`, or "". DMD that goes on forgets
    futures, until motion collapses (paper section 4). fraction 0: never."""
    probes = [row["probe_spread"] for row in rows if "probe_spread" in row]
    probes = [probe for probe in probes if math.isfinite(probe)]
    if fraction and probes and probes[-1] < fraction * probes[0]:
        return f"seeds of one image differ by {probes[-1]:.3f}, at the start it was {probes[0]:.3f}"
    return ""


class StageLog:
    """log.jsonl, the progress bar and the `tracker` (--log) of a stage; of processes that are not
    `main`, none of them.

    rows: of all steps so far; minutes: at the last of them."""

    def __init__(self, folder, step, iters, main, tracker=""):
        self.rows, self.file = read_log(folder, step), None
        self.minutes = self.rows[-1]["minutes"] if self.rows else 0.0
        self.bar = tqdm(total=iters, initial=step, desc=folder.name, disable=not main,
                        mininterval=1.0)
        self.tracker = open_tracker(tracker if main else "", folder, step)
        if main:
            with atomic_write(folder / "log.jsonl") as temporary:
                temporary.write_text("".join(map(as_line, self.rows)))
            self.file = open(folder / "log.jsonl", "a")

    def add(self, step, minutes, numbers):
        """One more step."""
        self.rows.append({"step": step, "minutes": minutes, **numbers})
        if self.file:
            self.file.write(as_line(self.rows[-1]))
            self.file.flush()
        if self.tracker:
            self.tracker.add(step, self.rows[-1])
        self.bar.update()
        words = {name: f"{value:.3g}" for name, value in numbers.items()}
        self.bar.set_postfix(words, refresh=False)

    def close(self):
        """The end of the stage."""
        self.bar.close()
        if self.file:
            self.file.close()
        if self.tracker:
            self.tracker.close()
