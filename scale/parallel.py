"""Many devices: everything that spreads a network over processes is applied from outside, here.

    torchrun --nproc_per_node 8 train.py                         FSDP2: 1/8 of all weights each
    torchrun --nproc_per_node 8 train.py --context-parallel 2    two processes share a clip's tokens

shard() is the one function for every network, also for one process: context parallelism,
compilation, activation checkpointing, FSDP2, in the order in which they must be applied.
"""
import contextlib
import functools
import gc
import os
import warnings
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard)
from torch.utils.checkpoint import checkpoint

from utils.errors import UsageError, first_line, require, wait_for_the_first

# keys and values leave a block as views, and nothing changes them in place
warnings.filterwarnings("ignore", "FSDP2-wrapped module")
# of RoPE, a small part of a compiled block
warnings.filterwarnings("ignore", ".*code generation for complex")


# ---------------------------------------------------------------- processes

def world():
    """(rank, number of processes)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device_type():
    """The kind of device that the processes communicate between."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def check_environment():
    """torchrun's five variables, or none of them: clusters set some. UsageError that names what is
    missing, or does not fit."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    remedy = "start it with torchrun, or unset RANK for one process"
    require(not missing, f"RANK is set and {', '.join(missing)} not: {remedy}")
    for name in set(names) - {"MASTER_ADDR"}:
        value = os.environ[name]
        require(value.isdecimal(), f"{name} is {value!r}, which is no number: {remedy}")
    rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    require(rank < number, f"RANK is {rank} and WORLD_SIZE {number}: {remedy}")


def connect(cuda):
    """Join the process group; returns the store that all of its processes can reach."""
    # the first process writes and scores alone at the end of a stage, while the others wait
    timeout = timedelta(hours=2)
    try:
        store, rank, number = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, store=store, rank=rank,
                                world_size=number)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(f"the processes do not find each other at {where} ({first_line(error)}): "
                         "choose another MASTER_PORT, or start them with torchrun") from None
    return store


def said_before(store, sentence):
    """Whether another process has said this sentence. All that fail alike say it once."""
    try:
        return store.add(f"said {zlib.crc32(sentence.encode())}", 1) > 1
    except Exception:  # the store went with the first process: better twice than never
        return False


@contextlib.contextmanager
def processes(device=""):
    """The process group that torchrun asks for, if it does. It is taken down in the order that does
    not abort: sharded modules must be gone before their process group."""
    store = None
    if os.environ.get("RANK"):
        cuda = device == "cuda" or not device and torch.cuda.is_available()
        rank = os.environ.get("LOCAL_RANK", "")
        if cuda and rank.isdecimal():
            number = torch.cuda.device_count()
            require(int(rank) < number, f"this machine has {number} GPUs and torchrun asks for "
                    "more processes: lower --nproc_per_node, or use --device cpu")
        check_environment()
        if cuda:
            torch.cuda.set_device(int(rank))
        store = connect(cuda)
    try:
        yield
    except (UsageError, OSError) as error:
        if store is None or not said_before(store, str(error)):
            raise
        wait_for_the_first()
        raise SystemExit(2) from None
    finally:
        gc.collect()
        context_group.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def averaged(log):
    """The mean over processes of a dict of numbers."""
    if not dist.is_initialized():
        return log
    values = torch.tensor(list(log.values()), dtype=torch.float64, device=device_type())
    dist.all_reduce(values)
    return dict(zip(log, (values / dist.get_world_size()).tolist()))


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def say(text):
    """Print, in the first process only."""
    if world()[0] == 0:
        print(text, flush=True)


def on_rank0(function, *args):
    """function(*args), called by the first process for all. If it fails, all processes stop and the
    first one says why."""
    answer = [None]
    if world()[0] == 0:
        try:
            answer = [function(*args)]
        except (UsageError, OSError) as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        if world()[0]:
            wait_for_the_first()
            raise SystemExit(2)
        raise answer[0]
    return answer[0]


# ---------------------------------------------------------------- weights

def full_tensor(x):
    """The full tensor of a sharded one."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local_shard(param):
    """(local tensor, its rows of the full tensor) of a parameter. FSDP2 cuts as torch.chunk."""
    if not hasattr(param, "to_local"):
        return param, slice(None)
    (rank, size), rows = world(), param.shape[0]
    each = -(-rows // size)
    return param.to_local(), slice(min(rank * each, rows), min((rank + 1) * each, rows))


def blocks_of(module):
    """The transformer blocks of a DiT, or of the one inside a discriminator."""
    return getattr(module, "backbone", module).blocks


def shard(module, checkpointing=False, compiled=False, half=False, context=1, offloaded=False):
    """Apply everything that distributes a network; the same network, changed in place.

    checkpointing  keep only the input of a block, run the block again in the backward pass
    compiled       torch.compile, block by block; all blocks share one compilation
    half           gather weights in bfloat16; shards, gradient sums and optimizer stay float32
    context        processes that share the tokens of a clip, see share_tokens()
    offloaded      a frozen network's weights stay in host memory, see allocate()"""
    if context > 1:
        share_tokens(module, context_group(context))
    for block in blocks_of(module):
        if compiled:  # one code for all blocks: several networks, with and without gradients,
            torch._dynamo.config.recompile_limit = 64  # and caches of several lengths
            # what is compiled must not depend on what came before, or a resumed run would differ
            block.forward = torch.compile(block.forward, dynamic=False)
        if checkpointing:  # outside, or nothing is compiled; a block is a pure function, so
            block.forward = functools.partial(checkpoint, block.forward,  # running it twice is safe
                                              use_reentrant=False)
    if dist.is_initialized():
        mesh = init_device_mesh(device_type(), (dist.get_world_size(),))
        dtype = torch.bfloat16 if half else None
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        host = CPUOffloadPolicy() if offloaded and device_type() == "cuda" else OffloadPolicy()
        for block in blocks_of(module):
            fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=host)
        # what is in no block stays gathered between passes, and a rollout's gradients add up in its
        # precision
        policy = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=host)
    return module


