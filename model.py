"""The network: Wan 2.1's video DiT, used both ways.

Bidirectional, it is the teacher, the fake score and the discriminator's backbone. With a block-causal mask, or with a
KV cache, it is the student that writes a video chunk after chunk. The weights are the same: visibility is an argument.

    video   (b, f, c, h, w)   f latent frames, values around [-1, 1] (toy: unit variance)
    time    (b, f)            one value PER FRAME, 0 = clean, 1 = noise
    text    (b, l, d)         embeddings, zero-padded to `text_len`; the padding is attended, as in Wan
    output  (b, f, c, h, w)   the flow  v = eps - x0

Parameter names are exactly those of the official checkpoints, which therefore load as they are, every name and shape checked.
Parallelism is put on from outside (parallel.py): nothing here knows of devices or processes.
"""
import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open

try:  # optional: SDPA is the default and is enough
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


@dataclass
class Shape:
    """The network: what its weights fit. Defaults are the preset `toy`; see PRESETS for the others."""
    dim: int = 128              # width of the residual stream
    ffn_dim: int = 512          # hidden width of the feed-forward layers
    num_heads: int = 4          # attention heads; dim / num_heads must be even
    num_layers: int = 4         # transformer blocks
    in_dim: int = 12            # latent channels going in
    out_dim: int = 12           # latent channels coming out
    patch: int = 2              # side of a square patch, in latent pixels (Wan: 1 x 2 x 2)
    freq_dim: int = 64          # sinusoids in the time embedding
    text_dim: int = 32          # width of a text embedding
    text_len: int = 6           # text tokens, padding included
    eps: float = 1e-6           # of every LayerNorm and RMSNorm
    precondition: bool = True   # skip connection around the network (see PreconditionedDiT); off for Wan


@dataclass
class Config(Shape):
    """The network, and the stream it writes."""
    frames: int = 10            # latent frames of a training clip, the conditioning image included
    first: int = 1              # latent frames of the conditioning image, a chunk of its own; 0: text alone
    chunk: int = 3              # latent frames written together
    sink: int = 1               # earliest frames kept in the cache for ever
    window: int = 6             # latest generated frames kept in the cache, before the current chunk
    shift: float = 8.0          # timestep shift s: t' = s t / (1 + (s - 1) t)


_WAN = dict(in_dim=16, out_dim=16, patch=2, freq_dim=256, text_dim=4096, text_len=512, precondition=False,
            frames=21, first=1, chunk=4, sink=1, window=9, shift=5.0)
PRESETS = {  # name -> what differs from the defaults
    "toy": {},
    "wan-1.3b": dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **_WAN),
    "wan-14b": dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **_WAN),
}


# ---------------------------------------------------------------- who sees whom

def chunk_bounds(frames, first, chunk):
    """[(start, end)] of every chunk of a clip: one of `first` frames (none if 0), then `chunk` frames each.

    Raises UsageError where the frames do not divide into chunks."""
    require(chunk >= 1 and first >= 0, f"--chunk {chunk} --first {first}: a chunk has at least 1 frame, the image at least 0")
    near = first + max(1, round((frames - first) / chunk)) * chunk
    require(frames == near, f"{frames} frames do not divide into a first chunk of {first} and chunks of {chunk}: "
            f"use --frames {near}, or another --chunk")
    return ([(0, first)] if first else []) + [(start, start + chunk) for start in range(first, frames, chunk)]


