"""Libraries of attention kernels by their call contracts: same signatures, same refusals, the same function on the CPU.

Only the demand for CUDA tensors is relaxed. What a real kernel would take without a word and then read or write the
wrong memory for raises `plain.Corrupts`. Each stand-in keeps its calls in `calls`.
"""

from typing import Any

from tests.kernels.attention_stand_ins import flash_attn_2, flash_attn_3, flash_attn_4, torch_operators, xformers

PACKAGES: dict[str, Any] = {
    "flash_attn_4": flash_attn_4,
    "flash_attn_3": flash_attn_3,
    "flash_attn_2": flash_attn_2,
    "xformers": xformers,
}
STAND_INS: dict[str, Any] = {
    **PACKAGES,
    "torch_cudnn": torch_operators.cudnn,
    "torch_flash": torch_operators.flash,
    "torch_efficient": torch_operators.efficient,
}
