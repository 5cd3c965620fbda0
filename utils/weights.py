"""Weights on disk, official and our own: read one tensor at a time, every name checked.

What utils/layouts.py knows of published layouts is applied here: a checkpoint comes out under the
official names, or one sentence says what was given instead.
"""
import pickle
from pathlib import Path

import torch
from safetensors import safe_open

from utils.errors import UsageError, first_line, require
from utils.layouts import (NESTED, config_beside, files_of, network_folder, official_name,
                           preset_of, refuse_foreign, shape_from, without_wrappers)


class Weights(dict):
    """{official name: tensor, read from disk when it is sliced}, and what is known of them.

    where    the path that was named
    source   the files in words
    role     "teacher", "student", or "" where nothing says which
    shape    {field of model.Shape: value}, from the tensors' shapes
    preset   the Wan preset of that shape, or None"""

    def __init__(self, tensors, where, source="", role="", shape=None):
        super().__init__(tensors)
        self.where, self.source, self.role, self.shape = where, source, role, shape or {}
        self.preset = preset_of(self.shape)

    def note(self):
        """What is read, in words: tensors, numbers, kinds, files."""
        kinds = sorted({dtype_of(weight) for weight in self.values()})
        count = sum(torch.Size(shape_of(weight)).numel() for weight in self.values())
        return (f"reading {len(self)} tensors, {count / 1e6:,.1f} M numbers, "
                f"{' and '.join(kinds)}, from {self.source or self.where}")


TAIL = 4096  # bytes: no file of weights ends in so many zeros
KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
         "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # safetensors' words for dtypes


def shape_of(weight):
    """The shape of a tensor, or of a slice that has not been read."""
    return tuple(weight.get_shape() if hasattr(weight, "get_shape") else weight.shape)


def dtype_of(weight):
    """The dtype of a tensor or a slice, in words."""
    if hasattr(weight, "get_dtype"):
        return KINDS.get(weight.get_dtype(), weight.get_dtype().lower())
    return str(weight.dtype).removeprefix("torch.")


# ---------------------------------------------------------------- files

def load_pickled(file):
    """The contents of a .pt file, of tensors and plain containers alone."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # the format before 1.6
    except pickle.UnpicklingError:
        raise UsageError(f"{file} holds Python objects beside the weights (settings or optimizer "
                         "states), which are not loaded, for they could run anything: load it "
                         "where it was made, and save the state dict alone") from None


def state_dict_in(contents, file):
    """(name of the entry, state dict) in the contents of a .pt file, however deep it lies."""
    path = []
    while isinstance(contents, dict) and len(path) < 10:  # an entry may hold itself
        inner = [name for name, value in contents.items() if isinstance(value, dict) and value]
        known = [name for name in NESTED if name in inner] or [
            name for name in inner if "lora" in str(name)][:1]  # refused below, by its kind
        require(not {"student", "teacher"} <= set(inner), f"{file} holds 2 networks, student and "
                "teacher: save one of them alone")
        tensors = {str(k): v for k, v in contents.items() if isinstance(v, torch.Tensor)}
        if tensors and not known:
            return "/".join(path), tensors
        require(known or len(inner) < 2, f"{file} has {len(inner)} entries ("
                f"{', '.join(map(str, inner[:5]))}), and none is called generator, model or "
                "state_dict: save the weights alone")
        if not inner:
            break
        path.append(str((known or inner)[0]))
        contents = contents[(known or inner)[0]]
    raise UsageError(f"{file} holds no tensors: save a state dict there, torch.save(net."
                     "state_dict(), file)")


def open_file(file):
    """(name of the entry, {name: tensor, read from disk when it is sliced}) of a weight file."""
    ending = file.suffix.lower()
    with open(file, "rb") as f:
        head = f.read(512)
    require(ending != ".gguf" and head[:4] != b"GGUF", f"{file} is a GGUF, quantised for other "
            "programs: take the bfloat16 or float32 .safetensors")
    require(not head.startswith(b"version https://git-lfs.github."), f"{file} is a pointer of Git "
            "LFS, not the weights: run git lfs pull in its folder, or download the file itself")
    require(b"<html" not in head.lower(), f"{file} is a web page, not the weights: download the "
            "file behind its button, on Hugging Face /resolve/ in place of /blob/ in the address")
    partial = not head or Path(f"{file}.aria2").exists()  # aria2 fills what is missing with zeros
    require(not partial, f"{file} is not downloaded to its end: run the download again")
    json = head[8:9] == b"{"  # of safetensors, which also have other endings, or none in a cache
    require(json or ending != ".safetensors" or not head.startswith((b"PK\3\4", b"\x80")),
            f"{file} is a .pt file under another name: rename it")
    if json or ending == ".safetensors":
        handle = safe_open(file, "pt")
        with open(file, "rb") as f:  # what a download leaves that reserved its space
            f.seek(max(0, file.stat().st_size - TAIL))
            require(any(f.read()), f"{file} ends in zeros, so it is not whole: download it again")
        return "", {name: handle.get_slice(name) for name in handle.keys()}
    return state_dict_in(load_pickled(file), file)


def open_tensors(path, companions=False):
    """(tensors under the file's own names without wrappers' prefixes, source in words, entry).

    path: a file; or a folder with one set of weights. Raises UsageError if nothing can be read."""
    path, tensors, entry = Path(path), {}, ""
    require(path.exists(), f"{path} does not exist: run the stage that makes it, or check the path")
    try:
        files = files_of(path, companions)
        for file in files:
            entry, part = open_file(file)
            twice = min(tensors.keys() & part.keys(), default="")
            require(not twice, f"{file} holds {twice}, and so does another file there: remove the "
                    "one that an earlier download has left")
            tensors |= part
    except UsageError:
        raise
    except Exception as error:  # every format has its own errors
        raise UsageError(f"the weights in {path} cannot be read ({first_line(error)}): check who "
                         "may read them, download them again, or train the stage that made them "
                         "again") from None
    require(tensors, f"{path} holds no weights: name a .safetensors or .pt file, or a folder of "
            ".safetensors files")
    source = str(files[0]) if len(files) == 1 else f"{len(files)} files in {files[0].parent}"
    prefix, tensors = without_wrappers(tensors, path)
    entry = "/".join(filter(None, (entry, prefix.rstrip("."))))
    return tensors, source + (f" ({entry})" if entry else ""), entry


def role_of(entry, config):
    """Whether weights are a teacher's or a student's, as far as the file and its config.json say:
    a generator is a student; Wan's own classes are the bidirectional teacher."""
    if "generator" in entry or "student" in entry:
        return "student"
    if "teacher" in entry or "real_score" in entry:
        return "teacher"
    kind = str(config.get("_class_name", ""))
    if "Causal" in kind:
        return "student"
    return "teacher" if kind in ("WanModel", "WanTransformer3DModel") else ""


