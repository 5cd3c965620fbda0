"""Many devices: everything that spreads a network over processes is put on from outside, here. model.py knows nothing of it.

    torchrun --nproc_per_node 8 train.py ...                       FSDP2: every process holds an eighth of all weights
    torchrun --nproc_per_node 8 train.py ... --context-parallel 2  and two processes share the tokens of one clip

    shard()          activation checkpointing, compilation, FSDP2: one function for every network, also for one process
    spread_tokens()  Ulysses: a clip that is too long for one device is cut between several, by hooks
    Muon             an optimizer for matrices, whole or in rows
    save_state()     all that a resumed run needs, on any number of processes; locked(): one run a folder; fingerprint() of weights
"""
import contextlib
import fcntl
import functools
import gc
import hashlib
import logging
import os
import shutil
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from model import UsageError, require

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # load_state() says in a sentence what it says in tracebacks
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # keys and values leave a block as views, and nothing changes them in place


def world():
    """(rank, number of processes)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def kind():
    """The devices that processes talk between."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextlib.contextmanager
def processes(device=""):
    """The process group that torchrun asks for, if it does, between devices of this kind (default: CUDA where there is one);
    taken down in an order that does not abort."""
    if "RANK" in os.environ:
        cuda = device == "cuda" or not device and torch.cuda.is_available()
        if cuda:
            rank, number = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            require(rank < number, f"{number} GPUs are here, torchrun asks for more processes: lower --nproc_per_node, or say --device cpu")
            torch.cuda.set_device(rank)
        # the first process writes and scores alone at the end of a stage, while the others wait
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    try:
        yield
    finally:
        gc.collect()  # sharded modules must be gone before their process group
        context_group.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def averaged(log):
    """The mean over processes of a dict of numbers."""
    if dist.is_initialized():
        values = torch.tensor(list(log.values()), dtype=torch.float64, device=kind())
        dist.all_reduce(values)
        log = dict(zip(log, (values / dist.get_world_size()).tolist()))
    return log


def by_first(function, *args):
    """function(*args), called by the first process for all: where it fails, all stop, and the first says why."""
    answer = [None]
    if world()[0] == 0:
        try:
            answer = [function(*args)]
        except (UsageError, OSError) as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise SystemExit(2) if world()[0] else answer[0]
    return answer[0]


def whole(x):
    """The full tensor of a sharded one."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ---------------------------------------------------------------- how much work, and how fast this device could do it

_ATEN = torch.ops.aten
FORMULAS = {**flop_registry,  # PyTorch's table lacks the CPU's attention kernel, which is also the one that plans are made with
            _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
            _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_ATEN._scaled_dot_product_flash_attention_backward]}


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of all matrix products and attention while it is entered. What activation
    checkpointing runs again counts again; flash-attn's own kernel is unknown to PyTorch's table and counts nothing."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in FORMULAS:
            self.flops += FORMULAS[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def matrix_rate(device, dtype=torch.bfloat16, tries=5):
    """The largest matrix rate that this device shows, in FLOP/s: what utilisation is measured against."""
    rates, began = [], now(device)
    for n in (8192,) if device.type == "cuda" else (256, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(tries):
            start = now(device)
            a @ b
            rates.append(2 * n ** 3 / (now(device) - start))
        if now(device) - began > 0.1:  # bfloat16 on a CPU without instructions for it: 1024 would take 2 seconds
            break
    return max(rates)


def has_bfloat16(device):
    """Whether this kind of device ("cuda", "mps" or "cpu") multiplies bfloat16 with instructions of its own; without them it takes up to 20
    times as long as float32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device == "cpu" and known.get("avx512_bf16", False)


def now(device):
    """Seconds, once the device has done all it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- weights: every process holds some rows of each

def blocks_of(module):
    """The transformer blocks of a DiT, or of the one inside a discriminator."""
    return getattr(module, "backbone", module).blocks


def shard(module, recompute=False, compiled=False, half=False, context=1):
    """Everything that distributes a network, in the order in which it must be put on; the network itself, changed in place.

    recompute  activation checkpointing: of a block only its input is kept, the backward pass runs it again
    compiled   torch.compile, block by block: all blocks share one compilation
    half       weights are gathered in bfloat16; the shards, the gradients' sums and the optimizer stay float32
    context    so many processes share the tokens of a clip (see spread_tokens)
    Under torchrun FSDP2 follows, on every block and on the rest: a block's weights are whole only while it runs."""
    if context > 1:
        spread_tokens(module, context_group(context))
    for block in blocks_of(module):
        if recompute:  # a block is a pure function, so running it twice is safe
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()
    if dist.is_initialized():
        policy = lambda dtype: MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(kind(), (dist.get_world_size(),))
        for block in blocks_of(module):
            fully_shard(block, mesh=mesh, mp_policy=policy(torch.bfloat16 if half else None))
        # what is in no block stays whole from pass to pass, and the gradients of a rollout's passes add up in its precision
        fully_shard(module, mesh=mesh, mp_policy=policy(None))
    return module


