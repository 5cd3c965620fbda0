"""Attention kernels and numerics of the networks."""
import pytest
import torch
import torch.nn.functional as F

import losses as L
import model as M
import train
from discriminator import Discriminator
from scale import parallel
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
@pytest.mark.parametrize("continuing", [False, True])
def test_the_compiled_toy_has_its_gradient_on_two_threads(continuing):
    """Of whole clips, and of chunks that continue a clean past: their keys have gaps. Of an index
    by a list torch 2.13 compiles a wrong gradient, on several threads alone."""
    cfg, gradients, threads = train.make_config({"num_layers": 1}, 0), [], torch.get_num_threads()
    x0, t, text = inputs(cfg, b=16, side=8)
    torch.set_num_threads(2)
    try:
        for compiled in (False, True):
            net = parallel.shard(network(cfg), compiled=compiled)
            flow = L.on_clean_context(net, x0, M.stream_mask(cfg), cfg.first) if continuing else net
            with torch.autocast("cpu", torch.bfloat16):
                L.flow_matching_loss(lambda x, t: flow(x, t, text), x0, x0.flip(0), t).backward()
            gradients.append({name: p.grad for name, p in net.named_parameters()})
    finally:
        torch.set_num_threads(threads)
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) < 0.05, name


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
