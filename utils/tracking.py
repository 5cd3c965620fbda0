"""--log: the numbers of log.jsonl, also to TensorBoard or Weights & Biases. Neither is needed."""
import importlib.util
import uuid

from utils.errors import require
from utils.files import atomic_write, read_json

TRACKERS = ("tensorboard", "wandb")


def check_tracker(name):
    """UsageError for an unknown --log, or one whose package is missing."""
    require(name in ("", *TRACKERS), f"--log {name} is unknown: choose from {', '.join(TRACKERS)}")
    require(not name or importlib.util.find_spec(name), f"--log {name} needs a package that is not "
            f"installed: pip install {name}")


class TensorBoard:
    """Scalars in <stage>/tensorboard, for `tensorboard --logdir out`."""

    def __init__(self, folder, step):
        from torch.utils.tensorboard import SummaryWriter
        # what a killed run wrote after its last saved state is made again
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def add(self, step, numbers):
        """The numbers of a step, on disk at once: a run may be killed."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        """The end of the stage."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases, the same one when the stage is resumed. Where it goes is wandb's
    own settings: WANDB_MODE=offline keeps it in the stage's folder."""

    def __init__(self, folder, step):
        import wandb
        path = folder / "wandb-id.txt"  # in the folder: training anew is another run
        if not path.is_file():
            with atomic_write(path) as temporary:
                temporary.write_text(uuid.uuid4().hex)
        config = folder / "config.json"
        self.run = wandb.init(project="nano-aad", name=f"{folder.parent.name}/{folder.name}",
                              dir=str(folder), id=path.read_text(), resume="allow",
                              config=read_json(config) if config.is_file() else None)

    def add(self, step, numbers):
        """The numbers of a step."""
        self.run.log(numbers, step=step)

    def close(self):
        """The end of the stage."""
        self.run.finish()


def open_tracker(name, folder, step):
    """The tracker that --log names, for a stage that goes on after `step`; None for none."""
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return kinds[name](folder, step) if name else None
