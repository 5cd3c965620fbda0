"""The network: Wan 2.1's video DiT, whose official weights load as they are, used in two ways.

Bidirectional, it is the teacher, the fake score and the discriminator's backbone. With a
block-causal mask or a KV cache, both arguments of the same forward pass, it is the student.

    video   (b, f, c, h, w)   f latent frames, values around [-1, 1] (toy: unit variance)
    time    (b, f)            one value PER FRAME, 0 = clean, 1 = noise
    text    (b, l, d)         embeddings, zero-padded to `text_len`; Wan attends to the padding
    output  (b, f, c, h, w)   the flow  v = eps - x0
"""
import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

try:  # optional: SDPA is the default and is enough
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


@dataclass
class Shape:
    """What the weights depend on. The defaults are the preset `toy`; PRESETS has the others."""
    dim: int = 128              # width of the residual stream
    ffn_dim: int = 512          # hidden width of the feed-forward layers
    num_heads: int = 4          # attention heads; dim / num_heads must be even
    num_layers: int = 4         # transformer blocks
    in_dim: int = 12            # latent channels of the input
    out_dim: int = 12           # latent channels of the output
    patch: int = 2              # side of a square patch, in latent pixels (Wan: 1 x 2 x 2)
    freq_dim: int = 64          # sinusoids in the time embedding
    text_dim: int = 32          # width of a text embedding
    text_len: int = 6           # text tokens, padding included
    eps: float = 1e-6           # epsilon of every LayerNorm and RMSNorm
    precondition: bool = True   # skip connection around the network (PreconditionedDiT)


@dataclass
class Config(Shape):
    """The network, and the stream it generates."""
    frames: int = 10            # latent frames of a training clip, the conditioning image included
    first: int = 1              # latent frames of the conditioning image, its own chunk; 0: none
    chunk: int = 3              # latent frames generated together
    sink: int = 1               # earliest frames, kept in the cache for ever
    window: int = 6             # latest frames kept in the cache, before the current chunk
    shift: float = 12.0         # timestep shift s: t' = s t / (1 + (s - 1) t)
    absolute_positions: bool = False  # positions are frame numbers of the video (Self Forcing)


_WAN = dict(in_dim=16, out_dim=16, patch=2, freq_dim=256, text_dim=4096, text_len=512,
            precondition=False, frames=21, first=1, chunk=4, sink=1, window=9, shift=5.0)
PRESETS = {  # name -> what differs from the defaults
    "toy": {},
    "wan-1.3b": dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **_WAN),
    "wan-14b": dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **_WAN),
}


# ---------------------------------------------------------------- masks
def chunk_bounds(frames, first, chunk):
    """[(start, end)] of a clip's chunks: `first` frames, then `chunk` each. Raises ValueError."""
    if chunk < 1 or first < 0:
        raise ValueError(f"--chunk {chunk} --first {first}: --chunk takes 1 or more, --first 0")
    fitting = first + max(1, round((frames - first) / chunk)) * chunk
    if frames != fitting:
        raise ValueError(f"{frames} frames do not divide into a first chunk of {first} and chunks "
                         f"of {chunk}: use --frames {fitting}, or another --chunk")
    chunks = [(start, start + chunk) for start in range(first, frames, chunk)]
    return [(0, first), *chunks] if first else chunks


def block_causal_mask(frames, first, chunk, reach=None, sink=0):
    """(f, f) bool, [query, key]: bidirectional inside a chunk, causal across chunks. With `reach`
    a chunk sees, itself included, the latest `reach` frames, and the first `sink` frames."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for start, end in chunk_bounds(frames, first, chunk):
        oldest = 0 if reach is None else max(0, end - reach)
        mask[start:end, oldest:end] = True
        mask[start:end, :min(sink, end)] = True
    return mask


def stream_mask(cfg, frames=None):
    """The frames of a training clip that the student's cache would let each frame see."""
    return block_causal_mask(frames or cfg.frames, cfg.first, cfg.chunk, cfg.window + cfg.chunk,
                             cfg.sink)


