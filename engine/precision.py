"""Which precision a network runs in, and how tensors and modules are made ready for a device."""

import re
from functools import lru_cache
from pathlib import Path
from types import MethodType

import torch

from core.ranks import is_main
from engine.distributed import broadcast
from model import Network


def precision(device: torch.device, fp16: bool) -> torch.dtype:
    """The type that convolutions run in: with `fp16` float16 on CUDA, and bfloat16 on CPUs with instructions for it."""
    if not fp16:
        return torch.float32
    if device.type == 'cuda':
        return torch.float16
    if broadcast(computes_in_bfloat16()):  # hosts may differ
        return torch.bfloat16
    if is_main():
        print('--fp16: this processor has no bfloat16 instructions; computing in float32, which is faster', flush=True)
    return torch.float32


def name_of(dtype: torch.dtype) -> str:
    """'float32', 'float16' or 'bfloat16'."""
    return str(dtype).removeprefix('torch.')


@lru_cache
def computes_in_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; True where that cannot be told.

    With AVX2 alone, PyTorch was 12 times slower in bfloat16 than in float32 (benchmarks/NOTES.md).
    """
    processor = Path('/proc/cpuinfo')
    return not processor.is_file() or names_bfloat16(processor.read_text())


def names_bfloat16(cpuinfo: str) -> bool:
    """Whether the text of /proc/cpuinfo names bfloat16 instructions of x86 or Arm."""
    return re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', cpuinfo) is not None


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Run convolutions in the type that `precision` chose."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_features(net: Network, frozen: bool = False):
    """Compile backbone and decoder (torch.compile). Images of another shape, or another mode of the network, do anew.

    Args:
        net: stays a module with the same keys; its copies are compiled too.
        frozen: its weights do not change any more. On GPUs, features are then computed by a CUDA graph: they have to
            be used or copied before the next call, which overwrites them.
    """
    # static sizes: crops and evaluation images have one size each, and the decoder's matrices are made for it
    mode = 'reduce-overhead' if frozen else 'default'
    for name in net.COMPILED:  # compiled at the first call
        setattr(net, name, MethodType(torch.compile(getattr(type(net), name), dynamic=False, mode=mode), net))


def to_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move images [B, 3, H, W] to the device, channels last."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)
