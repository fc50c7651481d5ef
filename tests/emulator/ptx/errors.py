"""What the emulator raises: one class for each way in which a kernel, or a launch of it, can be wrong."""


class EmulatorError(RuntimeError):
    """The kernel did something that a GPU would not do, or not do the same way twice."""


class OutOfBounds(EmulatorError):
    """A thread read or wrote outside of every argument, of shared memory or of its local memory."""


class Misaligned(EmulatorError):
    """A thread read or wrote at an address that is no multiple of the access's size."""


class Race(EmulatorError):
    """Two warps used the same bytes without a barrier between, or bytes were used before `cp.async` landed there."""


class Divergence(EmulatorError):
    """An instruction that needs all threads of a warp ran with some of them elsewhere."""


class TooMuchSharedMemory(EmulatorError):
    """The kernel needs more shared memory than a block can have on its target, so that no GPU would start it."""


class UnknownInstruction(EmulatorError):
    """The program holds something that the emulator does not execute; raised before any of it ran."""


class UnsupportedKernel(EmulatorError):
    """The kernel or an argument of it is none that can be compiled and executed here."""
