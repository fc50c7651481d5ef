"""Losses of classifiers, of subjects or of pixels: cross-entropy, focal loss, and Dice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .labels import UNLABELLED
from .settings import Loss

FOCUS = 2.0  # the focal loss's gamma, as in its paper


def classification_loss(loss: Loss, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of the labelled targets; 0 if none is labelled.

    With p the probability of a target's class, w the class's weight, and sums over the labelled targets:

    - `cross-entropy`: sum(-w log p) / sum(w).
    - `focal`: sum(-w (1 - p)^2 log p) / sum(w), in which easy pixels count little: Lin et al., Focal Loss for Dense
      Object Detection, 2017, with its gamma of 2.
    - `dice`: the cross-entropy plus `dice_loss`, as in nnU-Net (Isensee et al., 2021).

    Args:
        loss: which of them.
        logits: `[B, classes, ...]`.
        target: int64 `[B, ...]`, `UNLABELLED` where there is no label.
        weights: of the classes, `[classes]`.
    """
    logits = logits.float()
    known = target != UNLABELLED
    log_p = -F.cross_entropy(logits, target, ignore_index=UNLABELLED, reduction="none")  # 0 where there is no label
    each = weights[target.clamp(min=0)] * known
    focus = (1 - log_p.exp()) ** FOCUS if loss == "focal" else 1.0
    mean = -(each * focus * log_p).sum() / each.sum().clamp(min=torch.finfo(log_p.dtype).tiny)
    return mean + dice_loss(logits, target, weights) if loss == "dice" else mean


def dice_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return 1 less the mean soft Dice coefficient of the classes that occur; 0 if none does.

    The coefficient of a class is 2 sum(p y) / (sum(p) + sum(y)) over the labelled targets of the batch, where p is its
    probability and y is 1 if it is the target's class, else 0: Milletari et al., V-Net, 2016, without its squares. A
    class that does not occur in the batch is left out, since its coefficient would be 0 whatever is predicted.

    Args:
        logits: `[B, classes, ...]`.
        target: int64 `[B, ...]`, `UNLABELLED` where there is no label.
        weights: of the classes in the mean, `[classes]`.
    """
    known = (target != UNLABELLED).flatten()
    p = logits.movedim(1, -1).flatten(0, -2).float().softmax(-1) * known[:, None]  # [targets, classes]
    places = target.clamp(min=0).flatten()
    y = F.one_hot(places, p.shape[-1]) * known[:, None]
    counts = y.sum(0)
    coefficients = 2 * (p * y).sum(0) / (p.sum(0) + counts).clamp(min=torch.finfo(p.dtype).tiny)
    shares = weights * (counts > 0)
    return (shares * (1 - coefficients)).sum() / shares.sum().clamp(min=torch.finfo(p.dtype).tiny)