def mask_to_groups(mask):
    """The same mask as a list of (query frames, slices of key frames) for runs of equal rows."""
    groups, end = [], 0  # of an index by a list torch 2.13 compiles a wrong gradient (issue 191837)
    for row, run in itertools.groupby(mask.tolist()):
        start, end = end, end + len(list(run))
        edges = [i for i, (a, b) in enumerate(zip([False, *row], [*row, False])) if a != b]
        groups.append((slice(start, end), list(map(slice, edges[::2], edges[1::2]))))
    return groups


# ---------------------------------------------------------------- attention
def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of q, k, v (b, l, heads, d): flash-attn if installed, or SDPA."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and q.is_cuda and flash_attn_func is not None:
        return flash_attn_func(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if half and q.device.type == "cpu" and q.requires_grad and q.shape[2] * k.shape[2] <= 2 ** 20:
        # on a CPU the backward pass of SDPA takes three times as long in bfloat16 (torch 2.13)
        return (torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def framewise_attention(q, k, v, groups):
    """Masked attention for q, k, v (b, f, n, heads, d), n tokens a frame -> (b, f, n, heads * d).
    One unmasked call per group of frames with the same keys: Wan's token mask would take 1 GB."""
    def seen(x, keys):
        return x[:, keys[0]] if len(keys) == 1 else torch.cat([x[:, run] for run in keys], 1)
    out = [attention(*(x.flatten(1, 2) for x in (q[:, queries], seen(k, keys), seen(v, keys))))
           for queries, keys in groups]
    return rearrange(torch.cat(out, 1), "b (f n) h d -> b f n (h d)", n=q.shape[2])


@functools.lru_cache(maxsize=16)
def rope_table(positions, h, w, head_dim, device):
    """The 3-D rotary embedding as complex numbers e^(i angle): (f, h*w, 1, head_dim / 2).
    positions: tuple of f frame positions. A head's numbers are split into time | height | width; a
    part of n numbers has frequencies 10000^(-2j/n). Angles are float64, as upstream."""
    part = 2 * (head_dim // 6)  # height and width; time takes the rest
    axes = [torch.as_tensor(axis, dtype=torch.float64) for axis in (positions, range(h), range(w))]
    coords = torch.cartesian_prod(*axes).view(len(positions), h * w, 1, 3)  # frame, row, column
    freqs = [10000.0 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
             for n in (head_dim - 2 * part, part, part)]
    angles = torch.cat([x[..., None] * freq for x, freq in zip(coords.unbind(-1), freqs)], -1)
    return torch.complex(angles.cos().float(), angles.sin().float()).to(device)


def rotate(x, rope):
    """Rotary embedding of x (b, f, n, heads, d) in float32: each pair of numbers turns."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it fuses real arithmetic only
        (a, b), cos, sin = pairs.unbind(-1), rope.real, rope.imag
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(-2).to(x.dtype)


class GELU(nn.GELU):
    """Wan's tanh form; on a CPU in bfloat16 the exact one: 3 times as fast, at most 5e-4 away."""
    def forward(self, x):
        fast = x.device.type == "cpu" and x.dtype == torch.bfloat16
        return F.gelu(x, approximate="none" if fast else "tanh")


class SelfAttention(nn.Module):
    """Attention of a video to itself and, with a cache, to its past. A norm is over all heads."""
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(cfg.dim, eps=cfg.eps) for _ in range(2))

    def qkv(self, x, context):
        """Queries of x, keys and values of `context`, each (..., heads, d)."""
        v = self.v(context)
        q = self.norm_q(self.q(x).to(self.norm_q.weight.dtype))
        k = self.norm_k(self.k(context).to(self.norm_k.weight.dtype))
        return [y.to(v.dtype).unflatten(-1, (self.heads, -1)) for y in (q, k, v)]

    def forward(self, x, rope_q, rope_k, groups, past=None):
        """x (b, f, n, dim) -> the same, and its keys and values BEFORE RoPE, for a cache.
        groups: from mask_to_groups(); past: (k, v) of earlier frames, which come before x."""
        if torch.is_autocast_enabled(x.device.type):  # cast once, not once for each of q, k and v
            x = x.to(torch.get_autocast_dtype(x.device.type))
        q, k, v = self.qkv(x, x)
        keys, values = (k, v) if past is None else (torch.cat(x, 1) for x in zip(past, (k, v)))
        y = framewise_attention(rotate(q, rope_q), rotate(keys, rope_k), values, groups)
        return self.o(y), (k, v)


class CrossAttention(SelfAttention):
    """Attention to the text: the same parameters, no positions."""
    def forward(self, x, text):
        """x (b, f, n, dim), text (b, l, dim) -> (b, f, n, dim)"""
        y = attention(*self.qkv(x.flatten(1, 2), text))
        return self.o(rearrange(y, "b (f n) h d -> b f n (h d)", n=x.shape[2]))


class Block(nn.Module):
    """Self-attention and feed-forward, modulated by time, and cross-attention to the text."""
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.cross_attn = CrossAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), GELU(),
                                 nn.Linear(cfg.ffn_dim, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e, text, rope_q, rope_k, groups, past=None):
        """x (b, f, n, dim), e (b, f, 6, dim) for all n tokens of a frame, text (b, l, dim) ->
        x, (k, v). It stores nothing, so that activation checkpointing can run it twice."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e)[..., None, :].unbind(2)
        y, kv = self.self_attn(self.norm1(x) * (1 + scale1) + shift1, rope_q, rope_k, groups, past)
        x = x + gate1 * y
        # FSDP may have gathered the affine norm in bfloat16
        x = x + self.cross_attn(self.norm3(x.to(self.norm3.weight.dtype)), text)
        x = x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)
        return x, kv


class Head(nn.Module):
    """Tokens to patches, modulated by the time embedding itself."""
    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = nn.Linear(cfg.dim, cfg.patch ** 2 * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e):
        """x (b, f, n, dim), e (b, f, dim) -> patches (b, f, n, p * p * c); the input has c first"""
        shift, scale = (self.modulation + e[:, :, None])[..., None, :].unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


def timestep_embedding(t, dim):
    """Sinusoids of 1000 t: (b, f) -> (b, f, dim), cosines first. In float32 they err by 3e-6."""
    wide = t.double() if t.device.type != "mps" else t.cpu().double()  # mps has no float64
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=wide.device) / (dim // 2)
    angle = 1000 * wide[..., None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.cos(), angle.sin()], -1).float().to(t.device)


class DiT(nn.Module):
    """The Wan 2.1 text-to-video transformer: bidirectional, unless it gets a mask or a cache."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d, stride = cfg.dim, (1, cfg.patch, cfg.patch)
        self.patch_embedding = nn.Conv3d(cfg.in_dim, d, stride, stride)
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, d), GELU(), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)

    def init_weights(self):
        """Initialisation for training from scratch, as in Wan: xavier matrices, the output zero."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        for m in (*self.text_embedding[::2], *self.time_embedding[::2]):  # their linear layers
            nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        return self

    def embed(self, x, t, text):
        """Tokens (b, f, n, dim), time embedding (b, f, dim) and its six-fold projection, text."""
        p = self.cfg.patch
        # a convolution with stride = kernel is a linear map of patches, channels first
        patches = rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        e = self.time_embedding(timestep_embedding(t, self.cfg.freq_dim)).float()
        e6 = rearrange(self.time_projection(e).float(), "b f (six d) -> b f six d", six=6)
        text = F.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1]))
        return x.float(), e, e6, self.text_embedding(text)  # as a block's: one graph

    def forward(self, x, t, text, *, mask=None, positions=None, cache=None, feature_layers=()):
        """x (b, f, c, h, w), t (b, f) in [0, 1], text (b, l, text_dim) -> flow (b, f, c, h, w).
        mask            (f, f) bool of frames, [query, key]; None: every frame sees every frame
        positions       f frame positions for RoPE; default 0 .. f-1
        cache           KVCache: x is the chunk after it, and becomes its present chunk
        feature_layers  indices of blocks whose hidden states are returned as well
        Raises ValueError for sides that are no multiples of a patch, and for too long a text."""
        cfg, p, (_, f, _, h, w) = self.cfg, self.cfg.patch, x.shape
        if h % p or w % p:
            raise ValueError(f"latent frames of {h}x{w} do not divide into patches of {p}x{p}")
        if text.shape[1] > cfg.text_len:
            raise ValueError(f"text of {text.shape[1]} tokens, the network takes {cfg.text_len}")
        if cache is not None and (mask is not None or positions is not None):
            raise ValueError("a cache has its own positions, and its chunk sees all: give no mask")
        x, e, e6, text = self.embed(x, t, text)
        h, w, head_dim = h // p, w // p, cfg.dim // cfg.num_heads
        q_pos, k_pos = cache.positions(f) if cache else 2 * [tuple(positions or range(f))]
        rope_q, rope_k = (rope_table(pos, h, w, head_dim, x.device) for pos in (q_pos, k_pos))
        groups = [(slice(None), [slice(None)])] if mask is None else mask_to_groups(mask)
        features, present = [], []
        for i, block in enumerate(self.blocks):
            past = cache.past[i] if cache is not None and cache.past else None
            x, kv = block(x, e6, text, rope_q, rope_k, groups, past)
            if cache is not None:
                present.append(kv)
            if i in feature_layers:
                features.append(x)
        if cache is not None:
            cache.write(present)
        flow = rearrange(self.head(x, e), "b f (h w) (p q c) -> b f c (h p) (w q)", h=h, p=p, q=p)
        return (flow, features) if feature_layers else flow


class PreconditionedDiT(DiT):
    """The same network inside v = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, t) (EDM, 2206.00364,
    table 1): for data of unit variance F's target has unit variance at every t. At t = 1 a plain
    flow network has to copy all of its input, the noise, to its output; a narrow one cannot."""
    def forward(self, x, t, text, **options):
        s = t[..., None, None, None].float()
        power = (1 - s) ** 2 + s ** 2  # the variance of x_t
        out = super().forward(x / power.sqrt(), t, text, **options)
        flow, features = out if options.get("feature_layers") else (out, None)
        flow = (2 * s - 1) / power * x + flow.float() / power.sqrt()
        return flow if features is None else (flow, features)


def build(cfg):
    """The network that a Config asks for, uninitialised."""
    return PreconditionedDiT(cfg) if cfg.precondition else DiT(cfg)


# ---------------------------------------------------------------- the KV cache
class KVCache:
    """Keys and values of the first `sink` frames and of the last `window` frames of a stream.

    Keys are stored BEFORE RoPE; positions are counted at reading, inside [sink | window | chunk]
    (StreamingLLM, 2309.17453): a trained range. relative=False: frame numbers of the video (Self
    Forcing). detach=False: gradients pass. Each pass overwrites `present`; commit() keeps it."""
    def __init__(self, sink=1, window=None, relative=True, detach=True):
        self.sink, self.window, self.relative, self.detach = sink, window, relative, detach
        self.past = self.present = None  # per layer (k, v), each (b, frames, n, heads, d)
        self.kept, self.committed = [], 0  # frame numbers in `past`; frames committed so far

    def positions(self, frames):
        """RoPE positions of the next `frames` frames, and of all keys that they see."""
        numbers = (*self.kept, *range(self.committed, self.committed + frames))
        keys = tuple(range(len(numbers))) if self.relative else numbers
        return keys[len(self.kept):], keys

    def write(self, present):
        """Store the keys and values of the current chunk."""
        self.present = [(k.detach(), v.detach()) for k, v in present] if self.detach else present

    def commit(self):
        """The present chunk joins the past, which forgets the frames between sink and window."""
        frames = self.present[0][0].shape[1]
        self.kept += range(self.committed, self.committed + frames)
        self.committed += frames
        layers = self.present if self.past is None else [
            (torch.cat([pk, k], 1), torch.cat([pv, v], 1))
            for (pk, pv), (k, v) in zip(self.past, self.present)]
        oldest = 0 if self.window is None else len(self.kept) - self.window  # of the window
        keep = [i for i in range(len(self.kept)) if i < self.sink or i >= oldest]
        if len(keep) < len(self.kept):
            self.kept = [self.kept[i] for i in keep]
            layers = [(k[:, keep], v[:, keep]) for k, v in layers]
        self.past, self.present = layers, None
