"""Counting floating-point operations, and how many of them this device can do."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from utils.settings import synced_time

_ATEN = torch.ops.aten
FLASH = _ATEN._scaled_dot_product_flash_attention
FLASH_BACKWARD = _ATEN._scaled_dot_product_flash_attention_backward
FORMULAS = {  # PyTorch's table lacks the attention kernel of the CPU, with which plans are made
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[FLASH],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[FLASH_BACKWARD],
}


class Flops(TorchDispatchMode):
    """Counts the operations of all matrix products and attention while it is entered. What
    activation checkpointing runs again counts again; flash-attn's own kernel counts nothing."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = FORMULAS.get(function._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def matrix_rate(device, dtype=torch.bfloat16, tries=5):
    """The largest matrix rate that this device shows, in FLOP/s."""
    rates, began = [], synced_time(device)
    for n in (8192,) if device.type == "cuda" else (256, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(tries):
            start = synced_time(device)
            a @ b
            rates.append(2 * n**3 / (synced_time(device) - start))
        if synced_time(device) - began > 0.1:  # a CPU without bfloat16: 1024 would take 2 seconds
            break
    return max(rates)
