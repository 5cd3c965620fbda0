"""A DiT that is asked one question: is this clip real? Two switches span the paper's table 3.

    backbone     bidirectional (every frame sees the clip)  or  causal (the student's mask)
    granularity  one logit per clip                         or  per chunk, or per frame

AAD-1 is bidirectional with one logit per clip. The student is causal and the discriminator is not:
that is the asymmetry in the name. A single logit is free to weigh motion and drift, which no single
frame shows. The heads are APT's (2501.08316): at some layers learnable queries cross-attend to the
tokens; their answers are concatenated, normalised and mapped to a logit.
"""
import torch
import torch.nn as nn
from einops import rearrange

from model import attention, block_causal_mask


class QueryHead(nn.Module):
    """`queries` learnable questions to the tokens of one layer.

    The paper adds the query to the answer. We leave it out: it puts a large offset into every
    logit, the same for real and fake, before anything is learnt."""
    def __init__(self, dim, heads, queries):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(queries, dim))
        self.norm = nn.LayerNorm(dim)
        self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens):
        """(b, l, dim) -> (b, queries * dim)"""
        tokens = self.norm(tokens)
        k, v = self.k(tokens), self.v(tokens)
        # expanded before the cast, so that the gradients of a batch add up in float32
        q = self.query.expand(len(tokens), -1, -1).to(v.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        return self.o(attention(q, k, v).flatten(2)).flatten(1)


class Discriminator(nn.Module):
    """Logits of noised clips: (b,) per clip, (b, chunks) or (b, frames).

    Per chunk and per frame the conditioning image has no logit: it is the same in real and
    generated clips.

    backbone  a DiT, whose flow head is unused; None: the heads alone, for the shape `cfg`
    layers    indices of the blocks that are read (Wan 14B: 19, 29, 39 of 40)
    """
    def __init__(self, backbone, layers, causal=False, granularity="clip", queries=1, cfg=None):
        super().__init__()
        cfg = cfg or backbone.cfg
        width = len(layers) * queries * cfg.dim
        self.backbone, self.layers = backbone, list(layers)
        self.causal, self.granularity = causal, granularity
        self.heads = nn.ModuleList(QueryHead(cfg.dim, cfg.num_heads, queries) for _ in layers)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        nn.init.normal_(self.out.weight, std=1e-3)  # starts at chance, whatever the features
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t, t, text):
        """x_t (b, f, c, h, w), a clip noised to t (b, f) -> logits"""
        cfg, f = self.backbone.cfg, x_t.shape[1]
        mask = None
        if self.causal:
            mask = block_causal_mask(f, cfg.first, cfg.chunk, cfg.window + cfg.chunk, cfg.sink)
        _, features = self.backbone(x_t, t, text, mask=mask, feature_layers=self.layers)
        frames, first = {"clip": (f, 0), "chunk": (cfg.chunk, cfg.first),
                         "frame": (1, cfg.first)}[self.granularity]  # per logit, and left out
        answers = [head(rearrange(tokens[:, first:], "b (g f) n d -> (b g) (f n) d", f=frames))
                   for head, tokens in zip(self.heads, features)]
        # float32: a relativistic loss leaves the common level of all logits free; they drift, and
        # near 3 bfloat16 resolves only 0.016
        answers = torch.cat(answers, -1).float()
        with torch.autocast(answers.device.type, enabled=False):
            logits = self.out(self.norm(answers)).squeeze(-1)
        if self.granularity == "clip":
            return logits
        return rearrange(logits, "(b g) -> b g", b=len(x_t))
