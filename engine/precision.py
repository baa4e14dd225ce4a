"""Which precision a network runs in, and how tensors and modules are made ready for a device."""

import re
from functools import lru_cache
from pathlib import Path

import torch

from engine.distributed import broadcast, is_main


def precision(device, fp16):
    """The type that convolutions run in: with mixed precision float16 on CUDA, bfloat16 on CPUs that compute in it."""
    if not fp16:
        return torch.float32
    if device.type == 'cuda':
        return torch.float16
    if broadcast(computes_in_bfloat16()):  # hosts may differ
        return torch.bfloat16
    if is_main():
        print('--fp16: this processor has no bfloat16 instructions; computing in float32, which is faster', flush=True)
    return torch.float32


def name_of(dtype):
    """'float32', 'float16' or 'bfloat16'."""
    return str(dtype).removeprefix('torch.')


@lru_cache
def computes_in_bfloat16():
    """Whether the processor has instructions for bfloat16; True where that cannot be told.

    With AVX2 alone PyTorch was found a dozen times slower in bfloat16 than in float32.
    """
    processor = Path('/proc/cpuinfo')
    return not processor.is_file() or names_bfloat16(processor.read_text())


def names_bfloat16(cpuinfo):
    """Whether the text of /proc/cpuinfo names bfloat16 instructions of x86 or Arm."""
    return re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', cpuinfo) is not None


def autocast(device, dtype):
    """Have convolutions run in what `precision` chose."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_features(net):
    """Compile backbone and decoder of a POP network in place (torch.compile); its keys stay as they are."""
    net.backbone.compile()
    net.decoder.compile()


def to_device(images, device):
    """Move images [B, 3, H, W] to the device, channels last."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)
