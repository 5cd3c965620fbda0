"""Weights on disk, official and our own: read one tensor at a time, every name checked."""
import json
from pathlib import Path

import torch
from safetensors import safe_open

from utils.errors import UsageError, first_line, require


def files_of(path):
    """The weight files that `path` names: itself, those of its index, or those in the folder."""
    if path.is_file():
        return [path]
    index = sorted(path.glob("*.safetensors.index.json"))
    if index:
        shards = json.loads(index[0].read_text())["weight_map"].values()
        return sorted({path / shard for shard in shards})
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt"))


def open_file(file):
    """{name: tensor, read from disk when it is sliced} of one weight file."""
    if file.suffix == ".safetensors":
        handle = safe_open(file, "pt")
        return {name: handle.get_slice(name) for name in handle.keys()}
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    state = state.get("generator_ema") or state.get("generator") or state
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def open_weights(path):
    """A checkpoint as {official name: tensor, read from disk when it is sliced}.

    path   a .safetensors file; a folder with one, or with a sharded set and its index.json, as
           Wan 2.1 is published; or a .pt state dict, of which `generator_ema` or `generator` is
           taken if it has them (Self Forcing)
    Raises UsageError if nothing can be read."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist: run the stage that makes it, or check the path")
    weights = {}
    try:
        for file in files_of(path):
            weights |= open_file(file)
    except Exception as error:  # every format has its own errors
        raise UsageError(f"the weights in {path} cannot be read ({first_line(error)}): check who "
                         "may read them, download them again, or train the stage that made them "
                         "again") from None
    require(weights, f"{path} holds no weights: name a .safetensors or .pt file, or a folder of "
            ".safetensors files")
    return weights


def shape_of(weight):
    """The shape of a tensor, or of a slice that has not been read."""
    return tuple(weight.get_shape() if hasattr(weight, "get_shape") else weight.shape)


def check_names(net, weights, where):
    """Raise UsageError with the first names or shapes in which network and checkpoint differ."""
    want = {name: tuple(p.shape) for name, p in net.named_parameters()}
    have = {name: shape_of(w) for name, w in weights.items()}
    reshaped = {name for name in want.keys() & have.keys() if want[name] != have[name]}
    for what, names in (("lacks", want.keys() - have.keys()),
                        ("has unknown", have.keys() - want.keys()),
                        ("has another shape of", reshaped)):
        more = " ..." if len(names) > 5 else ""
        require(not names, f"{where} {what} {', '.join(sorted(names)[:5])}{more} ({len(names)} in "
                "all): choose the preset and flags it was trained with")


def whole_parameter(param):
    """(tensor to fill, rows of the full tensor that it holds) of a network that is not sharded."""
    return param, slice(None)


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
    return net
