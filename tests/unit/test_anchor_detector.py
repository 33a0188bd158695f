"""Anchors and the merging of detections, against numbers worked out by hand."""

import numpy as np
import pytest

from dreamdance.annotators.anchor_detector import merge_overlapping, place_anchors
from dreamdance.annotators.boxes import overlaps


@pytest.mark.parametrize(
    ("strides", "size", "number"),
    # The numbers of rows of the networks' outputs: people, palms, faces.
    [((8, 16, 32, 32, 32), 224, 2254), ((8, 16, 16, 16), 192, 2016), ((8, 16, 16, 16), 128, 896)],
)
def test_there_is_an_anchor_for_each_row_of_the_output(strides, size, number):
    anchors = place_anchors(strides, size)
    assert anchors.shape == (number, 2)
    assert anchors[0] == pytest.approx((4 / size, 4 / size))
    assert anchors[2] == pytest.approx((12 / size, 4 / size))  # two per cell, x runs first
    assert anchors[-1] == pytest.approx((1 - strides[-1] / 2 / size,) * 2)


def test_overlap_is_intersection_over_union():
    boxes = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6], [2, 0, 4, 2], [0, 0, 1, 1], [0, 0, 0, 0]], float)
    assert overlaps(boxes[0], boxes) == pytest.approx([1, 1 / 3, 0, 0, 1 / 4, 0])


def test_overlapping_detections_become_their_mean_by_score_and_others_stay():
    def detection(x):
        return [[x, 10.0], [8.0, 8.0], [x + 1, 11.0]]

    pairs = np.array([detection(10.0), detection(11.0), detection(40.0)])
    merged = merge_overlapping(pairs, np.array([0.9, 0.6, 0.5]))
    assert [score for score, _ in merged] == [0.9, 0.5]
    assert merged[0][1] == pytest.approx(np.array(detection(10.4)))
    assert merged[1][1] == pytest.approx(np.array(detection(40.0)))
    assert merge_overlapping(np.zeros((0, 3, 2)), np.zeros(0)) == []
