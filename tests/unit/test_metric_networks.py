"""LPIPS, I3D and the 3D ResNet: weights of the packages and in the official forms; what may be in a pickle."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import require_weights
from torch import Tensor, nn

from dreamdance.errors import MissingInputError
from dreamdance.evaluation.networks.i3d import I3D, I3D_SIZE, NUM_CLASSES
from dreamdance.evaluation.networks.lpips import Backbone, Lpips
from dreamdance.evaluation.networks.pickled_arrays import PickledArraysError, read_pickled_arrays
from dreamdance.evaluation.networks.resnet3d import ResNet3D
from dreamdance.evaluation.networks.weight_files import read_converted, read_torch
from dreamdance.media.transforms import resize_images
from dreamdance.media.video import read_frames

PACKAGED = {"alex": "lpips/alexnet.ckpt", "vgg": "lpips/vgg16.ckpt"}
# Of the five heads in lpips 0.1.4 (lpips/weights/v0.1/alex.pth, vgg.pth), one after the other, as float32.
HEADS_SHA256 = {
    "alex": "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
    "vgg": "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
}
CLIPS = Path(os.environ.get("DREAMDANCE_CLIPS", Path(__file__).parents[2].parent / "shared" / "clips"))
# By torchvision's list of the classes: belly, break, country line, ballet, charleston, gangnam style, macarena,
# jumpstyle, krumping, robot, salsa, swing, tango and tap dancing, zumba.
KINETICS_DANCES = {18, 34, 75, 84, 85, 86, 87, 173, 179, 277, 283, 342, 348, 349, 399}


def lpips(backbone: Backbone) -> Lpips:
    return Lpips(backbone).load(require_weights(PACKAGED[backbone]))


def i3d() -> I3D:
    return I3D().load(require_weights("i3d/i3d-kinetics-400.ckpt"))


def distance(network: Lpips, first: Tensor, second: Tensor) -> float:
    return float(network.compare(network.describe(first[None]), network.describe(second[None])))


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_heads_are_those_of_the_package_lpips(backbone):
    state = lpips(backbone).state_dict()
    heads = b"".join(state[f"lin{place}.model.1.weight"].numpy().tobytes() for place in range(5))
    assert hashlib.sha256(heads).hexdigest() == HEADS_SHA256[backbone]


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_is_zero_for_equal_pictures_and_grows_with_noise_and_knows_the_order_of_channels(backbone):
    network = lpips(backbone)
    generator = torch.Generator().manual_seed(0)
    picture = resize_images(torch.rand(3, 8, 8, generator=generator), 64, 48) * 2 - 1
    noise = torch.randn(picture.shape, generator=generator)
    assert distance(network, picture, picture) == 0.0
    distances = [distance(network, picture, picture + level * noise) for level in (0.02, 0.1, 0.4)]
    assert 0 < distances[0] < distances[1] < distances[2]
    red, blue, black = torch.zeros(3, 3, 64, 64) - 1
    red[0], blue[2] = 1.0, 1.0
    assert distance(network, red, black) != pytest.approx(distance(network, blue, black), rel=0.01)
    both = torch.stack([picture, picture + noise])
    together = network.compare(network.describe(both), network.describe(both.flip(0)))
    assert together.tolist() == pytest.approx([distance(network, *both)] * 2, rel=1e-4)


@pytest.mark.slow
def test_i3d_sees_a_dance_in_a_real_clip_of_one_if_its_channels_are_in_order():
    if not CLIPS.is_dir():
        pytest.skip(f"no folder of real clips at {CLIPS}; name one by DREAMDANCE_CLIPS")
    network, found = i3d(), []
    for start in (0, 120):
        frames = torch.from_numpy(read_frames(CLIPS / "dance_02.rgb.mp4", range(start, start + 16))).movedim(-1, 1)
        clip = resize_images(frames.float() / 127.5 - 1, I3D_SIZE, I3D_SIZE).movedim(1, 0)[None]
        logits = network(clip)[0]
        assert logits.shape == (NUM_CLASSES,)
        assert int(logits.argmax()) in KINETICS_DANCES
        found.append((logits.softmax(dim=0).max(), network(clip.flip(1))[0].argmax() == logits.argmax()))
    assert found[0][0] > 0.9, "it is ballet, and clearly"
    assert not found[1][1], "blue, green, red is taken for another class"


def test_official_state_dicts_give_the_same_as_the_package(tmp_path):
    packaged = i3d()
    (tmp_path / "i3d").mkdir()
    torch.save(packaged.state_dict(), tmp_path / "i3d" / "i3d_pretrained_400.pt")
    official = I3D().load(tmp_path)
    clip = torch.rand(1, 3, 10, I3D_SIZE, I3D_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(official(clip), packaged(clip))
    assert [file.file for file in official.files] == ["i3d/i3d_pretrained_400.pt"]
    assert len(str(official.files[0].sha256)) == 64


@pytest.mark.slow
def test_the_resnet_reads_the_file_of_its_authors_and_has_the_size_of_a_resnet_50(tmp_path):
    """In that file all names begin with `module.`, there is a classifier, and counters of batches are absent."""
    torch.manual_seed(0)
    saved = ResNet3D().eval()
    assert sum(parameter.numel() for parameter in saved.parameters()) == 47_018_576 - 2048 * 400 - 400
    state = {
        f"module.{name}": value for name, value in saved.state_dict().items() if not name.endswith("batches_tracked")
    }
    state |= {"module.fc.weight": torch.zeros(400, 2048), "module.fc.bias": torch.zeros(400)}
    (tmp_path / "resnet3d").mkdir()
    torch.save({"arch": "resnet-50", "epoch": 1, "state_dict": state}, tmp_path / "resnet3d" / "resnet-50-kinetics.pth")
    clip = torch.randn(1, 3, 16, 112, 112)
    loaded = ResNet3D().load(tmp_path)
    assert torch.equal(loaded(clip), saved(clip))
    assert loaded(clip).shape == (1, 2048)
    assert not torch.equal(loaded(clip), loaded(clip.flip(1)))


@pytest.mark.parametrize(
    ("network", "file"),
    [
        (Lpips("vgg"), "lpips/vgg16.ckpt"),
        (Lpips("alex"), "lpips/alexnet.ckpt"),
        (I3D(), "i3d/i3d-kinetics-400.ckpt"),
        (ResNet3D(), "resnet3d/resnet-50-kinetics.pth"),
    ],
)
def test_a_missing_file_is_named_with_the_place_to_get_it(tmp_path, network, file):
    with pytest.raises(MissingInputError, match=rf"{file}: the weights of .* are missing .*get them from (the|https)"):
        network.load(tmp_path)


def test_files_with_other_content_are_refused(tmp_path):
    for folder in ("lpips", "i3d"):
        (tmp_path / folder).mkdir()
    (tmp_path / "i3d" / "i3d-kinetics-400.ckpt").write_bytes(b"other")
    with pytest.raises(MissingInputError, match=r"SHA-256 .* have af5c50f0"):
        I3D().load(tmp_path)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "i3d" / "i3d_pretrained_400.pt")
    with pytest.raises(MissingInputError, match=r"i3d_pretrained_400.pt has not the weights of I3D"):
        I3D().load(tmp_path)
    torch.save({}, tmp_path / "lpips" / "vgg16-397923af.pth")
    with pytest.raises(MissingInputError, match=r"lpips/vgg.pth: the weights of LPIPS .* lpips/weights/v0.1/vgg.pth"):
        Lpips("vgg").load(tmp_path)


def test_a_state_dict_with_code_in_it_is_refused(tmp_path):
    torch.save({"code": nn.Linear(1, 1)}, tmp_path / "whole_module.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_torch(tmp_path / "whole_module.pt")


def test_pickled_arrays_are_read_with_the_names_of_all_levels(tmp_path):
    arrays = {"params": {"a": np.arange(3.0), "b": {"c/d": np.ones((2, 2), np.float32)}}}
    (tmp_path / "file").write_bytes(pickle.dumps(arrays, protocol=3).replace(b"numpy._core", b"numpy.core"))
    found = read_pickled_arrays(tmp_path / "file")
    assert list(found) == ["params:a", "params:b:c/d"]
    np.testing.assert_array_equal(found["params:a"], np.arange(3.0))


class Command:
    def __reduce__(self):
        return (os.mkdir, ("made_by_a_pickle",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Command(), "mkdir, which is not permitted"),
        ({"a": np.float64(1.0)}, "scalar, which is not permitted"),
        ({"a": np.random.default_rng(0)}, "which is not permitted"),
        ({"a": "text"}, "'a' is str"),
        ({"a": np.array(["text"])}, "'a' is ndarray, not an array of numbers"),
    ],
)
def test_a_pickle_that_asks_for_a_fourth_name_or_holds_no_numbers_is_refused(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(pickle.dumps(content, protocol=3).replace(b"numpy._core", b"numpy.core"))
    with pytest.raises(PickledArraysError, match=reason):
        read_pickled_arrays(tmp_path / "file")
    assert not (tmp_path / "made_by_a_pickle").exists()
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:-3])
    with pytest.raises(PickledArraysError):
        read_pickled_arrays(tmp_path / "cut")


def test_a_pickle_is_converted_once_beside_it_or_in_the_users_folder(tmp_path, monkeypatch):
    pickled, cache = tmp_path / "weights" / "some.ckpt", tmp_path / "cache"
    pickled.parent.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    content = pickle.dumps({"a": np.ones((2, 3), np.float32)}, protocol=3)
    conversions = []

    def convert(arrays):
        conversions.append(list(arrays))
        return {"weight": arrays["a"].T}

    for sha256 in ("1" * 64, "2" * 64):
        pickled.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
        assert torch.equal(read_converted(pickled, convert, sha256)["weight"], torch.ones(3, 2))
        pickled.write_bytes(b"gone")
        assert torch.equal(read_converted(pickled, convert, sha256)["weight"], torch.ones(3, 2))
    assert conversions == [["a"], ["a"]]
    assert sorted(path.name for path in pickled.parent.iterdir()) == [
        "some.1111111111111111.safetensors",
        "some.2222222222222222.safetensors",
        "some.ckpt",
    ]
    pickled.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    place = pickled.with_name("some.3333333333333333.safetensors")
    place.mkdir()  # nobody can replace a folder that is not empty by a file
    (place / "in the way").touch()
    read_converted(pickled, convert, "3" * 64)
    assert [path.name for path in (cache / "dreamdance" / "networks").iterdir()] == [place.name]
