"""A contender's process with something broken on purpose, as BROKEN says, in the fast model."""

import os
import time

import torch

import bench.worker
import mmmae


def off() -> None:
    """One op gives 1 % too much."""
    right = mmmae.model.layers.run_block

    def run_block(*args):
        x, residual = right(*args)
        return x, 1.01 * residual

    mmmae.model.layers.run_block = run_block


def slow() -> None:
    """The forward pass sleeps."""
    right = mmmae.FastModel.forward

    def forward(self, *args, **kwargs):
        time.sleep(0.2)
        return right(self, *args, **kwargs)

    mmmae.FastModel.forward = forward


def infinite() -> None:
    """The loss is infinite."""
    right = mmmae.FastModel.reconstruction_loss
    mmmae.FastModel.reconstruction_loss = lambda self, *args: right(self, *args) * torch.inf


def dead() -> None:
    """The process ends in the middle of the work."""
    mmmae.FastModel.forward = lambda self, *args, **kwargs: os._exit(3)


def stuck() -> None:
    """The work does not end."""
    mmmae.FastModel.forward = lambda self, *args, **kwargs: time.sleep(3600)


def nothing() -> None:
    """All is well."""


if __name__ == "__main__":
    globals()[os.environ["BROKEN"]]()
    bench.worker.main()
