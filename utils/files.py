"""Files on disk: written whole or not at all, read with one clear sentence if they are damaged."""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.errors import UsageError, WriteError, first_line, first_process, require

REMEDIES = {  # what stops a file from being written -> what helps
    errno.ENAMETOOLONG: "use a shorter name", errno.ENOENT: "choose another place",
    errno.EROFS: "choose another place, this one cannot be written to",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EISDIR: "it is a folder, use another name",
    errno.ENOTDIR: "a part of the path is a file, choose another place",
    errno.EEXIST: "a part of the path is a file or a broken link, choose another place",
}


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path beside `path` that is renamed to it at the end; a failure leaves nothing."""
    path = Path(path)
    # short: the file's own name may have all the bytes that a name can have
    suffix = path.suffix if len(path.suffix) < 20 else ""
    temporary = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):x}.{os.getpid()}.tmp{suffix}")
    try:
        if path.is_dir():  # it and a name that is too long are known before the work is done
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # so that the error for a read-only folder is the file system's own
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        number = getattr(error, "errno", None)
        remedy = REMEDIES.get(number, "free some space or choose another place")
        raise WriteError(f"cannot write {path}: {reason}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Unwritten(Exception):
    """Ends an atomic_write() without a file."""


def check_writable(path):
    """WriteError if a file of this name cannot be written."""
    with contextlib.suppress(Unwritten), atomic_write(path):
        raise Unwritten


@contextlib.contextmanager
def lock_file(path, sentence):
    """Hold a lock for this process alone; UsageError(sentence) if another one has it. It ends with
    the process, however that ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(sentence) from None
        except OSError:  # a file system without locks
            pass
        yield


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


def first_non_finite(tensors):
    """The name of the first of a dict of tensors that holds NaN or an infinity, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def read_finite(path):
    """read_tensors(), of latents and texts: UsageError if one holds NaN or an infinity."""
    tensors = read_tensors(path)
    bad = first_non_finite(tensors)
    require(bad is None, f"{path} holds {bad} that are not finite (NaN), which training would take "
            "for a learning rate that is too high: remove it, and make it again in float32")
    return tensors


def save_finite(path, tensors):
    """save_tensors() of latents and texts: UsageError if one holds NaN or an infinity."""
    bad = first_non_finite(tensors)
    if bad is not None:
        raise WriteError(f"{path} is not written, its {bad} are not finite (NaN): the weights that "
                         "made them are damaged, or overflow in half precision; use float32")
    save_tensors(path, tensors)


def read_clip(path, network, frames, only_text=False):
    """An encoded clip: a dict with `text` (l, d) and, unless `only_text`, `latents` (f, c, h, w),
    of a trajectory its end or the real clip that it continues. UsageError unless it fits `network`,
    a Config, and has at least `frames` latent frames."""
    clip = read_finite(path)
    if "states" in clip:
        clip["latents"] = clip.get("context", clip["states"][-1])
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


def shapes_in(path):
    """{name: shape} of a safetensors file, by its header. UsageError if it is empty or cut off."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception as error:  # safetensors raises its own types
        raise UsageError(f"{path} is not a readable safetensors file ({first_line(error)}): "
                         "remove it, and run the command that made it again") from None


def check_whole(paths):
    """These safetensors files. UsageError if one is empty or cut off: by their headers, in the
    first process, before a clip is drawn in the middle of a training. Also if some are captions
    alone and others clips, for the first decides how all are read, and if latents are of several
    sizes, which passes of one clip each would not notice."""
    alone, sizes = [], {}  # (c, h, w): the first file that has it
    for path in paths if first_process() else ():
        shapes = shapes_in(path)
        alone += [path] if shapes.keys() == {"text"} else []
        if "latents" in shapes:
            sizes.setdefault(shapes["latents"][1:], path)
        require(len(sizes) < 2, f"{' and '.join(map(str, sizes.values()))} differ in the shape of "
                f"their latents ({' and '.join(map(str, sizes))}): encode all clips with one "
                "--size into a new folder")
    require(len(alone) in (0, len(paths)), f"{paths[0].parent if paths else ''} mixes clips with "
            f"{len(alone)} captions alone ({alone[0].name if alone else ''}): give each a folder "
            "of its own")
    return paths


def read_negative(clip):
    """The embedded negative prompt (l, d) beside an encoded clip, or None. UsageError if it holds
    none, or one of another width than the clip's own text."""
    path = Path(clip).parent / "negative" / "text.safetensors"
    if not path.is_file():
        return None
    text, beside = read_finite(path).get("text"), shapes_in(clip).get("text", ())
    again = "run python -m scale.encode with --negative again"
    require(text is not None and text.ndim == 2, f"{path} holds no embedded text (l, d): {again}")
    require(text.shape[1:] == beside[1:] or len(beside) != 2, f"{path} has text "
            f"{tuple(text.shape)}, {clip} {beside}, of another text encoder: {again}")
    return text.float()


def content_of(path, piece=2 ** 20):
    """A short text that changes with a file, or with the files of a folder and their names: their
    sizes and their first, middle and last `piece` bytes, which are all of a file that is no longer
    than one piece. All bytes of large files would take hours to read."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    for file in files if path.is_dir() else [path]:
        size = file.stat().st_size
        name = str(file.relative_to(path)) if path.is_dir() else ""
        digest.update(f"{name} {size} ".encode(errors="surrogateescape"))
        with open(file, "rb") as f:
            for start in sorted({0, max(0, size // 2 - piece // 2), max(0, size - piece)}):
                f.seek(start)
                digest.update(f.read(piece))
    return digest.hexdigest()[:16]


def listing_of(folder):
    """A short text that changes with the names and sizes of the files in a folder."""
    digest, folder = hashlib.sha256(), Path(folder)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            line = f"{file.relative_to(folder)} {file.stat().st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def clips_in(folder):
    """The .safetensors files of a folder, without those that are being written."""
    return sorted(p for p in Path(folder).glob("*.safetensors") if not p.name.startswith("."))
