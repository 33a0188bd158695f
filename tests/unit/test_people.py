"""Following one person through the frames of a shot, on boxes that are computed here."""

import math

import pytest

from dreamdance.annotators.people import FollowedPerson, NoSuchPersonError, follow_person
from dreamdance.annotators.protocols import Person

WIDTH, HEIGHT = 640, 360


def person_at(x, *, y=180.0, wide=60.0, high=200.0, score=0.9, rotation=0.0):
    return Person((x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), score, (x, y, 1.25 * high, rotation))


def follow(people, **options) -> FollowedPerson:
    followed = follow_person(people, width=WIDTH, height=HEIGHT, **options)
    assert followed is not None
    return followed


def test_a_single_person_is_followed_through_all_frames():
    frames = [[person_at(100 + 12 * frame)] for frame in range(30)]
    followed = follow(frames)
    assert followed.people == tuple(frame[0] for frame in frames)
    assert followed.num_people == (1,) * 30
    assert not any(followed.is_bridged)


def test_a_person_who_jumps_to_and_fro_is_followed():
    # The speed of the last two frames points to where nobody is.
    frames = [[person_at(300 + (0, 35, 0, -35)[frame % 4])] for frame in range(12)]
    assert follow(frames).people == tuple(frame[0] for frame in frames)


def test_nobody_is_none_and_naming_one_of_nobody_is_an_error():
    for default in (None, 0):
        assert follow_person([[], []], width=WIDTH, height=HEIGHT, choice=default) is None
    with pytest.raises(NoSuchPersonError, match="person: 1: nobody was found in 2 frames"):
        follow_person([[], []], width=WIDTH, height=HEIGHT, choice=1)


def test_the_largest_person_is_chosen_whatever_the_order_of_detections():
    large, small = person_at(250, high=300, wide=90), person_at(400, high=120, wide=40)
    frames = [[large, small] if frame % 2 else [small, large] for frame in range(10)]
    assert follow(frames).people == (large,) * 10
    assert follow(frames, choice=1).people == (small,) * 10
    assert follow(frames).num_people == (2,) * 10


def test_of_equally_large_people_the_more_central_one_is_chosen():
    side, centre = person_at(60), person_at(330)
    assert follow([[side, centre]] * 5).people == (centre,) * 5


def test_who_is_larger_for_one_frame_alone_is_not_chosen():
    passer, dancer = person_at(320, high=340, wide=140), person_at(200)
    frames = [[dancer, passer] if frame == 3 else [dancer] for frame in range(12)]
    assert follow(frames).people == (dancer,) * 12


def test_people_who_cross_keep_their_identities_even_while_one_hides_the_other():
    # The front person is a little larger. Where the boxes overlap most, the detector sees the front one alone.
    front = [person_at(120 + 20 * frame, high=220, wide=70) for frame in range(21)]
    back = [person_at(520 - 20 * frame) for frame in range(21)]
    hidden = {9, 10, 11}
    frames = [[front[f]] if f in hidden else [back[f], front[f]] for f in range(21)]
    assert follow(frames).people == tuple(front)
    behind = follow(frames, choice=1)
    assert all(behind.people[f] == back[f] for f in range(21) if f not in hidden)
    assert [f for f in range(21) if behind.is_bridged[f]] == sorted(hidden)
    for f in hidden:
        assert behind.people[f].region[0] == pytest.approx(520 - 20 * f)
    assert [behind.num_people[f] for f in (8, 9)] == [2, 1]


def test_a_gap_of_five_frames_is_bridged_by_straight_lines_of_lowered_score():
    frames = [[person_at(100 + 4 * f, rotation=0.02 * f, score=0.8)] for f in range(20)]
    truth = [frame[0] for frame in frames]
    for f in range(7, 12):
        frames[f] = []
    followed = follow(frames)
    assert [f for f in range(20) if followed.is_bridged[f]] == [7, 8, 9, 10, 11]
    for f in range(7, 12):
        assert followed.people[f].box == pytest.approx(truth[f].box)
        assert followed.people[f].region == pytest.approx(truth[f].region)
        assert followed.people[f].score == pytest.approx(0.4)
    assert followed.people[6] == truth[6]
    assert followed.people[12] == truth[12]


def test_a_gap_of_six_frames_stays_and_the_person_is_still_followed_afterwards():
    frames = [[person_at(300)] for _ in range(20)]
    for f in range(7, 13):
        frames[f] = []
    followed = follow(frames)
    assert [f for f in range(20) if followed.people[f] is None] == list(range(7, 13))
    assert not any(followed.is_bridged)
    assert [f for f in range(20) if follow(frames, max_gap=6).is_bridged[f]] == list(range(7, 13))


def test_a_person_who_leaves_is_not_replaced_by_one_who_stays():
    leaver = [person_at(400 + 30 * f, high=300, wide=100) for f in range(8)]
    stays = person_at(150)
    frames = [[leaver[f], stays] if f < 8 else [stays] for f in range(16)]
    gone = follow(frames, choice=(350 / WIDTH, 30 / HEIGHT, 450 / WIDTH, 330 / HEIGHT))
    assert gone.people == (*leaver, *[None] * 8)
    assert follow(frames, choice=1 - gone.index).people == (stays,) * 16


def test_who_comes_back_after_more_than_thirty_frames_is_another_person():
    person = person_at(300)
    missing = follow([[person], *[[] for _ in range(31)], [person], [person]])
    assert missing.people == (*[None] * 32, person, person)
    rejoined = follow([[person], *[[] for _ in range(30)], [person], [person]])
    assert rejoined.people == (person, *[None] * 30, person, person)


def test_a_rotation_over_the_half_turn_is_bridged_the_short_way():
    frames = [[person_at(300, rotation=math.pi - 0.1)], [], [person_at(300, rotation=-math.pi + 0.1)]]
    assert abs(follow(frames).people[1].region[3]) == pytest.approx(math.pi)


def test_a_box_chooses_the_person_at_the_first_frame_where_one_overlaps_it():
    first, second = person_at(150), person_at(450)
    frames = [[first], [first, second], [first, second]]
    box = tuple(value / side for value, side in zip(second.box, (WIDTH, HEIGHT) * 2, strict=True))
    assert follow(frames, choice=box).people == (None, second, second)


def test_a_choice_that_does_not_exist_lists_the_people():
    frames = [[person_at(150), person_at(450)]] * 3
    with pytest.raises(
        NoSuchPersonError, match=r"person: 2: there are 2 people: 0: in 3 frames, at \[0\.656, .*1: in 3"
    ):
        follow(frames, choice=2)
    with pytest.raises(NoSuchPersonError, match=r"nobody is there; the people are: 0: in 3 frames"):
        follow(frames, choice=(0.9, 0.9, 1.0, 1.0))


@pytest.mark.parametrize(
    "choice", [-1, True, 1.5, (0.5, 0.1, 0.4, 0.9), (0.1, 0.2, 0.3), (0, 0, 1, 1.1), (0, 0, 1, math.nan), "left"]
)
def test_a_choice_that_is_neither_place_nor_box_is_refused(choice):
    with pytest.raises(ValueError, match="accepted is a whole number from 0"):
        follow([[person_at(150)]], choice=choice)
