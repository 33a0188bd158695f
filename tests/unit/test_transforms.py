"""Picture transforms: normals stay unit vectors, a flipped clip is the clip of a mirrored world."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamdance.dancers.render import render_clip
from dreamdance.data.loading.clip_frames import ClipFrames, flip_clip
from dreamdance.media.keypoints import LEFT_HAND, RIGHT_HAND, flip_keypoints
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import (
    decode_normals,
    encode_normals,
    flip_images,
    flip_normals,
    pass_through,
    pictures_to_tensor,
    resize_images,
    resize_normals,
    tensor_to_pictures,
)


@pytest.fixture(scope="module")
def clip() -> ClipFrames:
    dancer = render_clip(12, num_frames=2, width=64, height=96)
    depth = torch.from_numpy(1 / dancer.depth)[:, None]
    return ClipFrames(
        maps={
            "rgb": pictures_to_tensor(dancer.rgb),
            "pose": pictures_to_tensor(draw_poses(dancer.keypoints, width=64, height=96)),
            "normal": encode_normals(torch.from_numpy(dancer.normal).movedim(-1, -3)),
            "depth": (depth / depth.max()).expand(-1, 3, -1, -1),
            "mask": torch.from_numpy(dancer.mask)[:, None].float(),
        },
        keypoints=torch.from_numpy(dancer.keypoints),
    )


def random_normals(*leading: int) -> Tensor:
    vectors = torch.randn(*leading, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    return vectors / vectors.norm(dim=-3, keepdim=True)


def lengths(encoded: Tensor) -> Tensor:
    return (encoded * 2 - 1).norm(dim=-3)


def test_decoding_undoes_encoding() -> None:
    normals = random_normals(2)
    torch.testing.assert_close(decode_normals(encode_normals(normals)), normals)


def test_decoded_normals_have_unit_length_whatever_the_picture() -> None:
    pictures = torch.rand(4, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    pictures[0] = 0.5  # mid-grey has no direction
    decoded = decode_normals(pictures)
    torch.testing.assert_close(decoded.norm(dim=-3), torch.ones(4, 12, 8))
    assert decoded[0, :, 0, 0].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_resizing_keeps_leading_axes_and_constant_pictures(leading: tuple[int, ...]) -> None:
    picture = torch.full((*leading, 3, 12, 8), 0.25)
    resized = resize_images(picture, 6, 20)
    assert resized.shape == (*leading, 3, 6, 20)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.25))


def test_resizing_to_the_same_size_changes_nothing() -> None:
    picture = torch.rand(3, 12, 8)
    assert resize_images(picture, 12, 8) is picture
    assert resize_normals(picture, 12, 8) is picture


def test_shrinking_averages_instead_of_dropping_pixels() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    shrunk = resize_images(stripes, 8, 8)
    torch.testing.assert_close(shrunk[..., 1:-1], torch.full_like(shrunk[..., 1:-1], 0.5), rtol=0, atol=0.02)


def test_resized_normals_are_unit_vectors_and_a_resized_wall_is_the_wall() -> None:
    resized = resize_normals(encode_normals(random_normals(2)), 5, 6)
    torch.testing.assert_close(lengths(resized), torch.ones(2, 5, 6))
    wall = encode_normals(torch.tensor([0.6, 0.0, 0.8]).reshape(3, 1, 1).expand(3, 12, 8))
    torch.testing.assert_close(resize_normals(wall, 24, 16), wall[:, :1, :1].expand(3, 24, 16))


def test_resized_normals_equal_those_in_double_precision() -> None:
    encoded = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    vectors = encoded.double() * 2.0 - 1.0
    vectors = vectors / vectors.pow(2).sum(dim=1, keepdim=True).sqrt()
    smaller = torch.nn.functional.interpolate(vectors, size=(24, 16), mode="bilinear", antialias=True)
    expected = (smaller / smaller.pow(2).sum(dim=1, keepdim=True).sqrt() + 1.0) / 2.0
    torch.testing.assert_close(resize_normals(encoded, 24, 16).double(), expected, rtol=0, atol=1e-6)


def test_between_two_walls_lies_the_direction_between_them() -> None:
    left, right = torch.tensor([-0.6, 0.0, 0.8]), torch.tensor([0.6, 0.0, 0.8])
    walls = encode_normals(torch.stack([left, right], dim=-1).reshape(3, 1, 2))
    middle = decode_normals(resize_normals(walls, 1, 1))
    torch.testing.assert_close(middle.reshape(3), torch.tensor([0.0, 0.0, 1.0]))


def test_passing_through_a_smaller_size_loses_detail_but_no_size(clip: ClipFrames) -> None:
    through = pass_through(clip.maps["rgb"], 24, 16)
    assert through.shape == clip.maps["rgb"].shape
    torch.testing.assert_close(resize_images(through, 6, 4), resize_images(clip.maps["rgb"], 6, 4), rtol=0, atol=0.03)
    assert through.diff(dim=-1).abs().mean() < 0.7 * clip.maps["rgb"].diff(dim=-1).abs().mean()
    torch.testing.assert_close(
        lengths(pass_through(clip.maps["normal"], 24, 16, kind="normals")), torch.ones(2, 96, 64)
    )
    assert (lengths(pass_through(clip.maps["normal"], 24, 16)) < 0.9).any()  # as colours they would not be


def test_passing_through_the_same_size_changes_nothing(clip: ClipFrames) -> None:
    assert torch.equal(pass_through(clip.maps["rgb"], 96, 64), clip.maps["rgb"])


def test_flipping_normals_mirrors_the_picture_and_negates_x() -> None:
    normals = random_normals(2)
    flipped = decode_normals(flip_normals(encode_normals(normals)))
    expected = normals.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).reshape(3, 1, 1)
    torch.testing.assert_close(flipped, expected)


def test_a_flipped_clip_is_mirrored_in_every_modality(clip: ClipFrames) -> None:
    flipped = flip_clip(clip)
    for name in ("rgb", "depth", "mask"):
        assert torch.equal(flipped.maps[name], flip_images(clip.maps[name])), name
    mirrored = decode_normals(clip.maps["normal"]).flip(-1)
    torch.testing.assert_close(decode_normals(flipped.maps["normal"])[:, 0], -mirrored[:, 0])
    torch.testing.assert_close(decode_normals(flipped.maps["normal"])[:, 1:], mirrored[:, 1:])


def test_a_flipped_clip_swaps_left_and_right_key_points_and_redraws_the_pose(clip: ClipFrames) -> None:
    flipped = flip_clip(clip)
    assert clip.keypoints is not None
    assert flipped.keypoints is not None
    assert torch.equal(flipped.keypoints[:, LEFT_HAND, 1:], clip.keypoints[:, RIGHT_HAND, 1:])
    torch.testing.assert_close(flipped.keypoints[:, LEFT_HAND, 0], 1 - clip.keypoints[:, RIGHT_HAND, 0])
    redrawn = draw_poses(flip_keypoints(clip.keypoints.numpy()), width=64, height=96)
    assert torch.equal(flipped.maps["pose"], pictures_to_tensor(redrawn))
    # Mirroring only the old drawing would leave the colours of left and right in the wrong places.
    assert (flipped.maps["pose"] - flip_images(clip.maps["pose"])).abs().max() > 0.3


def test_flipping_a_clip_twice_gives_it_back(clip: ClipFrames) -> None:
    twice = flip_clip(flip_clip(clip))
    for name in ("rgb", "depth", "mask"):
        assert torch.equal(twice.maps[name], clip.maps[name]), name
    torch.testing.assert_close(twice.maps["normal"], clip.maps["normal"])
    torch.testing.assert_close(twice.keypoints, clip.keypoints)
    assert (
        (twice.maps["pose"] - clip.maps["pose"]).abs() > 0.1
    ).float().mean() < 1e-3  # a point may round to the other side


def test_a_mirrored_dancer_equals_a_dancer_in_a_mirrored_world(clip: ClipFrames) -> None:
    """The flipped normals are those of the flipped depth: geometry stays consistent, not only pictures."""
    flipped = flip_clip(clip)
    normals = decode_normals(flipped.maps["normal"])
    disparity = flipped.maps["depth"][:, 0]
    # Where a surface turns to the right its disparity falls to the right, whatever the lens.
    slope = (disparity[:, :, 2:] - disparity[:, :, :-2])[..., 1:-1, :]
    turned = normals[:, 0, 1:-1, 1:-1]
    whole = -torch.nn.functional.max_pool2d(-flipped.maps["mask"], 5, stride=1, padding=2)[:, 0, 1:-1, 1:-1] > 0.5
    steep = whole & (turned.abs() > 0.5) & (slope.abs() < 0.02)
    assert steep.sum() > 100
    assert ((slope[steep] < 0) == (turned[steep] > 0)).float().mean() > 0.9


def test_a_clip_without_normals_depth_and_mask_can_be_flipped(clip: ClipFrames) -> None:
    bare = {name: clip.maps[name] for name in ("rgb", "pose")}
    assert list(flip_clip(ClipFrames(bare, clip.keypoints)).maps) == ["rgb", "pose"]


def test_a_clip_that_has_only_a_drawing_is_not_flipped(clip: ClipFrames) -> None:
    with pytest.raises(ValueError, match="no key points cannot be flipped"):
        flip_clip(ClipFrames(clip.maps))


def test_pictures_are_the_same_after_conversion_to_tensors_and_back() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    tensor = pictures_to_tensor(pictures)
    assert tensor.shape == (2, 3, 4, 6)
    assert np.array_equal(tensor_to_pictures(tensor), pictures)
    depth = np.array([[[0], [65535]]], dtype=np.uint16)
    assert pictures_to_tensor(depth).tolist() == [[[0.0, 1.0]]]
    assert tensor_to_pictures(torch.tensor([[[-1.0, 2.0]]])).ravel().tolist() == [0, 255]