def own_rows(param):
    """What this process holds of a parameter: (the tensor, which rows of the whole). FSDP2 cuts rows as torch.chunk does."""
    if not hasattr(param, "to_local"):
        return param, slice(None)
    (rank, size), rows = world(), param.shape[0]
    each = -(-rows // size)
    return param.to_local(), slice(min(rank * each, rows), min((rank + 1) * each, rows))


class Muon(torch.optim.Optimizer):
    """Muon for matrices: along the orthogonal matrix nearest to the momentum, which five Newton-Schulz steps find (Jordan 2024).
    The numbers of torch.optim.Muon, which takes one matrix after the other; together those of a shape take half the time at toy size."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes, momentum = {}, group["momentum"]
            for p in [p for p in group["params"] if p.grad is not None]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                shapes.setdefault(p.shape, []).append((p, whole(p.grad.lerp(buffer, momentum))))
            for (rows, columns), pairs in shapes.items():
                for (p, _), update in zip(pairs, orthogonal(torch.stack([update for _, update in pairs]))):
                    mine, part = own_rows(p)
                    mine.add_(update[part], alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(x):
    """U V^T, nearly, of every matrix x = U S V^T in (n, rows, columns): most singular values come near 1, the smallest stay below.
    In bfloat16, which is precise enough, where that is fast."""
    x, tall = x.bfloat16() if has_bfloat16(x.device.type) else x.float(), x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


# ---------------------------------------------------------------- tokens: several processes share a clip (Ulysses)

@functools.lru_cache
def context_group(size):
    """The processes that share a clip with this one: `size` neighbours."""
    return init_device_mesh(kind(), (world()[1] // size, size), mesh_dim_names=("data", "context")).get_group("context")


class Exchange(torch.autograd.Function):
    """All-to-all over a group: parts[j] goes to its process j, and comes back as what process j has for this one. Twice undoes it, so
    it is its own backward pass."""

    @staticmethod
    def forward(ctx, parts, group):
        ctx.group, parts = group, parts.contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return Exchange.apply(gradient, ctx.group), None


def spread_tokens(module, group):
    """Give every process of `group` 1/p of the tokens of every frame (Ulysses, 2309.14509); by hooks, for any pass of the network.

    Outside attention a token needs only itself. Around attention an all-to-all turns (all heads, some tokens) into (some
    heads, all tokens) and back, so masks, RoPE and KV cache work as they are, the latter with 1/p of the heads.

    Gradients: every process backpropagates the loss of the whole clip, and gathering adds these up, so that each holds p times
    the part that went through its own tokens. The mean over processes is the gradient: FSDP's for weights, `meant` for the clip."""
    net, size, rank = getattr(module, "backbone", module), dist.get_world_size(group), dist.get_rank(group)
    exchange = lambda parts, join: torch.cat(Exchange.apply(parts, group).unbind(), join)
    gather = lambda x, join: exchange(x.expand(size, *x.shape), join)  # x to everybody; backward, expand adds up what comes back

    def to_heads(_, args, y):       # (b, f, n / p, dim) -> (b, f, n, dim / p)
        autocast = torch.is_autocast_enabled(y.device.type)
        return exchange(torch.stack((y.to(torch.get_autocast_dtype(y.device.type)) if autocast else y).chunk(size, 3)), 2)

    def to_tokens(_, args):         # and back
        return exchange(torch.stack(args[0].chunk(size, 2)), 3)

    def own_tokens(_, args):
        tokens = args[0].shape[2]
        require(tokens % size == 0, f"--context-parallel {size} does not divide the {tokens} tokens of a frame: choose another --size")
        return args[0].chunk(size, 2)[rank], *args[1:]

    def meant(_, args):
        def mean(gradient):
            gradient = gradient / size
            dist.all_reduce(gradient, group=group)
            return gradient

        if not args[0].requires_grad:
            return args
        x = args[0].view_as(args[0])
        x.register_hook(mean)
        return x, *args[1:]

    net.register_forward_pre_hook(meant)
    net.blocks[0].register_forward_pre_hook(own_tokens)
    for attention in (block.self_attn for block in net.blocks):
        attention.heads //= size
        for name in ("v", "norm_q", "norm_k"):
            getattr(attention, name).register_forward_hook(to_heads)
        attention.o.register_forward_pre_hook(to_tokens)
    net.head.register_forward_hook(lambda _, args, y: gather(y, 2))
    if module is not net:  # a discriminator: its queries ask all tokens
        for head in module.heads:
            head.register_forward_pre_hook(lambda _, args: gather(args[0], 1))


# ---------------------------------------------------------------- a stage's folder: its lock, fingerprint and saved states

@contextlib.contextmanager
def locked(folder):
    """A stage's folder for this run alone; UsageError where another run is at work there. Ends with the process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # of another kind: a file system without locks, on which nobody can tell
            if isinstance(error, BlockingIOError):
                raise UsageError(f"another run is training in {folder}: wait for it, or choose another --out or --tag") from None
        yield


def fingerprint(path):
    """A short text that changes with the weights in a stage's folder, or with official ones: of their sizes, first and last bytes."""
    path, digest = Path(path), hashlib.sha256()
    for file in [path / "ema.safetensors"] if (path / "ema.safetensors").is_file() else sorted(
            [path] if path.is_file() else [p for p in path.glob("*") if p.suffix in (".safetensors", ".pt")]):
        size = file.stat().st_size
        with open(file, "rb") as f:
            start = f.read(2 ** 20)
            f.seek(max(0, size - 2 ** 20))
            digest.update(str(size).encode() + start + f.read())
    return digest.hexdigest()[:16]


def begin_state(optimizer):
    """Give an optimizer its moments, all zero. Saving a state would do so by a step without gradients, which counts as one."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)  # which without weight decay moves nothing
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def state_of(run):
    """All that a resumed run needs; randomness and data position follow from the step."""
    state = {"step": run.step}
    for name, net in run.nets.items():
        if run.opts[name] or name == "ema":
            model, optim = get_state_dict(net, run.opts[name])
            state[name] = {"model": model, "optim": optim}
    return state


def saved_states(folder):
    """The states of a stage's folder that were written to their end, newest first."""
    return sorted((folder / "state").glob("step-*"), reverse=True)


def save_state(run):
    """Write the state, every process its own part, under a temporary name, give it its own, and keep the last two. UsageError where that fails."""
    new, done = run.dir / "state" / "new", run.dir / "state" / f"step-{run.step:07d}"
    try:
        dcp.save(state_of(run), checkpoint_id=new)
        if run.writes:
            shutil.rmtree(done, ignore_errors=True)
            new.rename(done)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(new, ignore_errors=True)
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in getattr(error, "failures", {}).values()):  # a second Ctrl-C
            raise KeyboardInterrupt from None
        why = (str(error).strip() or repr(error)).splitlines()[-1][:150]
        raise UsageError(f"cannot write {done} ({why}): free some space and give the same command again; it goes on from "
                         f"{next(iter(saved_states(run.dir)), 'the beginning')}") from None
    if run.writes:
        for old in saved_states(run.dir)[2:]:
            shutil.rmtree(old, ignore_errors=True)


def load_state(run):
    """Put the newest readable state, if there is any, back into the run's networks, optimizers and step."""
    found = saved_states(run.dir)
    for path in found:
        state = state_of(run)
        try:
            dcp.load(state, checkpoint_id=path)
            break
        except (Exception, CheckpointException):  # truncated, or of another kind
            if run.writes:
                print(f"{path} is damaged: going back to the state before", file=sys.stderr)
    else:
        require(not found, f"no state in {run.dir / 'state'} can be read: --no-resume trains stage {run.cfg.stage} from its beginning")
        return
    for name in run.nets:
        if name in state:
            set_state_dict(run.nets[name], run.opts[name], model_state_dict=state[name]["model"],
                           optim_state_dict=state[name]["optim"])
    run.step = state["step"]
    if run.writes:
        print(f"stage {run.cfg.stage} goes on at step {run.step}")
