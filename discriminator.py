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

from model import attention, stream_mask


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

    backbone  a DiT; None: the heads alone, for the shape `cfg`
    layers    indices of the blocks that are read (Wan 14B: 19, 29, 39 of 40)
    outputs   logits in place of each one, a last dimension if there are several (ASD)
    """
    def __init__(self, backbone, layers, causal=False, granularity="clip", queries=1, outputs=1,
                 cfg=None):
        super().__init__()
        cfg = cfg or backbone.cfg
        width = len(layers) * queries * cfg.dim
        self.backbone, self.layers = backbone, list(layers)
        self.causal, self.granularity = causal, granularity
        self.heads = nn.ModuleList(QueryHead(cfg.dim, cfg.num_heads, queries) for _ in layers)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, outputs)
        nn.init.normal_(self.out.weight, std=1e-3)  # logits start near 0, whatever the features
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t, t, text, with_flow=False, detach=False):
        """x_t (b, f, c, h, w), a clip noised to t (b, f) -> logits.
        with_flow: (logits, the backbone's flow), for a fake score that is a discriminator too
        detach: the logits send no gradient to the backbone"""
        cfg, f = self.backbone.cfg, x_t.shape[1]
        mask = stream_mask(cfg, f) if self.causal else None
        flow, features = self.backbone(x_t, t, text, mask=mask, feature_layers=self.layers)
        if detach:
            features = [tokens.detach() for tokens in features]
        frames, first = {"clip": (f, 0), "chunk": (cfg.chunk, cfg.first),
                         "frame": (1, cfg.first)}[self.granularity]  # frames per logit, and skipped
        answers = [head(rearrange(tokens[:, first:], "b (g f) n d -> (b g) (f n) d", f=frames))
                   for head, tokens in zip(self.heads, features)]
        # float32: a relativistic loss leaves the common level of all logits free; they drift, and
        # near 3 bfloat16 resolves only 0.016
        answers = torch.cat(answers, -1).float()
        with torch.autocast(answers.device.type, enabled=False):
            logits = self.out(self.norm(answers))
        if self.granularity != "clip":
            logits = rearrange(logits, "(b g) n -> b g n", b=len(x_t))
        logits = logits.squeeze(-1)
        return (logits, flow) if with_flow else logits


def has_heads(cfg, name):
    """Whether one of a stage's networks is a discriminator: its own, or the fake score."""
    shared = cfg.stage > 1 and cfg.gan_weight > 0 and cfg.disc_backbone != "own"
    return name == "disc" or name == "fake" and shared


def disc_outputs(cfg):
    """Logits of a discriminator: one, or one for each number of passes that has a next (ASD)."""
    return cfg.student_steps[0] - 1 if cfg.gan_real == "more" else 1
