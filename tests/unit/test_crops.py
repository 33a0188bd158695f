"""Crop augmentation shows one part of all maps of a window, with its aspect, exactly where the crop says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.random_shards import random_clip

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.stored_clip import NO_CROP, draw_crop, draw_window
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
from dreamdance.media.cropping import Crop, PartialCrop
from dreamdance.media.keypoints import FACE
from dreamdance.recipe.sections import Shards

WIDTH, HEIGHT = 64, 96
# Their box, with its margin, reaches from columns 20 to 44 and from rows 33 to 51 of the clip.
FACE_POINTS = [[24 / 64, 36 / 96, 0.9], [40 / 64, 48 / 96, 0.9], [24 / 64, 48 / 96, 0.7], [40 / 64, 36 / 96, 0.7]]


def ramps(seed: int) -> ClipRecord:
    """A clip whose maps state each pixel's place: red is 2 x its column, green 2 x its row, depth 256 x its column."""
    clip = random_clip(seed, num_frames=2, width=WIDTH, height=HEIGHT)
    row, column = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.broadcast_to(np.stack([2 * column, 2 * row, 0 * row], axis=-1).astype(np.uint8), (2, HEIGHT, WIDTH, 3))
    depth = np.broadcast_to(256 * column.astype(np.uint16), (2, HEIGHT, WIDTH))
    mask = np.broadcast_to(np.where(column < WIDTH // 2, 255, 0).astype(np.uint8), (2, HEIGHT, WIDTH))
    maps = {"rgb": picture, "pose": picture, "normal": picture, "depth": depth, "mask": mask}
    keypoints = np.zeros((2, 128, 3), np.float32)
    keypoints[:, FACE][:, :4] = FACE_POINTS
    return replace(
        clip, keypoints=keypoints, maps={name: np.ascontiguousarray(values) for name, values in maps.items()}
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    folder = tmp_path_factory.mktemp("ramps") / "shards"
    parts = [Part("part_00000", lambda: iter([ramps(0), ramps(1)]))]
    write_shards(folder, parts, settings={"clips": 2}, shard_format=ShardFormat(shard_size_mib=4, compression="none"))
    return Shards(local=str(folder))


def dataset(shards: Shards, **changes) -> ClipDataset:
    settings = {"width": WIDTH, "height": HEIGHT, "num_frames": 2, "maps": ("depth", "mask")}
    return ClipDataset(shards, **{**settings, **changes})


def places(crop: Crop) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and rows of the clip at the centres of a result's pixels."""
    columns = crop.left + (torch.arange(WIDTH, dtype=torch.float64) + 0.5) * crop.width / WIDTH - 0.5
    rows = crop.top + (torch.arange(HEIGHT, dtype=torch.float64) + 0.5) * crop.height / HEIGHT - 0.5
    return columns, rows


def assert_shows(picture: torch.Tensor, crop: Crop, *, mirrored: bool = False) -> None:
    """The picture `3 H W` shows that part of the ramps; its outermost pixels repeat the edge of the part."""
    columns, rows = places(crop)
    if mirrored:
        columns = WIDTH - 1 - columns
    found = picture.double() * 255 / 2
    inner = (slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[0][inner], columns.expand(HEIGHT, -1)[inner], rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1][inner], rows[:, None].expand(-1, WIDTH)[inner], rtol=0, atol=1e-3)


@pytest.mark.parametrize("flip", [False, True])
def test_one_crop_shows_the_same_of_all_maps_and_the_reference_has_its_own(shards, flip):
    clips = dataset(shards)
    clip = clips.clip(0)
    # 3/4 of each side: 48 x 72 pixels at (4, 18), and at (12, 0) for the reference
    crop, other = PartialCrop(0.5625, x=4.5 / 17, y=18.5 / 25), PartialCrop(0.5625, x=12.5 / 17, y=0.0)
    window = draw_window(clip, (0, 0, 0), num_frames=2, stride=(1, 1), flip_probability=0.0)
    window = replace(window, crop=crop, reference_crop=other, flip=flip)
    sample = clips.cut(clip, window, (0, 0, 0)).floats()
    expected = Crop(left=4, top=18, width=48, height=72)
    for frame in range(2):
        assert_shows(sample.maps["rgb"][frame], expected, mirrored=flip)
    assert_shows(sample.reference, Crop(left=12, top=0, width=48, height=72), mirrored=flip)
    columns = WIDTH - 1 - places(expected)[0] if flip else places(expected)[0]
    depth = sample.maps["depth"][0, 0].double() * 65535 / 256
    torch.testing.assert_close(depth[:, 1:-1], columns.expand(HEIGHT, -1)[:, 1:-1], rtol=0, atol=1e-2)
    assert torch.equal(sample.maps["mask"][0, 0, 5] > 0.5, columns < WIDTH / 2 - 0.5)
    if not flip:  # a mirrored pose is drawn again
        assert torch.equal(sample.maps["pose"], sample.maps["rgb"])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (32, 96), (64, 48)], ids=["whole", "narrow", "low"])