def block_causal_mask(frames, first, chunk, window=None, sink=0):
    """(f, f) bool, [query, key]: bidirectional inside a chunk, causal across chunks.

    With `window`, a frame sees only the last `window` frames up to the end of its own chunk (the chunk included), and the
    first `sink` ones."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for start, end in chunk_bounds(frames, first, chunk):
        mask[start:end, 0 if window is None else max(0, end - window):end] = True
        mask[start:end, :min(sink, end)] = True
    return mask


def teacher_forcing_mask(frames, first, chunk):
    """(2f, 2f) bool for the sequence [clean | noisy]: the clean half is block-causal; a noisy chunk sees the clean
    chunks before it, and itself. Such a pass equals cached inference on a clean history."""
    mask = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    mask[:frames, :frames] = block_causal_mask(frames, first, chunk)
    for start, end in chunk_bounds(frames, first, chunk):
        mask[frames + start:frames + end, :start] = True
        mask[frames + start:frames + end, frames + start:frames + end] = True
    return mask


def visibility(mask):
    """The same mask as a list of (query frames, key frames): runs of frames that see the same, and what they see."""
    rows, groups = mask.tolist(), []
    for row, alike in itertools.groupby(range(len(rows)), rows.__getitem__):
        queries, keys = list(alike), [k for k, seen in enumerate(row) if seen]
        if keys and keys == list(range(keys[0], keys[-1] + 1)):
            keys = slice(keys[0], keys[-1] + 1)  # a view instead of a copy
        groups.append((slice(queries[0], queries[-1] + 1), keys))
    return groups


# ---------------------------------------------------------------- attention

def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q, k, v of shape (b, l, heads, d): flash-attn where there is one, else SDPA."""
    half, cpu = q.dtype in (torch.bfloat16, torch.float16), q.device.type == "cpu"
    if half and q.is_cuda and flash_attn_func is not None:
        return flash_attn_func(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    if cpu and k.shape[2] <= 16:  # a caption: softmax is slow along rows that short, and fast along columns
        return (torch.softmax(k @ (q * scale).mT, -2).mT @ v).transpose(1, 2)
    if cpu and half and q.requires_grad and q.shape[2] * k.shape[2] <= 2 ** 20:  # SDPA's backward pass takes 3 times as long (torch 2.13)
        return (torch.softmax((q * scale) @ k.mT, -1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def framewise_attention(q, k, v, groups):
    """Masked attention for q, k, v of shape (b, f, n, heads, d), n tokens a frame.

    One unmasked call for each group of frames that see the same: no token mask (1 GB at Wan scale) is ever built,
    no work is spent on what is hidden, and every attention kernel will do."""
    out = [attention(q[:, queries].flatten(1, 2), k[:, keys].flatten(1, 2), v[:, keys].flatten(1, 2))
           for queries, keys in groups]
    return rearrange(torch.cat(out, 1), "b (f n) h d -> b f n (h d)", n=q.shape[2])


@functools.lru_cache(maxsize=16)
def rope_table(positions, h, w, head_dim, device):
    """exp(i angle) of the 3-D rotary angles, as rotate() takes them: (f, h*w, 1, head_dim / 2) complex64, computed in float64.

    `positions` is a tuple of frame positions. The head is split time | height | width, each part with its own
    frequencies 10000^(-2j/part)."""
    part = 2 * (head_dim // 6)
    places = [torch.as_tensor(along, dtype=torch.float64) for along in (positions, range(h), range(w))]
    places = torch.cartesian_prod(*places).view(len(positions), h * w, 1, 3)  # frame, row and column of every token
    angles = torch.cat([places[..., i:i + 1] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
                        for i, width in enumerate((head_dim - 2 * part, part, part))], -1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)


def rotate(x, rope):
    """Rotary embedding of x (b, f, n, heads, d): adjacent pairs, as complex numbers, turn by the angle of their position,
    (x0 + i x1) exp(i angle), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention of a video to itself, and to its past where there is one."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(cfg.dim, eps=cfg.eps) for _ in range(2))  # over the whole width

    def projected(self, x, context):
        """Queries of x, keys and values of `context`, each (..., heads, d). QK norm is over the whole width, in the dtype of its weight."""
        v, dtype = self.v(context), self.norm_q.weight.dtype
        q, k = self.norm_q(self.q(x).to(dtype)), self.norm_k(self.k(context).to(dtype))
        return [y.to(v.dtype).unflatten(-1, (self.heads, -1)) for y in (q, k, v)]

    def forward(self, x, views, past=None):
        """x (b, f, n, dim) -> the same, and its own keys and values BEFORE RoPE, for a cache.

        `views` is a list of (query frames, key frames, rope table of the queries, of the keys, groups from visibility()),
        as a rule a single one; `past` = (k, v) of earlier frames, which come before x among the keys."""
        if torch.is_autocast_enabled(x.device.type):  # one cast, kept once for the backward pass, instead of one for each of q, k and v
            x = x.to(torch.get_autocast_dtype(x.device.type))
        q, k, v = self.projected(x, x)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
        y = [framewise_attention(rotate(q[:, queries], rope_q), rotate(keys[:, seen], rope_k), values[:, seen], groups)
             for queries, seen, rope_q, rope_k, groups in views]
        return self.o(torch.cat(y, 1)), (k, v)


class CrossAttention(SelfAttention):
    """Attention to the text: same parameters, no positions."""

    def forward(self, x, text):
        """x (b, f, n, dim), text (b, l, dim) -> (b, f, n, dim)"""
        y = attention(*self.projected(x.flatten(1, 2), text))
        return self.o(rearrange(y, "b (f n) h d -> b f n (h d)", n=x.shape[2]))


class GELU(nn.Module):
    """The tanh approximation, as in Wan. In bfloat16 on a CPU the exact function: 3 times as fast there (torch 2.13), and at
    most 0.0005 apart from the other, a sixteenth of what bfloat16 tells apart around 1."""

    def forward(self, x):
        return F.gelu(x, approximate="none" if x.dtype == torch.bfloat16 and x.device.type == "cpu" else "tanh")


class Block(nn.Module):
    """Self-attention and feed-forward, both modulated by time; cross-attention to the text, not modulated."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.cross_attn = CrossAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), GELU(), nn.Linear(cfg.ffn_dim, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e, text, views, past=None, done=0):
        """x (b, f, n, dim), e (b, f, 6, dim) -> x, (k, v). A pure function: what to remember is returned, so that
        activation checkpointing may run it twice. The first `done` frames, which `views` then leaves out, only leave
        their keys and values: x comes back without them."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e)[:, :, :, None].unbind(2)
        y, kv = self.self_attn(self.norm1(x) * (1 + scale1) + shift1, views, past)
        x, gate1, shift2, scale2, gate2 = (z[:, done:] for z in (x, gate1, shift2, scale2, gate2))
        x = x + gate1 * y
        x = x + self.cross_attn(self.norm3(x.to(self.norm3.weight.dtype)), text)  # which FSDP may have gathered in bfloat16
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
        """x (b, f, n, dim), e (b, f, dim) -> (b, f, n, patch volume * channels)"""
        shift, scale = (self.modulation + e[:, :, None])[:, :, :, None].unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


def sinusoid(t, dim):
    """Embedding of times t in [0, 1]: (b, f) -> (b, f, dim), cosines first. The one place that multiplies by 1000."""
    wide = t.double() if t.device.type != "mps" else t.cpu().double()  # float32 here costs 3e-6 of accuracy
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float64, device=wide.device) / (dim // 2))
    angle = 1000 * wide[..., None] * freqs
    return torch.cat([angle.cos(), angle.sin()], -1).float().to(t.device)


class DiT(nn.Module):
    """The Wan 2.1 text-to-video transformer.

    model(x, t, text)                          bidirectional pass
    model(x, t, text, mask=mask)               masked pass; mask (f, f) of frames
    model(x, t, text, cache=cache)             pass over one chunk that sees the cache
    model(x, t, text, cache=cache, closing=3)  the same, and the first 3 frames close the chunk before in the same pass
    model(x, t, text, taps=[1, 3])             (flow, [hidden states (b, f, n, dim) after those blocks])
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, (1, cfg.patch, cfg.patch), (1, cfg.patch, cfg.patch))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, cfg.dim), nn.GELU("tanh"), nn.Linear(cfg.dim, cfg.dim))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)

    def init_weights(self):
        """Initialisation for training from scratch, as in Wan: xavier matrices, the output zero."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        for m in (*self.text_embedding, *self.time_embedding):
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        return self

    def forward(self, x, t, text, *, mask=None, positions=None, cache=None, closing=0, taps=None):
        """x (b, f, c, h, w), t (b, f) in [0, 1], text (b, l, text_dim) -> flow (b, f - closing, c, h, w).

        mask       (f, f) bool of frames, [query, key]; None: everything is seen
        positions  f frame positions for RoPE; default 0 .. f-1
        cache      KVCache: x is the chunk that follows it, is given the positions that follow, and is remembered
                   there as the present chunk
        closing    with a cache: so many frames at the front of x are the finished chunk before, whose own context pass
                   rides along; they see what that pass would see, the rest sees what it would see after it.
                   Only their keys and values are wanted, so the last block leaves the rest of them out, as does the flow
        taps       indices of blocks whose hidden states are returned as well
        Raises UsageError for sides that do not divide into patches and for too long a text."""
        p, (_, f, _, h, w) = self.cfg.patch, x.shape
        require(h % p == w % p == 0, f"latent frames of {h}x{w} do not divide into patches of {p}x{p}")
        require(text.shape[1] <= self.cfg.text_len, f"text of {text.shape[1]} tokens, the network takes {self.cfg.text_len}")
        # a convolution with stride = kernel is a linear map of patches
        x = F.linear(rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p),
                     self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        e = self.time_embedding(sinusoid(t, self.cfg.freq_dim)).float()
        e6 = rearrange(self.time_projection(e).float(), "b f (six d) -> b f six d", six=6)
        text = self.text_embedding(F.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1])))

        everything, pos = slice(None), positions or range(f)
        seen = [(everything, everything, pos, pos)] if cache is None else cache.views(f, closing)
        groups = [(everything, everything)] if mask is None else visibility(mask)
        past = cache.past if cache else None
        table = lambda pos: rope_table(tuple(pos), h // p, w // p, self.cfg.dim // self.cfg.num_heads, x.device)
        views = [(queries, keys, table(q_pos), table(k_pos), groups) for queries, keys, q_pos, k_pos in seen]

        hidden, present = [], []
        for i, block in enumerate(self.blocks):
            done = closing if i + 1 == len(self.blocks) else 0
            x, kv = block(x, e6, text, views[1:] if done else views, past[i] if past else None, done)  # views[0]: of those that close
            if cache is not None:  # else nothing is remembered, and kept for nothing
                present.append(kv)
            if taps and i in taps:
                hidden.append(x)
        if cache is not None:
            cache.present = [(k.detach(), v.detach()) for k, v in present] if cache.detach else present
        flow = rearrange(self.head(x, e[:, closing:]), "b f (h w) (p q c) -> b f c (h p) (w q)", h=h // p, p=p, q=p)
        return (flow, hidden) if taps else flow


class PreconditionedDiT(DiT):
    """The same network inside v = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, t), for data of unit variance (EDM, 2206.00364,
    table 1, carried over to flow matching): F has a target of unit variance at every t, and at t = 1 that target is
    -x0. A plain flow network must there copy its whole input, the noise, to its output, which a narrow network can't."""

    def forward(self, x, t, text, **options):
        s = t[..., None, None, None].float()
        power = (1 - s) ** 2 + s ** 2  # the variance of x_t
        out = super().forward(x / power.sqrt(), t, text, **options)
        flow, hidden = out if options.get("taps") else (out, None)
        x, s, power = (z[:, -flow.shape[1]:] for z in (x, s, power))  # those that close a chunk have no flow
        flow = (2 * s - 1) / power * x + flow.float() / power.sqrt()
        return flow if hidden is None else (flow, hidden)


