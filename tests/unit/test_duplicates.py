"""Copies of a video are found however they were encoded, cut in time or mirrored; different dancers never match."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.curation import duplicates
from dreamdance.data.curation.duplicates import (
    MAX_DISTANCE,
    MIN_SHARE,
    VideoHashes,
    check_leaks,
    find_duplicates,
    find_groups,
    group_duplicates,
    hash_video,
)
from dreamdance.media.video import iterate_frames, probe_video, write_video

FPS = 8.0
SECONDS = 8


def hash_file(path: Path, name: str) -> VideoHashes:
    video = probe_video(path)
    return hash_video(name, iterate_frames(video), fps=video.fps)


@pytest.fixture(scope="module")
def dance() -> np.ndarray:
    return render_clip(HELD_OUT_SEEDS[0], num_frames=int(SECONDS * FPS), width=96, height=144, fps=FPS).rgb


def rescaled(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.resize(frame, (60, 90), interpolation=cv2.INTER_AREA) for frame in frames])


def brighter(frames: np.ndarray) -> np.ndarray:
    return np.clip(frames * 1.1 + 12, 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rescaled": rescaled,
    "trimmed": lambda frames: frames[20:-3],
    "brighter": brighter,
    "mirrored": lambda frames: frames[:, :, ::-1],
    "mirrored_and_trimmed": lambda frames: frames[11:, :, ::-1],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found_after_another_compression(tmp_path, dance, name):
    """The copy is compressed strongly."""
    write_video(tmp_path / "a.mp4", dance, fps=FPS)
    write_video(tmp_path / "b.mp4", CHANGES[name](dance), fps=FPS, crf=34)
    first, second = hash_file(tmp_path / "a.mp4", "a"), hash_file(tmp_path / "b.mp4", "b")
    assert find_duplicates([first, second]) == [("a", "b")]
    assert find_duplicates([second, first]) == [("b", "a")]


def test_a_video_that_contains_another_is_found(dance):
    other = render_clip(HELD_OUT_SEEDS[1], num_frames=len(dance), width=96, height=144, fps=FPS).rgb
    long = hash_video("long", np.concatenate([other, dance]), fps=FPS)
    assert find_duplicates([long, hash_video("short", dance, fps=FPS)]) == [("long", "short")]


def test_cropped_copies_are_not_found(dance):
    """The limit that the module states."""
    cropped = hash_video("b", dance[:, 20:110, 20:80], fps=FPS)
    assert find_duplicates([hash_video("a", dance, fps=FPS), cropped]) == []


def test_different_dancers_never_match():
    """500 dancers were compared once, without a false pair; here are 50."""
    videos = [
        hash_video(
            str(seed), render_clip(HELD_OUT_SEEDS[seed], num_frames=2, width=32, height=48, fps=1.0).rgb, fps=1.0
        )
        for seed in range(50)
    ]
    assert find_duplicates(videos) == []


def bits(*changed: int) -> np.ndarray:
    row = np.random.default_rng(0).random(64) < 0.5
    row[list(changed)] ^= True
    return row


def video(name: str, *rows: np.ndarray) -> VideoHashes:
    return VideoHashes(name, np.array(rows), ~np.array(rows), np.full((len(rows), 2), 128, np.float32))


def test_six_bits_are_the_same_and_seven_are_not():
    first = video("a", bits())
    assert find_duplicates([first, video("b", bits(*range(6)))]) == [("a", "b")]
    assert find_duplicates([first, video("b", bits(*range(7)))]) == []


@pytest.mark.parametrize(("distance", "expected"), [(10, [("a", "b")]), (10.5, [])])
def test_the_same_hash_in_another_colour_is_other_footage(distance, expected):
    first = video("a", bits())
    second = replace(video("b", bits()), colours=first.colours + np.array([0, distance], np.float32))
    assert find_duplicates([first, second]) == expected


def test_sixty_percent_of_the_shorter_video_decide():
    long = video("long", *(bits(*range(10 * number, 10 * number + 10)) for number in range(6)))
    others = np.random.default_rng(1).random((5, 64)) < 0.5
    assert find_duplicates([long, video("short", *long.frames[:3], *others[:2])]) == [("long", "short")]
    assert find_duplicates([long, video("short", *long.frames[:2], *others[:3])]) == []


@pytest.mark.parametrize("block", [64, 1000])
def test_pairs_are_the_same_in_whatever_blocks_they_are_compared(monkeypatch, block):
    generator = np.random.default_rng(2)
    videos = [video(str(number), *(generator.random((9, 64)) < 0.5)) for number in range(12)]
    videos[7] = replace(videos[2], name="7", frames=videos[2].mirrored, mirrored=videos[2].frames)
    videos[11] = video("11", *videos[5].frames[3:])
    expected = [("2", "7"), ("5", "11")]
    assert find_duplicates(videos) == expected
    monkeypatch.setattr(duplicates, "_BLOCK_VALUES", block)
    assert find_duplicates(videos) == expected


def test_a_video_of_one_frame_in_five_seconds_has_hashes(dance):
    slow = [hash_video(name, dance[::6][:10], fps=0.2) for name in "ab"]
    assert len(slow[0].frames) > 10
    assert find_duplicates(slow) == [("a", "b")]


def test_pictures_without_contrast_have_no_hash():
    black = hash_video("black", np.zeros((5, 40, 30, 3), np.uint8), fps=1.0)
    assert len(black.frames) == 0
    assert find_duplicates([black, hash_video("grey", np.full((5, 40, 30, 3), 90, np.uint8), fps=1.0)]) == []


def test_groups_unite_chains_and_keep_the_order():
    assert group_duplicates("abcdef", [("e", "b"), ("c", "e"), ("a", "d")]) == [["a", "d"], ["b", "c", "e"], ["f"]]


def test_leaks_name_the_training_video_first():
    same, other = bits(), bits(*range(30))
    train = [video("t1", other), video("t2", same), video("t3", same)]
    validation = [video("v1", same), video("v2", bits(*range(0, 64, 2)))]
    assert check_leaks(train, validation) == [("t2", "v1"), ("t3", "v1")]
    assert check_leaks(train[:1], validation) == []
    with pytest.raises(ValueError, match="in the validation set: t2"):
        check_leaks(train, [train[1]])


def test_hashes_survive_json(dance):
    hashes = hash_video("a", dance, fps=FPS)
    restored = VideoHashes.from_json(json.loads(json.dumps(hashes.to_json())))
    np.testing.assert_array_equal(restored.frames, hashes.frames)
    np.testing.assert_array_equal(restored.mirrored, hashes.mirrored)
    np.testing.assert_allclose(restored.colours, hashes.colours, atol=0.01)
    assert restored.name == "a"


@pytest.mark.parametrize(("num_frames", "expected"), [(4, 1), (16, 1), (24, 2), (64, 7), (63, 7)])
def test_there_is_one_hash_per_second_of_two_seconds_each(dance, num_frames, expected):
    assert len(hash_video("a", dance[:num_frames], fps=FPS).frames) == expected


def brute_force(videos: list[VideoHashes]) -> list[tuple[str, str]]:
    """The definition, second by second, in Python's integers."""

    def numbers(rows: np.ndarray) -> list[int]:
        return [int("".join("01"[bit] for bit in row), 2) for row in rows.astype(int)]

    frames, mirrored = [numbers(one.frames) for one in videos], [numbers(one.mirrored) for one in videos]
    pairs = []
    for first, second in itertools.combinations(range(len(videos)), 2):
        both = (frames, frames), (mirrored, frames), (frames, mirrored)
        for hashes, others in ((some[first], other[second]) for some, other in both):
            near = [
                [
                    (one ^ other).bit_count() <= MAX_DISTANCE
                    and max(abs(float(a) - float(b)) for a, b in zip(colour, other_colour, strict=True)) <= 10
                    for other, other_colour in zip(others, videos[second].colours, strict=True)
                ]
                for one, colour in zip(hashes, videos[first].colours, strict=True)
            ]
            columns = list(zip(*near, strict=True))
            shortest = min(len(near), len(columns))
            if any(
                sum(map(any, found)) / len(found) >= MIN_SHARE for found in (near, columns) if len(found) == shortest
            ):
                pairs.append((videos[first].name, videos[second].name))
                break
    return pairs


