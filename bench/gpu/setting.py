"""Where a part runs: on the GPU, or in a dry run on a CPU that passes for one, at sizes that take no time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

import mmmae
from mmmae_kernels.attention.op import BACKENDS

DRY_OPS = ("attention", "add_layer_norm")
DRY_CONFIG: dict[str, Any] = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 16, "depth": 1, "aux": {"ir": 1}}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Args:
        dry_run: whether it is a CPU.
    """

    dry_run: bool = False

    @property
    def device(self) -> str:
        """Type of the device that tensors lie on."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def kernels(self) -> str:
        """Backend of the ops in models."""
        return "eager" if self.dry_run else "auto"

    @property
    def quick(self) -> str:
        """Backend of the ops at the shapes of models, where Triton's interpreter would take minutes."""
        return "eager" if self.dry_run else "triton"

    def backend(self, dtype: torch.dtype) -> str:
        """Return the backend of small calls of ops; Triton's interpreter multiplies bfloat16 wrongly."""
        return "eager" if self.dry_run and dtype == torch.bfloat16 else "triton"

    def config(self, preset: str) -> mmmae.MMMAEConfig:
        """Return the config of a preset, with all auxiliary images."""
        if self.dry_run:
            return mmmae.MMMAEConfig.preset("tiny", **DRY_CONFIG)
        return mmmae.MMMAEConfig.preset(preset)

    def batch(self, batch: int) -> int:
        """Return the number of samples in a batch."""
        return 2 if self.dry_run else batch

    def rounds(self, rounds: int) -> int:
        """Return the number of rounds of a measurement."""
        return 1 if self.dry_run else rounds

    def ours(self, variants: Iterable[str], op: str) -> list[str]:
        """Return those of an op's variants that are ours: Triton's kernels, or each backend of attention."""
        wanted = BACKENDS if "attention" in op else (self.quick,)
        found = [variant for variant in variants if variant in wanted]
        if not found:
            raise RuntimeError(f"{op} runs on none of {', '.join(wanted)}: see the reasons of the part `environment`")
        return found

    def ops(self, ops: Iterable[str]) -> list[str]:
        """Return those of the ops that are looked at, at the shapes of models."""
        return [op for op in ops if not self.dry_run or op in DRY_OPS]