def test_boxes_of_regions_lie_where_the_picture_shows_them(shards, flip, size):
    width, height = size
    clips = dataset(shards, width=width, height=height, with_regions=True)
    clip = clips.clip(0)
    window = draw_window(clip, (0, 0, 0), num_frames=2, stride=(1, 1), flip_probability=0.0)
    window = replace(window, crop=PartialCrop(0.81, x=0.3, y=0.4), flip=flip)
    sample = clips.cut(clip, window, (0, 0, 0)).floats()
    left, top, right, bottom, confidence = sample.regions[1, 0].double().tolist()
    assert confidence == pytest.approx(0.8)
    assert not sample.regions[:, 1:, 4].any(), "no hands"
    # the ramps state the place of each column and row; continued beyond the outermost ones, which repeat the edge
    columns = sample.maps["rgb"][0, 0, height // 2].double().numpy() * 255 / 2 + 0.5
    rows = sample.maps["rgb"][0, 1, :, width // 2].double().numpy() * 255 / 2 + 0.5
    for places, ends, expected in ((columns, (left, right), (20, 44)), (rows, (top, bottom), (33, 51))):
        count = len(places)
        line = np.polynomial.Polynomial.fit((np.arange(count)[2:-2] + 0.5) / count, places[2:-2], 1)
        assert sorted(line(np.array(ends))) == pytest.approx(expected, abs=0.02)


def test_crops_depend_on_the_key_alone_and_stay_within_their_range(shards):
    clips = dataset(shards, crop_scale=(0.5, 0.9))
    windows = [
        draw_window(
            clips.clip(0), (0, epoch, 0), num_frames=1, stride=(1, 1), flip_probability=0.0, crop_scale=(0.5, 0.9)
        )
        for epoch in range(300)
    ]
    shares = torch.tensor([window.crop.share for window in windows])
    assert shares.min() < 0.51
    assert shares.max() > 0.89
    assert 0.5 <= shares.min() <= shares.max() <= 0.9
    own = torch.tensor([[window.crop.share, window.crop.x, window.crop.y] for window in windows])
    other = torch.tensor([[w.reference_crop.share, w.reference_crop.x, w.reference_crop.y] for w in windows])
    assert torch.corrcoef(torch.cat([own, other], dim=1).T).fill_diagonal_(0).abs().max() < 4 / 300**0.5
    assert draw_crop((0.5, 0.9), (0, 7, 0), "crop") == windows[7].crop
    first, again = (clips.training_sample(SampleKey(epoch=3, sample_id=1)) for _ in range(2))
    assert torch.equal(first.maps["rgb"], again.maps["rgb"])


def test_without_crops_samples_are_those_of_before(shards):
    plain, none = dataset(shards), dataset(shards, crop_scale=NO_CROP)
    for epoch in range(3):
        first, second = (clips.stored_sample(SampleKey(epoch, 1)) for clips in (plain, none))
        assert first.maps["rgb"].dtype == torch.uint8
        assert all(torch.equal(first.maps[name], second.maps[name]) for name in first.maps)
        assert torch.equal(first.reference, second.reference)


def test_a_crop_has_its_share_and_the_aspect_of_the_whole_to_a_pixel():
    whole = Crop(left=10, top=20, width=512, height=768)
    for share in (0.2, 0.5, 0.9, 0.97, 1.0):
        for place in (0.0, 0.4, 0.999999):
            part = PartialCrop(share, x=place, y=place).of(whole)
            assert part.width == pytest.approx(512 * share**0.5, abs=0.5)
            assert part.height == pytest.approx(768 * share**0.5, abs=0.5)
            assert whole.left <= part.left
            assert part.left + part.width <= whole.left + whole.width
            assert whole.top <= part.top
            assert part.top + part.height <= whole.top + whole.height
    assert PartialCrop(1.0, x=0.999, y=0.999).of(whole) == whole
    corner = PartialCrop(0.25, x=0.999999, y=0.0).of(whole)
    assert (corner.left + corner.width, corner.top) == (522, 20)
