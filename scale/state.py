"""Saved states: networks, optimizers and the step, on any number of processes."""
import logging
import shutil
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_state_dict)

from discriminator import has_heads
from scale.parallel import on_rank0
from utils.errors import UsageError, require
from utils.files import first_non_finite, save_tensors
from utils.runs import saved_states

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves states too
# load_state() says in a sentence what DCP would log as tracebacks
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)


def init_optimizer_state(optimizer):
    """Create an optimizer's moments, all zero. Saving would do it with a step that counts."""
    decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0  # or the step below would shrink the weights
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, decay in zip(optimizer.param_groups, decays):
        if "weight_decay" in group:
            group["weight_decay"] = decay
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def state_of(run):
    """All that a resumed run needs; random numbers and the data position follow from the step."""
    state = {"step": run.step}
    for name, net in run.nets.items():
        if run.optimizers[name] or name == "ema":
            model, optim = get_state_dict(net, run.optimizers[name])
            state[name] = {"model": model, "optim": optim}
    return state


def interrupted(error):
    """Whether a failed save was a second Ctrl-C."""
    failures = getattr(error, "failures", {}).values()
    return any(isinstance(failure, KeyboardInterrupt) for failure, _ in failures)


def save_state(run):
    """Write the state under a temporary name, every process its own part, rename it, and keep the
    last two. UsageError if that fails."""
    new, done = run.dir / "state" / "new", run.dir / "state" / f"step-{run.step:07d}"
    try:
        dcp.save(state_of(run), checkpoint_id=new)
        if run.is_main:
            shutil.rmtree(done, ignore_errors=True)
            new.rename(done)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(new, ignore_errors=True)
        if interrupted(error):
            raise KeyboardInterrupt from None
        reason = (str(error).strip() or repr(error)).splitlines()[-1][:150]
        last = next(iter(saved_states(run.dir)), "the beginning")
        raise UsageError(f"cannot write {done} ({reason}): free some space and give the same "
                         f"command again; it goes on from {last}") from None
    if run.is_main:
        for old in saved_states(run.dir)[2:]:
            shutil.rmtree(old, ignore_errors=True)


def load_newest(run):
    """The newest state that can be read, or None. UsageError if there are states and none can."""
    found = saved_states(run.dir)
    for path in found:
        state = state_of(run)
        try:
            dcp.load(state, checkpoint_id=path)
            return state
        except (Exception, CheckpointException):  # truncated, or of another kind
            if run.is_main:
                print(f"{path} is damaged: going back to the state before", file=sys.stderr)
    require(not found, f"no state in {run.dir / 'state'} can be read: --no-resume trains stage "
            f"{run.cfg.stage} from its beginning")
    return None


def load_state(run):
    """Put the newest readable state, if any, back into networks, optimizers and step."""
    state = load_newest(run)
    if state is None:
        return
    for name in run.nets:
        if name in state:
            set_state_dict(run.nets[name], run.optimizers[name],
                           optim_state_dict=state[name]["optim"],
                           model_state_dict=state[name]["model"])
    run.step = state["step"]
    if run.is_main:
        print(f"stage {run.cfg.stage} goes on at step {run.step}")


def export(run):
    """Plain safetensors of what sample.py and the next stage start from."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for name, file in (("student", "weights"), ("ema", "ema"), ("fake", "fake")):
        if name in run.nets:
            tensors = get_model_state_dict(run.nets[name], options=options)
            if has_heads(run.cfg, name):  # a fake score that is a discriminator too: without heads
                tensors = {key.removeprefix("backbone."): x for key, x in tensors.items()
                           if key.startswith("backbone.")}
            bad = on_rank0(first_non_finite, tensors)
            require(bad is None, f"stage {run.cfg.stage} has made the {name}'s {bad} not finite "
                    "(NaN): start again with a lower --lr, and another --tag or --no-resume")
            if run.is_main:
                save_tensors(run.dir / f"{file}.safetensors", tensors)
    if run.is_main and run.codec:
        run.codec.save(run.dir / "codec.safetensors")
