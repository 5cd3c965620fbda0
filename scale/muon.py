"""Muon, an optimizer for matrices, whole or sharded by rows."""
import torch

from scale.parallel import full_tensor, local_shard
from utils.settings import has_bfloat16


def orthogonalize(x):
    """U V^T, nearly, of each matrix x = U S V^T in (n, rows, columns): five Newton-Schulz steps.

    Most singular values come near 1, the smallest stay below. In bfloat16, which is precise enough,
    where that is fast."""
    x = x.bfloat16() if has_bfloat16(x.device.type) else x.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        powers = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, powers, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum (Jordan 2024).

    The numbers of torch.optim.Muon, which treats one matrix after the other; all matrices of one
    shape together take half the time at toy size."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    update = self.momentum(p, group["momentum"])
                    by_shape.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                directions = orthogonalize(torch.stack([update for _, update in pairs]))
                for (p, _), direction in zip(pairs, directions):
                    local, own_rows = local_shard(p)
                    scale = max(1, rows / columns) ** 0.5
                    local.add_(direction[own_rows], alpha=-group["lr"] * scale)

    def momentum(self, p, beta):
        """The Nesterov momentum of one matrix, in full."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return full_tensor(p.grad.lerp(buffer, beta))