def allocate(module, device, offloaded=False):
    """Give a network that shard() has prepared its memory on the device; returns it. The blocks of
    an offloaded one stay in host memory, and each is on the device while it runs."""
    if not offloaded:
        return module.to_empty(device=device)
    if dist.is_initialized():  # FSDP brings the blocks itself
        return module.to_empty(device="cpu")
    for block in blocks_of(module):
        block.to_empty(device="cpu")
        block.register_forward_pre_hook(functools.partial(bring, device))
        block.register_forward_hook(take_away)
    for name, child in module.named_children():
        if name != "blocks":
            child.to_empty(device=device)
    return module


def bring(device, block, _):
    """Put a block's weights on the device; those in host memory are kept as they are."""
    block.at_home = [p.data for p in block.parameters()]
    for p in block.parameters():
        p.data = p.data.to(device, non_blocking=True)


def take_away(block, *_):
    """Back to the weights in host memory; frozen, they have not changed."""
    for p, home in zip(block.parameters(), block.at_home):
        p.data = home
    del block.at_home


# ---------------------------------------------------------------- tokens (Ulysses)

@functools.lru_cache
def context_group(size):
    """The processes that share a clip with this one: `size` neighbours."""
    mesh = init_device_mesh(device_type(), (world()[1] // size, size),
                            mesh_dim_names=("data", "context"))
    return mesh.get_group("context")


class Exchange(torch.autograd.Function):
    """All-to-all over a group: parts[j] goes to its process j, and becomes what process j has for
    this one. Applied twice it is the identity, so it is its own backward pass."""

    @staticmethod
    def forward(ctx, parts, group):
        ctx.group, parts = group, parts.contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return Exchange.apply(gradient, ctx.group), None


def share_tokens(module, group):
    """Give each process of `group` 1/p of a frame's tokens (Ulysses, 2309.14509), by hooks. Around
    attention an all-to-all turns (all heads, some tokens) into (some heads, all tokens) and back.
    Every process backpropagates the loss of the whole clip, and gathering sums these. The mean over
    processes is the gradient: FSDP takes it for weights, mean_gradient() for the clip."""
    net, size = getattr(module, "backbone", module), dist.get_world_size(group)

    def exchange(parts, join):
        return torch.cat(Exchange.apply(parts, group).unbind(), join)

    def gather(x, join):  # x to every process; backward, expand sums what comes back
        return exchange(x.expand(size, *x.shape), join)

    def to_heads(_, args, y):  # (b, f, n / p, dim) -> (b, f, n, dim / p)
        if torch.is_autocast_enabled(y.device.type):
            y = y.to(torch.get_autocast_dtype(y.device.type))
        return exchange(torch.stack(y.chunk(size, 3)), 2)

    def to_tokens(_, args):  # and back
        return exchange(torch.stack(args[0].chunk(size, 2)), 3)

    def own_tokens(_, args):
        tokens = args[0].shape[2]
        require(tokens % size == 0, f"--context-parallel {size} does not divide the {tokens} "
                "tokens of a frame: choose another --size")
        return args[0].chunk(size, 2)[dist.get_rank(group)], *args[1:]

    def mean_gradient(gradient):
        gradient = gradient / size
        dist.all_reduce(gradient, group=group)
        return gradient

    def hook_clip(_, args):
        x, *rest = args
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(mean_gradient)
        return x, *rest

    net.register_forward_pre_hook(hook_clip)
    net.blocks[0].register_forward_pre_hook(own_tokens)
    for block in net.blocks:
        block.self_attn.heads //= size
        for layer in (block.self_attn.v, block.self_attn.norm_q, block.self_attn.norm_k):
            layer.register_forward_hook(to_heads)
        block.self_attn.o.register_forward_pre_hook(to_tokens)
    net.head.register_forward_hook(lambda _, args, y: gather(y, 2))
    if module is not net:  # a discriminator: its queries read all tokens
        for head in module.heads:
            head.register_forward_pre_hook(lambda _, args: gather(args[0], 1))
