"""Error messages that name the thread and the block at fault."""

from typing import NoReturn

import numpy as np

from tests.emulator.ptx.errors import EmulatorError, Race
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction


class Faults:
    """Raises errors that name thread, block, instruction and address.

    Args:
        kernel: its name.
        threads_per_block: number of threads of a block.
    """

    def __init__(self, kernel: str, threads_per_block: int) -> None:
        self._kernel = kernel
        self._threads_per_block = threads_per_block
        self.blocks: list[tuple[int, int, int]] = []

    def only(self, thread: int) -> Array:
        """Return the mask of one thread."""
        mask = np.zeros(len(self.blocks) * self._threads_per_block, bool)
        mask[thread] = True
        return mask

    def threads_in(self, mask: Mask) -> int:
        """Return the number of threads in a mask."""
        return len(self.blocks) * self._threads_per_block if mask is True else int(np.count_nonzero(mask))

    def stop(
        self,
        error: type[EmulatorError],
        instruction: Instruction,
        mask: Mask,
        wrong: Array,
        address: Array | None = None,
        why: str = "",
    ) -> NoReturn:
        """Raise `error` for the first of the threads in `mask` for which `wrong` holds."""
        at = int(np.flatnonzero(wrong)[0])
        thread = at if mask is True else int(np.flatnonzero(mask)[at])
        block, thread = divmod(thread, self._threads_per_block)
        where = f", address {int(address[at]):#x}" if address is not None else ""
        raise error(
            f"{self._kernel}: thread {thread} of block {self.blocks[block]}{where}: {instruction.text}"
            + (f" ({why})" if why else "")
        )

    def require_equal(self, found: Array, written: Array, instruction: Instruction) -> None:
        """Raise if two threads wrote different values to one place, of which the hardware keeps any."""
        kind = np.uint8 if found.itemsize > 8 else found.dtype
        if not (found.view(kind) == written.view(kind)).all():
            other = found.view(np.uint8) != np.ascontiguousarray(written).view(np.uint8)
            wrong = other.reshape(len(found), -1).any(1)
            raise Race(
                f"{self._kernel}: {int(wrong.sum())} threads write what another thread overwrites with something else "
                f"in the same instruction: {instruction.text}"
            )