def build(cfg):
    """The network that a Config asks for, uninitialised."""
    return (PreconditionedDiT if cfg.precondition else DiT)(cfg)


class UsageError(ValueError):
    """Something that whoever typed the command can mend: one sentence that names the thing and the remedy."""


def require(condition, sentence):
    """UsageError with this sentence unless the condition holds."""
    if not condition:
        raise UsageError(sentence)


def first_line(error):
    """What an exception says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


# ---------------------------------------------------------------- weights on disk

def open_weights(path):
    """A checkpoint as {name: tensor that is read from the disk when it is sliced}, in the official names.

    path   a .safetensors file; a folder with one, or with a sharded set and its index.json, as Wan 2.1 is published; or a
           .pt state dict, of which `generator_ema` or `generator` is taken where it has them (Self Forcing)
    Raises UsageError where nothing can be read."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist: run the stage that makes it, or check the path")
    index = sorted(path.glob("*.safetensors.index.json"))
    try:
        files = ([path] if path.is_file() else sorted({path / f for f in json.loads(index[0].read_text())["weight_map"].values()})
                 if index else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt")))
        parts = {}
        for file in files:
            if file.suffix == ".safetensors":
                handle = safe_open(file, "pt")
                parts |= {name: handle.get_slice(name) for name in handle.keys()}
            else:
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                state = state.get("generator_ema") or state.get("generator") or state
                parts |= {name.removeprefix("model."): tensor for name, tensor in state.items()}
    except Exception as error:  # every format has its own kinds
        raise UsageError(f"the weights in {path} cannot be read ({first_line(error)}): check who may read them, download them "
                         "again, or train the stage again that made them") from None
    require(parts, f"{path} holds no weights: name a .safetensors or .pt file, or a folder of .safetensors files")
    return parts


def load_into(net, weights, where, part=lambda p: (p, slice(None))):
    """Fill a network strictly, one tensor at a time; UsageError with the first names that do not fit.

    weights   a state dict, or open_weights()
    part      callable parameter -> (tensor to fill, the rows of the whole that it holds), for a sharded network"""
    params = dict(net.named_parameters())
    want = {name: tuple(p.shape) for name, p in params.items()}
    have = {name: tuple(w.get_shape() if hasattr(w, "get_shape") else w.shape) for name, w in weights.items()}
    for what, names in (("lacks", want.keys() - have.keys()), ("has unknown", have.keys() - want.keys()),
                        ("has another shape of", {k for k in want.keys() & have.keys() if want[k] != have[k]})):
        require(not names, f"{where} {what} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''} "
                f"({len(names)} in all): choose the preset and flags it was trained with")
    with torch.no_grad():
        for name, param in params.items():
            target, rows = part(param)
            if target.numel():
                target.copy_(weights[name][rows])
    return net


# ---------------------------------------------------------------- memory of a stream

class KVCache:
    """What a stream remembers: keys and values of the first `sink` frames and of the last `window` frames.

    Keys are stored BEFORE RoPE and are given positions when they are read, counted inside [sink | window | chunk]
    (StreamingLLM, 2309.17453; AAD-1 section 3.1): distances never leave the trained range, however long the stream.
    With relative=False positions are frame numbers in the video, as in Self Forcing. With detach=False gradients pass.

    A pass over a chunk writes `present`, over whatever an earlier pass on the same chunk wrote; commit() ends the chunk.
    Memory is constant: (sink + window + chunk) * tokens * 2 * dim values a layer, a chunk more while a context pass rides along.

    An example, frames 0 | 1-3 | 4-6: frame 0 is past, 1-3 have been written and are to enter the cache while 4-6 are made, in one
    call of 6 frames with closing=3. views(6, 3) says that frames 1-3 see 0-3 and frames 4-6 see 0-6; commit(3) then makes 1-3 past,
    and 4-6 the present. With sink 1 and window 6, frames 7-9 see 0-9, and once they are committed 1-3 are forgotten.
    """

    def __init__(self, sink=1, window=None, relative=True, detach=True):
        self.sink, self.window, self.relative, self.detach = sink, window, relative, detach
        self.past = None     # per layer (k, v), each (b, kept frames, n, heads, d)
        self.present = None  # the same for the current chunk
        self.kept = []       # frame number in the video of every frame in `past`
        self.seen = 0        # frames committed so far

    def views(self, frames, closing=0):
        """Who sees what when `frames` frames follow: [(query frames, key frames, positions of the queries, of the keys)].

        With `closing`, the first so many of them see what stands now, the others what commit(closing) would leave."""
        parts, old = [], len(self.kept)
        for start, end, keys in ((0, closing, list(range(old))), (closing, frames, self.left(closing))):
            keys = keys + list(range(old + start, old + end))
            numbers = self.kept + list(range(self.seen, self.seen + frames))
            pos = range(len(keys)) if self.relative else [numbers[i] for i in keys]
            contiguous = keys == list(range(len(keys)))  # then a slice, which is a view; a list makes a copy
            if end > start:  # the queries are the last of the keys
                parts.append((slice(start, end), slice(0, len(keys)) if contiguous else keys, pos[start - end:], pos))
        return parts

    def left(self, frames):
        """Which of the kept frames and `frames` that follow them remain once these are committed: their indices."""
        total = len(self.kept) + frames
        return [i for i in range(total) if i < self.sink or self.window is None or i >= total - self.window]

    def commit(self, frames=None):
        """The present chunk, or its first `frames` frames, becomes past; the oldest beyond sink + window are forgotten."""
        frames = self.present[0][0].shape[1] if frames is None else frames
        keep = self.left(frames)
        now = [(k[:, :frames], v[:, :frames]) for k, v in self.present]
        self.present = [(k[:, frames:], v[:, frames:]) for k, v in self.present]
        self.kept += range(self.seen, self.seen + frames)
        self.seen += frames
        if self.past is not None:
            now = [(torch.cat([pk, k], 1), torch.cat([pv, v], 1)) for (pk, pv), (k, v) in zip(self.past, now)]
        if len(keep) < len(self.kept):
            self.kept, now = [self.kept[i] for i in keep], [(k[:, keep], v[:, keep]) for k, v in now]
        self.past = now
