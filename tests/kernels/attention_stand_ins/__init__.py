"""Libraries of attention kernels by their call contracts: same signatures, same refusals, the same function on the CPU.

Only the demand for CUDA tensors is relaxed. What a real kernel would take without a word and then read or write the
wrong memory for raises `plain.Corrupts`. Each module keeps its calls in `calls`.
"""

from types import ModuleType

from tests.kernels.attention_stand_ins import flash_attn_2, flash_attn_3, flash_attn_4, xformers

STAND_INS: dict[str, ModuleType] = {
    "flash_attn_4": flash_attn_4,
    "flash_attn_3": flash_attn_3,
    "flash_attn_2": flash_attn_2,
    "xformers": xformers,
}
