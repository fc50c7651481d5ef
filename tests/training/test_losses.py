"""Losses of classifiers against their definitions, written out target by target in float64."""

import pytest
import torch
from torchmetrics.functional.segmentation import dice_score

from mmmae.training.finetuning.labels import UNLABELLED
from mmmae.training.finetuning.losses import classification_loss, dice_loss

CLASSES = 4


@pytest.fixture
def batch():
    """Logits, targets of which some are not labelled and none is of the last class, and weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 5, 3, generator=generator, requires_grad=True)
    target = torch.randint(CLASSES - 1, (2, 5, 3), generator=generator)
    target[0, 1], target[1, :2, 0] = UNLABELLED, UNLABELLED
    return logits, target, torch.tensor([1.0, 0.5, 3.0, 2.0])


def definition(loss, logits, target, weights):
    terms, total, hits, sums = [], 0.0, [0.0] * CLASSES, [0.0] * CLASSES
    p = logits.double().softmax(1).movedim(1, -1).reshape(-1, CLASSES)
    for row, place in zip(p, target.flatten().tolist(), strict=True):
        if place == UNLABELLED:
            continue
        focus = (1 - row[place]) ** 2 if loss == "focal" else 1.0
        terms.append(-weights[place] * focus * row[place].log())
        total = total + weights[place]
        hits[place] = hits[place] + row[place]
        sums = [
            before + share + (number == place) for number, (before, share) in enumerate(zip(sums, row, strict=True))
        ]
    mean = sum(terms) / total
    if loss != "dice":
        return mean
    occur = sorted(set(target.flatten().tolist()) - {UNLABELLED})
    dice = sum(weights[place] * (1 - 2 * hits[place] / sums[place]) for place in occur)
    return mean + dice / sum(weights[place] for place in occur)


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "dice"])
def test_a_loss_and_its_gradient_are_those_of_the_definition(batch, loss):
    logits, target, weights = batch
    found = classification_loss(loss, logits, target, weights)
    expected = definition(loss, logits, target, weights)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))


def test_certain_predictions_have_the_dice_score_of_torchmetrics(batch):
    _, target, _ = batch
    target = target.clamp(min=0)
    predicted = target.roll(1, 2)
    logits = 100.0 * torch.nn.functional.one_hot(predicted, CLASSES).movedim(-1, 1)
    scores = dice_score(predicted.reshape(1, -1), target.reshape(1, -1), CLASSES, average="none", input_format="index")[
        0, : CLASSES - 1
    ]
    torch.testing.assert_close(dice_loss(logits, target, torch.ones(CLASSES)), 1 - scores.mean())


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "dice"])
def test_no_label_is_no_loss_and_a_gradient_of_zero(batch, loss):
    logits, target, weights = batch
    found = classification_loss(loss, logits, torch.full_like(target, UNLABELLED), weights)
    found.backward()
    assert found.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "dice"])
def test_subjects_have_the_loss_of_pixels(batch, loss):
    logits, target, weights = batch
    flat = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    torch.testing.assert_close(
        classification_loss(loss, *flat, weights), classification_loss(loss, logits, target, weights)
    )


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "dice"])
def test_extreme_logits_have_a_finite_loss_and_gradient(batch, loss):
    logits, target, weights = batch
    extreme = (1e4 * logits.detach()).requires_grad_()
    found = classification_loss(loss, extreme, target, weights)
    found.backward()
    assert found.isfinite()
    assert extreme.grad.isfinite().all()
