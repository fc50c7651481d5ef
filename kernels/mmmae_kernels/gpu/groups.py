"""Division of rows among programs for sums that end in the kernel that computes them, see `partial_sums.end_sums`.

Each program makes a partial sum, the last program of each group adds up those of its group, and the last program of all
adds up the groups.
"""

from __future__ import annotations

from torch import Tensor

GROUP = 16
MOST_PROGRAMS = GROUP**2  # about two a multiprocessor: few partial sums, and all programs run at the same time
COUNTERS = 2 * GROUP  # counters of programs that are done: one for each group, and one for the groups; a power of 2
TILE = 2048  # numbers that a program has in registers at once, eight a thread of each tensor


def rows_of_a_program(rows: int, together: int) -> int:
    """Return how many rows a program takes: at least eight, a multiple of `together`.

    So many that `MOST_PROGRAMS` programs take all rows; a few programs more if the rows are divided by weights.
    """
    least = max(8, -(-rows // MOST_PROGRAMS))  # eight: partial sums are then a fraction of what a program writes
    return -(-least // together) * together


def stacked(weight: Tensor | None) -> int:
    """Return the number of weights in `[W, D]`, the first of which belongs to the first of W equal parts of the rows.

    It is 1 for a single weight `[D]` of all rows, and without one.
    """
    return 1 if weight is None or weight.dim() == 1 else weight.shape[0]
