"""Proxy fences: which writes of threads the async proxy, through which matrix products read, can see."""

import numpy as np

from tests.emulator.ptx.number_types import Array


class ProxyFences:
    """The fences of each warp, as epochs of shared memory.

    A fence covers what its warp had written before, and what other warps had written before the last barrier. It holds
    for what its own warp reads behind it, and for what all warps of the block read behind the next barrier.

    Args:
        blocks: number of blocks that run together.
        warps: number of warps of a block.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self._warps = warps
        # Epochs up to which writes are visible: of all warps to one warp, and those of one warp.
        self._to_warp = np.empty(blocks * warps, np.int64)
        self._of_warp = np.empty(blocks * warps, np.int64)
        # The same as of the last barrier, for all warps of a block.
        self._to_block = np.empty(blocks, np.int64)
        self._of_warp_to_block = np.empty(blocks * warps, np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget all fences."""
        for epochs in (self._to_warp, self._of_warp, self._to_block, self._of_warp_to_block):
            epochs.fill(1)  # memory that was never written has epoch 0

    def fence(self, warps: Array, floor: int, epoch: int) -> None:
        """Note a fence of some warps: behind it begins `epoch`; the last barrier began `floor`."""
        self._to_warp[warps] = floor
        self._of_warp[warps] = epoch

    def barrier(self) -> None:
        """Let all warps of a block profit from the fences so far."""
        np.maximum(self._to_block, self._to_warp.reshape(-1, self._warps).max(1), out=self._to_block)
        self._of_warp_to_block[:] = self._of_warp

    def covers(self, epochs: Array, writers: Array, readers: Array) -> Array:
        """Return where a fence lies between writes and reads.

        Args:
            epochs: `[n, m]` of the writes.
            writers: `[n, m]` the warps that wrote.
            readers: `[n, k]` the warps that read; all of them have to see the writes.
        """
        visible = np.maximum(self._to_block[readers[:, 0] // self._warps], self._to_warp[readers].min(1))
        covered = epochs < visible[:, None]
        if not covered.all():
            covered |= epochs < self._of_warp_to_block[writers % len(self._of_warp)]
        return np.asarray(covered)