def noisy_copies(seed: int, *, num_videos: int = 26) -> list[VideoHashes]:
    """Videos of 1 to 90 seconds, half of them cut from others with noise of all sizes around the limits."""
    generator = np.random.default_rng(seed)
    videos: list[VideoHashes] = []
    for number in range(num_videos):
        length = int(generator.integers(1, 12)) if number else 90
        rows = generator.random((length, 64)) < generator.uniform(0.2, 0.8, 64)
        mirror, colours = ~rows[:, ::-1], generator.normal(128, 4, (length, 2))
        if number and generator.random() < 0.6:
            source = videos[int(generator.integers(number))]
            picked = generator.integers(0, len(source.frames), length)
            flips = np.zeros((length, 64), bool)
            for row, count in zip(flips, generator.integers(0, 10, length), strict=True):
                row[generator.permutation(64)[:count]] = True
            rows, mirror = source.frames[picked] ^ flips, source.mirrored[picked] ^ flips
            colours = source.colours[picked] + generator.normal(0, 4, (length, 2))
            if generator.random() < 0.3:
                rows, mirror = mirror, rows
        videos.append(VideoHashes(str(number), rows, mirror, colours.astype(np.float32)))
    return videos


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_those_of_a_comparison_of_every_second_with_every_other(seed):
    videos = noisy_copies(seed)
    expected = brute_force(videos)
    assert 2 <= len(expected) < len(videos) ** 2 / 8
    assert find_duplicates(videos) == expected
    train, validation = videos[::2], videos[1::2]
    sides = [{one.name for one in side} for side in (train, validation)]
    leaks = [pair for pair in brute_force([*train, *validation]) if (pair[0] in sides[0]) != (pair[1] in sides[0])]
    assert check_leaks(train, validation) == leaks


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_the_videos_does_not_matter(seed):
    """Otherwise the search for groups may miss what the comparison of both sides of the split finds."""
    videos = noisy_copies(seed)
    pairs = {frozenset(pair) for pair in find_duplicates(videos)}
    assert {frozenset(pair) for pair in find_duplicates(videos[::-1])} == pairs
    for one, other in itertools.permutations(videos, 2):
        assert bool(check_leaks([one], [other])) == (frozenset((one.name, other.name)) in pairs)


