"""The trained networks that come with the repository, made again from a run of the toy.

    python experiments/ship.py out/toy       stage 3 to assets/student, stage 0 to assets/teacher

python sample.py uses the student where nothing was trained, docs/walkthrough.ipynb uses both.
Weights are the running averages in bfloat16, half the size; paths of this machine are left out.
"""
import sys
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from train import TrainConfig
from utils.errors import friendly_errors, require
from utils.files import atomic_write, read_tensors, save_tensors, write_json
from utils.runs import read_settings
from utils.settings import Parser

NAMES = {"stage3": "student", "stage0": "teacher"}
LOCAL = ("data", "out", "tag", "init", "teacher", "device", "resume")  # of the machine, not the run


def ship(stage, target):
    """Copy a finished stage to the folder `target`: weights in bfloat16, codec, settings.

    Raises UsageError if it is not finished, or was trained on clips that do not ship."""
    stage, target = Path(stage), Path(target)
    settings = read_settings(stage)
    codec = stage / "codec.safetensors"
    require(settings and codec.is_file(), f"{stage} was trained on latents: name a run of the toy")
    require(not settings["data"], f"{stage} was trained on {settings['data']}, which does not come "
            "with the repository: name a run of the toy")
    weights = read_tensors(stage / "ema.safetensors")
    known = {field.name: field.default for field in fields(TrainConfig)}
    settings = {name: known[name] if name in LOCAL else value
                for name, value in settings.items() if name in known}
    save_tensors(target / "ema.safetensors", {k: w.bfloat16() for k, w in weights.items()})
    with atomic_write(target / "codec.safetensors") as temporary:
        temporary.write_bytes(codec.read_bytes())
    write_json(target / "config.json", settings)


def main(argv=None):
    """Copy both networks of a run."""
    parser = Parser(__doc__)
    parser.add_argument("run", help="folder of a finished run of the toy")
    parser.add_argument("--assets", default=HERE / "assets", help="folder to write to")
    args = parser.parse_args(argv)
    for stage in NAMES:  # before anything is replaced
        folder = Path(args.run) / stage
        require((folder / "ema.safetensors").is_file(), f"{folder} holds no finished stage: train "
                "the recipe first (python train.py), or name another run")
    for stage, name in NAMES.items():
        target = Path(args.assets) / name
        ship(Path(args.run) / stage, target)
        size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
        print(f"wrote {target}: {stage} in bfloat16, {size:.1f} MB")


if __name__ == "__main__":
    with friendly_errors():
        main()
