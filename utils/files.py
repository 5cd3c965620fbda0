"""Files on disk: written whole or not at all, read with one clear sentence if they are damaged."""
import contextlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.errors import UsageError, first_line, require


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path beside `path` that is renamed to it at the end; a failure leaves nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # so that the error for a read-only folder is the file system's own
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"cannot write {path}: {reason}; free some space or choose another "
                         "place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_text(path):
    """A UTF-8 text file, with or without a byte order mark; UsageError if it cannot be read."""
    require(Path(path).exists(), f"{path} does not exist: check the path")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({first_line(error)}): save it as UTF-8, "
                         "or make it again") from None


def read_json(path):
    """A JSON file; UsageError if it is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged ({error}): remove it, and run the command that made "
                         "it again") from None


def write_json(path, value):
    """Write a JSON file."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_tensors(path):
    """A safetensors file as a dict; UsageError if it is missing or damaged."""
    require(Path(path).exists(), f"{path} does not exist: run the stage that makes it, or check "
            "the path")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types for truncated and foreign files
        raise UsageError(f"{path} is not a readable safetensors file ({error}): remove it, and run "
                         "the command that made it again") from None


def read_clip(path, network, frames, only_text=False):
    """An encoded clip: a dict with `text` (l, d) and, unless `only_text`, `latents` (f, c, h, w),
    the end of a trajectory if that is what the file holds. UsageError unless it fits `network`, a
    Config, and has at least `frames` latent frames."""
    clip = read_tensors(path)
    if "states" in clip:
        clip["latents"] = clip["states"][-1]
    text, latents = clip.get("text"), clip.get("latents")
    complete = only_text or latents is not None and latents.ndim == 4
    require(text is not None and text.ndim == 2 and complete, f"{path} holds no clip, which is "
            "latents (f, c, h, w) and text (l, d): remove it from the folder")
    fits = text.shape[1] == network.text_dim and len(text) <= network.text_len
    shape = "no latents"
    if not only_text:
        number, c, h, w = latents.shape
        require(number >= frames, f"{path} has {number} latent frames, a clip needs {frames}: "
                "remove it, or lower --frames")
        fits = fits and c == network.in_dim and h % network.patch == w % network.patch == 0
        shape = f"{c} channels, sides of {h} x {w}"
    require(fits, f"{path} has {shape} and text {tuple(text.shape)}, the network takes "
            f"{network.in_dim} channels, sides that divide by {network.patch}, text up to "
            f"{network.text_len} x {network.text_dim}: choose the preset they were made for")
    return clip


def save_tensors(path, tensors):
    """Write a dict of tensors as one safetensors file."""
    with atomic_write(path) as temporary:
        mode = temporary.stat().st_mode  # the user's umask; safetensors makes private files
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
        temporary.chmod(mode)


def clips_in(folder):
    """The .safetensors files of a folder, without those that are being written."""
    return sorted(p for p in Path(folder).glob("*.safetensors") if not p.name.startswith("."))
