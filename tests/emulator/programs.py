"""Short PTX programs, written by hand, on the emulator."""

import numpy as np

from tests.emulator.ptx.executor import Executor
from tests.emulator.ptx.global_memory import GlobalMemory, Segment
from tests.emulator.ptx.number_types import Array
from tests.emulator.ptx.program import parse


def run_program(body: str, memory: Array, threads: int = 128, shared_bytes: int = 8192, blocks: int = 1) -> None:
    """Run `body` for all threads; %p is the address of `memory`, %t the number of the thread, %b that of its block."""
    ptx = f"""
.visible .entry test(
    .param .u64 test_param_0
)
{{
    .reg .b32 %t;
    .reg .b32 %b;
    .reg .b64 %p;
    ld.param.b64 %p, [test_param_0];
    mov.u32 %t, %tid.x;
    mov.u32 %b, %ctaid.x;
    {body}
    ret;
}}
"""
    executor = Executor(parse(ptx), threads, blocks, shared_bytes)
    state = executor.state
    state.parameters["test_param_0"][0] = memory.ctypes.data
    segments = [Segment("memory", memory.ctypes.data, memory.nbytes, memory)]
    ids = [(block, 0, 0) for block in range(blocks)]
    with np.errstate(all="ignore"), state.started(ids, (blocks, 1, 1), GlobalMemory(segments, state.faults)):
        executor.run()


def core_matrices(matrix: Array) -> Array:
    """Return the bytes of a matrix as core matrices of 8 rows by 16 bytes, those of 8 rows one after the other."""
    rows, size = matrix.shape[0], matrix.dtype.itemsize
    per_row = matrix.shape[1] * size // 16
    units = np.ascontiguousarray(matrix).view(np.uint8).reshape(rows // 8, 8, per_row, 16)
    return np.ascontiguousarray(units.transpose(0, 2, 1, 3)).reshape(-1)
