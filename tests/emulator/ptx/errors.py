"""The emulator's exceptions, one class for each way in which a kernel or a launch can be wrong."""


class EmulatorError(RuntimeError):
    """The kernel did something that a GPU would not do, or not do the same way twice."""


class OutOfBounds(EmulatorError):
    """A thread read or wrote outside of every argument, of shared memory or of its local memory."""


class Misaligned(EmulatorError):
    """A thread read or wrote at an address that is no multiple of the access's size."""


class Race(EmulatorError):
    """Two warps used the same bytes without a barrier between, or something was used before asynchronous work ended."""


class Divergence(EmulatorError):
    """An instruction that needs all threads of a warp ran with some of them elsewhere."""


class Deadlock(EmulatorError):
    """Threads wait for a phase of an mbarrier that nobody can complete any more."""


class TooMuchSharedMemory(EmulatorError):
    """The kernel needs more shared memory than a block can have on its target, so that no GPU would start it."""


class UnknownInstruction(EmulatorError):
    """The program holds an instruction that the emulator does not know; raised before anything has run."""


class UnsupportedKernel(EmulatorError):
    """The kernel or one of its arguments can't be compiled and executed here."""