def open_weights(path):
    """A network's checkpoint as Weights, under official names, unread.

    path   a .safetensors file; a folder with one, or with a sharded set and its index.json; the
           root of the official repository or of the one with -Diffusers; or a .pt state dict, of
           which `generator_ema` or `generator` is taken if it has them (Self Forcing)
    Raises UsageError if nothing can be read, or if it is not Wan 2.1's text-to-video network."""
    path = Path(path)
    inner = network_folder(path) if path.is_dir() else path
    tensors, source, entry = open_tensors(inner)
    if "scale_shift_table" in tensors or any(".attn1." in name for name in tensors):
        tensors = {official_name(name): tensor for name, tensor in tensors.items()}
        source += " (diffusers' names)"
    config = config_beside(inner)
    if "stage" in config:  # one of our own, whose names are checked against its settings
        return Weights(tensors, path, source)

    def size(name):
        return shape_of(tensors[name])

    refuse_foreign(tensors, size, path, config)
    odd = {dtype_of(weight) for weight in tensors.values()}
    odd = sorted(kind for kind in odd if not kind.startswith(("float", "bfloat")))
    require(not odd, f"{path} holds quantised weights ({', '.join(odd)}): take the bfloat16 or "
            "float32 file")
    return Weights(tensors, path, source, role_of(entry, config), shape_from(tensors, size, config))


def same_network(one, two):
    """Whether two checkpoints hold the same network, by two of its weights."""
    one, two = open_weights(one), open_weights(two)
    return all(torch.equal(one[name][:], two[name][:])
               for name in ("head.modulation", "blocks.0.ffn.0.weight"))


# ---------------------------------------------------------------- into a network

def check_names(net, weights, where, remedy="choose the preset and flags it was trained with"):
    """Raise UsageError with the first names or shapes in which network and checkpoint differ."""
    want = {name: tuple(p.shape) for name, p in net.named_parameters()}
    have = {name: shape_of(w) for name, w in weights.items()}
    reshaped = {name for name in want.keys() & have.keys() if want[name] != have[name]}
    faults = []
    for what, names in (("lacks", want.keys() - have.keys()),
                        ("has unknown", have.keys() - want.keys()),
                        ("has another shape of", reshaped)):
        more = " ..." if len(names) > 5 else ""
        if names:
            faults.append(f"{what} {', '.join(sorted(names)[:5])}{more} ({len(names)} in all)")
    preset = getattr(weights, "preset", None)
    remedy = f"it has the shape of --preset {preset}" if preset else remedy
    require(not faults, f"{where} {' and '.join(faults)}: {remedy}")


def whole_parameter(param):
    """(tensor to fill, rows of the full tensor that it holds) of a network that is not sharded."""
    return param, slice(None)


def check_sound(name, tensor, where):
    """UsageError for a matrix of zeros, which a download that ended early leaves, and for NaN."""
    pieces = tensor.flatten().split(2 ** 24)  # or the check took more memory than the tensor
    # a new network's last layer is zero
    may_be_zero = tensor.ndim < 2 or not tensor.numel() or "head.head" in name
    require(may_be_zero or any(piece.any() for piece in pieces), f"{where}: {name} is all zero, so "
            "the file is not whole: download it again")
    require(all(piece.isfinite().all() for piece in pieces), f"{where}: {name} is not finite "
            "(NaN): download the file again, or train the stage that made it again")


def load_into(net, weights, where, local_shard=whole_parameter):
    """Fill a network strictly, one tensor at a time; returns it.

    weights      a state dict, or open_weights()
    local_shard  callable parameter -> (tensor to fill, rows of the full tensor that it holds)
    Raises UsageError if a name or shape does not fit."""
    check_names(net, weights, where)
    with torch.no_grad():
        for name, param in net.named_parameters():
            target, rows = local_shard(param)
            if target.numel():
                target.copy_(weights[name][rows])
            check_sound(name, target, where)
    return net