def test_of_two_videos_of_equal_length_the_larger_share_decides():
    rows = np.random.default_rng(0).random((4, 64)) < 0.5
    a, b = video("a", *rows[[0, 1, 1]]), video("b", *rows[[1, 2, 3]])
    assert find_duplicates([a, b]) == [("a", "b")]
    assert find_duplicates([b, a]) == [("b", "a")]


def test_the_comparison_reports_each_video_before_it_is_compared():
    """A watchdog must see that a long comparison continues."""
    videos, seen = noisy_copies(0), []
    find_duplicates(videos, before_video=seen.append)
    assert seen == [one.name for one in videos[:-1]]
    seen.clear()
    check_leaks(videos[:5], videos[5:], before_video=seen.append)
    assert seen == [one.name for one in videos[:5]]


def test_a_hash_of_another_length_is_refused():
    content = video("a", bits()).to_json()
    with pytest.raises(ValueError, match="16 hexadecimal digits"):
        VideoHashes.from_json(content | {"frames": ["00ff"]})


def one_camera(seed: int, *, num_videos: int = 30) -> list[VideoHashes]:
    """Videos of two cameras, each second a few bits from its camera's picture, and some of other places."""
    generator = np.random.default_rng(seed)
    cameras = generator.random((2, 64)) < 0.5
    videos = []
    for number in range(num_videos):
        length = int(generator.integers(1, 9))
        picture = cameras[number % 2] if number % 5 else generator.random(64) < 0.5
        rows = picture ^ (generator.random((length, 64)) < generator.choice([0.02, 0.05, 0.08]))
        videos.append(video(f"v{number}", *rows))
    return videos


@pytest.mark.parametrize("make", [noisy_copies, one_camera])
@pytest.mark.parametrize("seed", range(6))
def test_groups_without_known_pairs_are_those_of_all_pairs(make, seed):
    videos = make(seed)
    names = [one.name for one in videos] + ["without hashes"]
    expected = group_duplicates(names, find_duplicates(videos))
    assert any(len(group) > 1 for group in expected)
    assert find_groups(names, videos) == expected


def test_videos_of_one_camera_are_compared_with_its_first_alone(monkeypatch):
    videos = [video(f"v{number}", bits(number % 3), bits(number % 2)) for number in range(50)]
    compared, near = [], duplicates._near_seconds

    def count(some, others, *rest):
        compared.append(len(some) * len(others))
        return near(some, others, *rest)

    monkeypatch.setattr(duplicates, "_near_seconds", count)
    assert find_groups([one.name for one in videos], videos) == [[one.name for one in videos]]
    assert sum(compared) == 3 * 2 * 98, "2 seconds with 98 others: as they are, and mirrored in two ways"
