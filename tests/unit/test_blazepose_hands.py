"""Which wrist a hand belongs to, when it was found at both."""

import numpy as np

from dreamdance.annotators.blazepose_hands import Hand, keep_own_hands

SHAPE = np.stack([np.linspace(0, 20, 21), -np.linspace(0, 40, 21)], axis=1)


def hand_at(x, y, *, score):
    return Hand(SHAPE + np.array([x, y]), score)


def test_one_hand_found_at_both_wrists_belongs_to_the_nearer_one():
    wrists = (np.array([10.0, 50.0]), np.array([60.0, 50.0]))
    left, right = hand_at(12.0, 50.0, score=0.9), hand_at(14.0, 51.0, score=0.95)
    assert keep_own_hands(left, right, wrists) == (left, None)
    assert keep_own_hands(right, left, (wrists[1], wrists[0])) == (None, left)


def test_two_hands_stay_and_so_does_a_single_one():
    wrists = (np.array([10.0, 50.0]), np.array([40.0, 50.0]))
    left, right = hand_at(12.0, 50.0, score=0.9), hand_at(38.0, 51.0, score=0.95)
    assert keep_own_hands(left, right, wrists) == (left, right)
    assert keep_own_hands(None, right, wrists) == (None, right)
    assert keep_own_hands(left, None, wrists) == (left, None)
