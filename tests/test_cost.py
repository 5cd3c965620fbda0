"""Plans, benchmarks, optimizers."""

from dataclasses import replace

import pytest
import torch

import model as M
import train
from experiments import bench, flops, plan
from scale import muon, state
from tests.common import relative, small_config, tiny
from utils.errors import UsageError


@pytest.mark.parametrize("stage, more", [
    (0, []), (2, []), (3, ["--activation-checkpointing", "--backbone-lr", "1e-4"])])
def test_planned_bytes_are_those_of_the_run(stage, more):
    """Weights, gradients, optimizer states and frozen networks to the byte; shares of several
    devices cover the whole."""
    cfg = small_config(stage, *more)
    run, costs = plan.Rehearsal(replace(cfg, student_start=0)), plan.static_bytes(cfg, 1)
    held = []
    for optimizers in run.optimizers.values():  # gradients of all networks, at every update
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: held.append(sum(
                p.grad.nbytes for net in run.nets.values() for p in net.parameters()
                if p.grad is not None)))
    train.STEPS[stage](run)

    def sizes(trained):
        nets = [net for name, net in run.nets.items() if name != "ema"]
        return sum(p.nbytes for net in nets for p in net.parameters() if p.requires_grad == trained)

    states = [x for opts in run.optimizers.values() for o in opts for s in o.state.values()
              for x in s.values() if x.ndim]
    assert costs["weights"] == sizes(True)
    trained = [sum(p.nbytes for p in net.parameters() if p.requires_grad)
               for name, net in run.nets.items() if name != "ema"]
    assert costs["gradients"] == max(trained) >= max(held)  # one network's at a time
    assert costs["frozen"] == sizes(False)
    assert costs["optimizer"] == sum(x.nbytes for x in states) and costs["gathered"] == 0
    assert costs["average"] == sum(p.nbytes for p in run.nets["ema"].parameters())
    # rows, rounded up
    assert costs["weights"] / 4 <= plan.static_bytes(cfg, 4)["weights"] < costs["weights"] / 2


@pytest.mark.parametrize("stage, more", [
    (0, []), (2, ["--activation-checkpointing"]),
    pytest.param(3, ["--dtype", "bfloat16"], marks=pytest.mark.slow)])
def test_planned_activations_are_those_of_a_run(stage, more):
    """The step on tensors without memory against PyTorch's own record of a real one; no stage of
    the plan holds on to anything. At the peak of a stage with an anchor the student's gradients of
    its other terms are there; the plan counts gradients apart."""
    cfg = replace(small_config(stage, *more), student_start=0)
    _, peak = bench.measured_step(cfg)
    planned, flops, tokens = plan.rehearse(cfg, 1)
    apart = plan.static_bytes(cfg, 1)["gradients"] if cfg.ode_anchor else 0
    assert 0.98 * planned <= peak <= 1.02 * planned + apart
    assert flops > 0 and tokens == 7 * 16


@pytest.mark.slow
def test_deep_networks_are_rehearsed_at_two_depths(monkeypatch):
    cfg = replace(small_config(2, "--activation-checkpointing", "--num-layers", "6"),
                  student_start=0)
    whole = plan.rehearse(cfg, 1)
    monkeypatch.setattr(plan, "DEPTHS", (4, 5))
    monkeypatch.setattr(plan, "REHEARSED", {})
    peak, flops, _ = plan.rehearse(cfg, 1)
    assert peak == pytest.approx(whole[0], rel=0.02) and flops == pytest.approx(whole[1], rel=1e-6)


def test_plan_refuses_devices_that_do_not_divide():
    with pytest.raises(UsageError, match="multiple of --context-parallel"):
        plan.main(["--gpus", "3", "--context-parallel", "2"])
    with pytest.raises(UsageError, match="multiple of --context-parallel"):
        plan.main(["--gpus", "3", "--context-parallel", "0"])


def test_work_is_counted():
    """Two matrix products per attention, forward, and five backward; and the products of a linear
    layer."""
    q = torch.randn(1, 1100, 2, 8, requires_grad=True)  # long enough for SDPA's own kernel
    with flops.Flops() as work:
        y = M.attention(q, q.detach(), q.detach())
    assert work.flops == 2 * 2 * 2 * 1100 * 1100 * 8
    with work:
        y.sum().backward()
    assert work.flops == 7 * 2 * 2 * 1100 * 1100 * 8


def test_muon_is_pytorchs(monkeypatch):
    g = torch.Generator().manual_seed(0)
    mine = [torch.randn(shape, generator=g).requires_grad_()
            for shape in ((8, 8), (16, 8), (8, 8), (8, 24))]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: True)  # PyTorch's always takes it
    one, two = muon.Muon(mine, 0.02), torch.optim.Muon(theirs, 0.02, weight_decay=0.0)
    for _ in range(3):
        for p, q in zip(mine, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    assert max((p - q).abs().max().item() for p, q in zip(mine, theirs)) < 1e-4
    assert (mine[0] - theirs[1][:8]).abs().max() > 0.1
    x = torch.randn(3, 16, 8, generator=g)
    found = {}
    for half in (False, True):  # with and without bfloat16 instructions
        monkeypatch.setattr(muon, "has_bfloat16", lambda device: half)
        found[half] = muon.orthogonalize(x)
        assert found[half].dtype == (torch.bfloat16 if half else torch.float32)
        assert (torch.linalg.svdvals(found[half].float()) - 1).abs().max() < 0.5
    assert relative(found[True].float(), found[False]) < 0.05


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_fresh_optimizer_is_saved_as_it_is(decay):
    """A state saved while only the critics learn must not count as a step of the student."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=decay)
    state.init_optimizer_state(optimizer)
    assert torch.equal(p, torch.ones(3)) and optimizer.state[p]["step"] == 0 and p.grad is None
    p.grad = torch.ones(3)
    optimizer.step()
    # the first step of Adam is lr long
    assert torch.allclose(p, torch.full((3,), 0.9 - 0.1 * decay), atol=1e-6)


def test_bench_refuses_flags_it_does_not_know():
    with pytest.raises(UsageError, match="unknown"):
        bench.main(["load", "--nonsense"])


def test_a_stream_in_bfloat16_is_benched():
    """As on a GPU: bfloat16 weights, float32 latents, several passes a chunk."""
    torch.manual_seed(0)
    net = M.build(tiny(window=2)).bfloat16()
    first, wall, _, flops_a_second = bench.stream(net, (4, 4), 4, False, 1, 0.0)
    assert first > 0 and wall > 0 and flops_a_second > 0
