"""Scores of predictions: their definitions, and whole scenes put together of tiles."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics

from mmmae.data.readers.windows import Window
from mmmae.data.tiles import Position
from mmmae.training.finetuning.labels import UNLABELLED
from mmmae.training.finetuning.scores import SceneScores, Scores, compute_scores, draw_confusion


def test_scores_are_those_of_their_definition_and_absent_classes_do_not_count():
    scores = Scores("segmentation", ["a", "b", "c", "d"])
    truth = torch.tensor([[0, 0, 0, 1, 1, UNLABELLED]])
    predicted = torch.tensor([[0, 0, 1, 1, 2, 3]])
    scores.update(torch.nn.functional.one_hot(predicted, 4).permute(0, 2, 1).float(), truth)
    found = scores.compute()
    assert found["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["miou"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["f1_macro"] == pytest.approx((4 / 5 + 2 / 4) / 2)
    assert found["classes"]["a"] == {
        "labelled": 3,
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 5),
        "iou": pytest.approx(2 / 3),
    }


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.choice(6, 2000, p=[0.5, 0.2, 0.2, 0.07, 0.03, 0])  # the last class does not occur, but is predicted
    predicted = np.where(rng.random(2000) < 0.6, truth, rng.integers(0, 6, 2000))
    found = compute_scores(torch.from_numpy(metrics.confusion_matrix(truth, predicted)), list("abcdef"), "segmentation")
    occur = list(range(5))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted), rel=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is predicted does not occur
        assert found["average_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, predicted), rel=1e-12)
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(truth, predicted), rel=1e-12)
    f1, iou = (
        score(truth, predicted, labels=occur, average=None) for score in (metrics.f1_score, metrics.jaccard_score)
    )
    assert found["f1_macro"] == pytest.approx(f1.mean(), rel=1e-12)
    assert found["miou"] == pytest.approx(iou.mean(), rel=1e-12)
    assert [found["classes"][name]["f1"] for name in "abcde"] == pytest.approx(f1.tolist(), rel=1e-12)
    assert [found["classes"][name]["iou"] for name in "abcde"] == pytest.approx(iou.tolist(), rel=1e-12)


@pytest.mark.parametrize("confusion", [[[0, 0], [0, 0]], [[7, 0], [0, 0]]])
def test_scores_of_nothing_and_of_one_class_are_numbers(confusion):
    found = compute_scores(torch.tensor(confusion), ["a", "b"], "segmentation")
    assert found["kappa"] == 0
    assert found["accuracy"] == found["average_accuracy"] == found["miou"] == (1 if confusion[0][0] else 0)


def test_a_pixel_in_several_tiles_is_scored_once_by_the_mean_of_their_logits():
    scores = Scores("segmentation", ["a", "b"])
    places = {"s@0,0": Position("s", Window(0, 0, 2, 2)), "s@0,1": Position("s", Window(0, 1, 2, 2))}
    scenes = SceneScores(scores, {**places, "t@0,0": Position("t", Window(0, 0, 2, 2))})
    sure_of_a, leaning_to_b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    logits = [choice[:, None, None].expand(2, 2, 2) for choice in (sure_of_a, leaning_to_b, leaning_to_b)]
    targets = [torch.tensor(rows) for rows in ([[0, 0], [1, UNLABELLED]], [[0, 1], [0, UNLABELLED]], [[1, 1], [1, 1]])]
    for part in (slice(0, 1), slice(1, 3)):  # batches that do not end with a scene
        scenes.update([*scenes.positions][part], torch.stack(logits[part]), torch.stack(targets[part]))
    scenes.finish()
    # Scene s: columns 0 and 1 are taken for a, column 2 for b; its last pixel has no label.
    assert scores.compute()["confusion"] == [[3, 0], [1, 5]]


def test_tiles_of_a_scene_that_come_apart_are_refused():
    places = {f"{scene}@0,{column}": Position(scene, Window(0, column, 2, 2)) for column in (0, 2) for scene in "st"}
    scenes = SceneScores(Scores("segmentation", ["a", "b"]), places)
    with pytest.raises(ValueError, match="tile 's@0,2' does not follow the other tiles of scene 's'"):
        scenes.update(list(places), torch.zeros(4, 2, 2, 2), torch.zeros(4, 2, 2, dtype=torch.int64))
    scenes.finish()
    scenes.update(["s@0,0"], torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))  # the next epoch


def test_a_confusion_matrix_of_many_classes_is_as_large_as_one_of_30_and_has_no_numbers():
    small, large = (draw_confusion([f"class {i}" for i in range(n)], np.eye(n).tolist()) for n in (30, 200))
    assert (small.get_size_inches() == large.get_size_inches()).all()
    assert [len(figure.axes[0].texts) for figure in (small, large)] == [900, 0]
