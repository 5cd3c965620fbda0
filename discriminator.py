"""A DiT that is asked one question: is this clip real? Two switches span the paper's table 3.

    backbone     bidirectional (every frame sees the whole clip)  or  causal (the student's block-causal mask)
    granularity  one logit for the whole clip                     or  one logit for every frame

AAD-1 is bidirectional + video-wise: the student is causal, its judge is not (the asymmetry in the name), and a single
logit leaves the judge free to weigh motion and drift, which no single frame shows. Heads are APT's (2501.08316): at some
layers learnable queries cross-attend to the tokens; their answers are concatenated, normalised, and mapped to a logit.
"""
import torch
import torch.nn as nn
from einops import rearrange

from model import attention, block_causal_mask


class QueryHead(nn.Module):
    """`queries` learnable questions to the tokens of one layer. No residual of the query: it would put a large offset
    into every logit, the same for real and fake, before anything is learnt."""

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
        q = self.query.expand(len(tokens), -1, -1).to(v.dtype)  # in this order: the gradient of a batch adds up in float32
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        return self.o(attention(q, k, v).flatten(2)).flatten(1)


class Discriminator(nn.Module):
    """Logits of noised clips: (b,) video-wise; (b, f - first) frame-wise, where the given image, which is the same in real and
    generated clips, is not asked about.

    backbone   a DiT; its flow head is not used (One-Forcing shares it with the fake score); None: heads alone, of `cfg`
    layers     indices of the blocks that are asked (Wan 14B: 19, 29, 39 of 40)
    """

    def __init__(self, backbone, layers, causal=False, framewise=False, queries=1, cfg=None):
        super().__init__()
        cfg = cfg or backbone.cfg
        dim = cfg.dim
        self.backbone, self.layers, self.causal, self.framewise = backbone, list(layers), causal, framewise
        self.heads = nn.ModuleList(QueryHead(dim, cfg.num_heads, queries) for _ in layers)
        self.norm = nn.LayerNorm(len(self.layers) * queries * dim)
        self.out = nn.Linear(len(self.layers) * queries * dim, 1)
        nn.init.normal_(self.out.weight, std=1e-3)  # starts at chance, whatever the features
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t, t, text):
        """x_t (b, f, c, h, w) noised to t (b, f), the level that the discriminator is told -> logits"""
        cfg, f = self.backbone.cfg, x_t.shape[1]
        mask = block_causal_mask(f, cfg.first, cfg.chunk, cfg.window + cfg.chunk, cfg.sink) if self.causal else None
        _, hidden = self.backbone(x_t, t, text, mask=mask, taps=self.layers)
        pattern = "b f n d -> (b f) n d" if self.framewise else "b f n d -> b (f n) d"
        answers = torch.cat([head(rearrange(tokens, pattern)) for head, tokens in zip(self.heads, hidden)], -1)
        # float32: a paired loss fixes only differences, the logits wander off together, and in bfloat16 the next after 3 is 3.016
        with torch.autocast(answers.device.type, enabled=False):
            logits = self.out(self.norm(answers.float())).squeeze(-1)
        return rearrange(logits, "(b f) -> b f", f=f)[:, cfg.first:] if self.framewise else logits
