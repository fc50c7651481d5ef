"""Record calls as CUDA graphs: they run normally at first, are then recorded once, and replayed from there on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Literal, TypeAlias, TypeVar, get_args

import torch

from mmmae_kernels.dispatch import in_debug_mode

from ..model.inputs import is_distributed

WARM_UPS = 3  # calls before a recording: kernels are compiled and tuned, the optimizer creates its state
CUDAGraph: TypeAlias = Literal["auto", "on", "off"]
CUDA_GRAPH_CHOICES = get_args(CUDAGraph)

Result = TypeVar("Result")


class CaptureError(RuntimeError):
    """A call could not be recorded; no part of it was executed."""


class GraphRecorder:
    """The side stream and the memory pool that the recordings of one training step share.

    Recordings are replayed one after another and pass each other nothing in the pool, so that they can use the same
    memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()


class GraphedCall(Generic[Result]):
    """A function without arguments: the first calls run it, later ones replay a recording of it.

    The tensors that it reads and writes must stay where they are in memory, and it must not wait for the device.

    Args:
        function: the function to call.
        recorder: shared by the calls of one training step.
    """

    def __init__(self, function: Callable[[], Result], recorder: GraphRecorder) -> None:
        self.function, self.recorder = function, recorder
        self.warm_ups = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result

    def __call__(self) -> Result:
        """Run the function or replay its recording, and return its result.

        Raises:
            CaptureError: the function can't be recorded.
        """
        if self.graph is None and self.warm_ups < WARM_UPS:
            self._warm_up()
            return self.result
        if self.graph is None:
            self.graph = self._record()
        self.graph.replay()
        return self.result

    def _warm_up(self) -> None:
        """Run on the stream that will record, because backward accumulates gradients on the stream of its first run."""
        stream, current = self.recorder.stream, torch.cuda.current_stream(self.recorder.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.result = self.function()
        current.wait_stream(stream)
        self.warm_ups += 1

    def _record(self) -> torch.cuda.CUDAGraph:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.recorder.device)
        # Other threads, such as the one that pins memory for the data loader, may go on meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self.recorder.pool, stream=self.recorder.stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                self.result = self.function()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a recording that fails at its end leaves its own
            cause: BaseException = error
            while isinstance(cause.__context__, RuntimeError):  # the first error says which operation it was
                cause = cause.__context__
            raise CaptureError(str(cause).splitlines()[0] if str(cause) else type(cause).__name__) from error
        return graph


def graph_refuses(device: torch.device) -> str | None:
    """Return the reason why training steps on `device` can't be recorded as CUDA graphs, or None."""
    if device.type != "cuda":
        return f"the model is on the device {device}, and CUDA graphs need a GPU"
    if is_distributed():
        return "several processes train together, whose collectives are not recorded"
    if in_debug_mode():
        return "MMMAE_DEBUG=1 looks at values in every step"
    return None
