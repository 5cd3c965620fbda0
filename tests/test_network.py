"""Attention kernels and numerics of the networks."""
import pytest
import torch
import torch.nn.functional as F

import model as M
from discriminator import Discriminator
from tests.common import inputs, network, relative, tiny


def test_framewise_attention_is_dense_masked_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 4, 2, 8).unbind(0)  # (b, f, n, heads, d)
    mask = M.block_causal_mask(6, 0, 2, reach=4, sink=1)
    dense = F.scaled_dot_product_attention(
        *(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask.repeat_interleave(4, 0).repeat_interleave(4, 1))
    ours = M.framewise_attention(q, k, v, M.mask_to_groups(mask))
    assert relative(ours.flatten(1, 2), dense.transpose(1, 2).flatten(2)) < 1e-6


@pytest.mark.slow
def test_compiled_attention_has_its_gradient_on_two_threads():
    """Keys with a gap between them, as where a chunk continues a clean past. Of an index by a list
    torch 2.13 compiled a gradient of other places in memory, on several threads alone."""
    cfg, mask = tiny(dim=128, num_heads=4), torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()
    groups, rope = M.mask_to_groups(mask), M.rope_table((0, 1, 2), 4, 4, 32, torch.device("cpu"))
    torch.manual_seed(0)
    x, attn, gradients = torch.randn(2, 3, 16, 128), M.SelfAttention(cfg), []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for forward in (attn.forward, torch.compile(attn.forward, dynamic=False)):
            attn.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                forward(x, rope, rope, groups)[0].square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in attn.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert relative(gradients[1], gradients[0]) < 0.02


@pytest.mark.parametrize("sink, window", [(0, 2), (1, 3), (3, 4)])
def test_the_mask_of_training_shows_what_the_cache_keeps(sink, window):
    """Also where the sink reaches beyond the image: that sees itself alone."""
    mask, cache = M.stream_mask(tiny(frames=13, sink=sink, window=window)), M.KVCache(sink, window)
    for start, end in M.chunk_bounds(13, 1, 3):
        visible = [*cache.kept, *range(start, end)]
        assert all(row.nonzero()[:, 0].tolist() == visible for row in mask[start:end])
        cache.write([(torch.zeros(1, end - start, 1, 1, 1),) * 2])
        cache.commit()


@pytest.mark.parametrize("dtype, near", [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
def test_attention_backends_agree(dtype, near):
    """The explicit product, used on CPU in bfloat16 while training, against SDPA: values,
    gradients."""
    torch.manual_seed(0)
    exact = [x.requires_grad_() for x in torch.randn(3, 2, 24, 2, 8).unbind(0)]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact)).transpose(1, 2)
    out = M.attention(*ours)
    assert out.dtype == dtype and relative(out, want) < near
    got = torch.autograd.grad(out.float().square().sum(), ours)
    right = torch.autograd.grad(want.square().sum(), exact)
    assert all(relative(a, b) < 2 * near for a, b in zip(got, right))


def test_a_common_logit_does_not_blur_a_difference():
    """A paired loss lets logits drift off together; small differences must survive in bfloat16."""
    cfg, difference = tiny(), []
    torch.manual_seed(0)
    disc = Discriminator(network(cfg), [0, 1])
    x, t, text = inputs(cfg)
    for common in (0.0, 10.0):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            disc.out.bias.fill_(common)
            difference.append((disc(x, t, text) - disc(x.flip(0), t, text))[0])
    assert difference[0].abs() > 1e-4
    assert abs(difference[1] - difference[0]) < 0.01 * abs(difference[0])


@torch.no_grad()
def test_preconditioning_predicts_minus_x0_at_pure_noise():
    net = M.build(tiny(precondition=True)).init_weights()  # zero output layer
    x, t, text = inputs(net.cfg)
    assert torch.allclose(net(x, torch.ones_like(t), text), x, atol=1e-6)
    assert torch.allclose(net(x, torch.zeros_like(t), text), -x, atol=1e-6)
