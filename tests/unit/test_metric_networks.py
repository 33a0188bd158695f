"""LPIPS, I3D and the 3D ResNet: weights of the packages and in the official forms; what may be in a pickle."""

import hashlib
import os
import pickle

import cv2
import numpy as np
import pytest
import torch
from support.networks import require_weights
from support.real_clips import CLIPS, needs_clips
from torch import Tensor, nn
from torch.nn import functional

from dreamdance.errors import MissingInputError
from dreamdance.evaluation.network_metrics import NetworkMetrics, describe_networks
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
# By torchvision's list of the classes: belly, break, country line, ballet, charleston, gangnam style, macarena,
# jumpstyle, krumping, robot, salsa, swing, tango and tap dancing, zumba.
KINETICS_DANCES = {18, 34, 75, 84, 85, 86, 87, 173, 179, 277, 283, 342, 348, 349, 399}


def lpips(backbone: Backbone) -> Lpips:
    return Lpips(backbone).load(require_weights(PACKAGED[backbone]))


def i3d() -> I3D:
    return I3D().load(require_weights("i3d/i3d-kinetics-400.ckpt"))


# For `known_pairs`, by the package lpips 0.1.4: its own network and heads, with the backbones of tools/networks.sh, on
# torch 2.13 and a CPU. The last line is of values in [0, 1], as DisCo feeds them, the others of [-1, 1].
KNOWN_LPIPS = {
    "lpips_alex": {"colours": 0.590973, "noise": 0.370005, "blur": 0.267080},
    "lpips_vgg": {"colours": 0.907914, "noise": 0.495946, "blur": 0.353417},
    "lpips_disco": {"colours": 0.797016, "noise": 0.472453, "blur": 0.337197},
}


def known_pairs() -> dict[str, np.ndarray]:
    """Pairs of pictures `2 64 48 3`, bytes: other ramps in each channel, noise of .1 over one of them, and its blur."""
    down, right = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 48), indexing="ij")
    first = np.stack([right, down, (down * right) ** 2], axis=-1)
    second = np.stack([0.9 * down, right**2, 1 - down], axis=-1)
    noisy = first + 0.1 * np.random.default_rng(0).standard_normal(first.shape)
    pairs = {"colours": (first, second), "noise": (first, noisy), "blur": (noisy, cv2.blur(noisy, (5, 5)))}
    return {name: np.rint(255 * np.clip(pair, 0, 1)).astype(np.uint8) for name, pair in pairs.items()}


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_heads_are_those_of_the_package_lpips(backbone):
    state = lpips(backbone).state_dict()
    heads = b"".join(state[f"lin{place}.model.1.weight"].numpy().tobytes() for place in range(5))
    assert hashlib.sha256(heads).hexdigest() == HEADS_SHA256[backbone]


@pytest.mark.parametrize("key", KNOWN_LPIPS)
def test_lpips_is_that_of_the_package_lpips_for_colours_noise_and_blur(key):
    """Through the path of `evaluate`. With red and blue exchanged the first pair has other values by .7 % or more."""
    name = "lpips_alex" if key == "lpips_alex" else "lpips_vgg"
    metrics, found = NetworkMetrics({name: lpips("alex" if key == "lpips_alex" else "vgg")}), {}
    for pair, pictures in known_pairs().items():
        as_given = pictures if key == "lpips_disco" else pictures.astype(np.float32) / 255
        first, second = as_given[:, None]
        scores, _ = metrics.lpips({"first": first, "same": second}, second, disco=key == "lpips_disco", beat=str)
        found[pair] = scores["first"][key]
        assert scores["same"][key] == 0.0
    assert found == pytest.approx(KNOWN_LPIPS[key], rel=1e-4)


def test_a_batch_of_pictures_has_the_distances_of_each():
    network = Lpips("alex").eval()
    first, second = torch.rand(2, 2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = network.compare(network.describe(first), network.describe(second))
    each = [network.compare(network.describe(first[i : i + 1]), network.describe(second[i : i + 1])) for i in (0, 1)]
    assert together.tolist() == pytest.approx(torch.cat(each).tolist(), rel=1e-4)


@pytest.mark.clips
@pytest.mark.slow
@needs_clips("dance_02")
def test_i3d_sees_a_dance_in_a_real_clip_of_one_if_its_channels_are_in_order():
    network, found = i3d(), []
    for start in (0, 120):
        frames = torch.from_numpy(read_frames(CLIPS / "dance_02.rgb.mp4", range(start, start + 16))).movedim(-1, 1)
        clip = resize_images(frames.float() / 127.5 - 1, I3D_SIZE, I3D_SIZE).movedim(1, 0)[None]
        logits = network(clip)[0]
        assert logits.shape == (NUM_CLASSES,)
        assert int(logits.argmax()) in KINETICS_DANCES
        found.append((logits.softmax(dim=0).max(), network(clip.flip(1))[0].argmax() == logits.argmax()))
    assert [float(probability) for probability, _ in found] == pytest.approx([0.98, 0.58], abs=0.03)
    assert not found[1][1], "blue, green, red is taken for another class"


def test_i3d_pools_two_steps_of_time_and_averages_the_logits_of_all_pairs():
    """17 frames become three steps a, b, c; of the pairs ab and bc, b counts twice. Up to 16 frames no pool differs."""
    network, seen = i3d(), []
    network.Mixed_5c.register_forward_hook(lambda _, __, hidden: seen.append(hidden))
    clip = torch.rand(1, 3, 17, I3D_SIZE, I3D_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits = network(clip)
    assert seen[0].shape == (1, 1024, 3, 7, 7)
    a, b, c = seen[0].mean(dim=(3, 4)).unbind(dim=-1)
    last = network.logits.conv3d
    expected, other = (
        functional.linear(x, last.weight.flatten(1), last.bias) for x in ((a + 2 * b + c) / 4, (a + b + c) / 3)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - other).norm() > 0.1 * logits.norm(), "a pool of (1, 7, 7) has other logits"


def test_official_state_dicts_give_the_same_as_the_package_but_their_hash_is_not_pinned(tmp_path):
    packaged = i3d()
    (tmp_path / "i3d").mkdir()
    torch.save(packaged.state_dict(), tmp_path / "i3d" / "i3d_pretrained_400.pt")
    official = I3D().load(tmp_path)
    clip = torch.rand(1, 3, 10, I3D_SIZE, I3D_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(official(clip), packaged(clip))
    digest = hashlib.sha256((tmp_path / "i3d" / "i3d_pretrained_400.pt").read_bytes()).hexdigest()
    line = describe_networks(NetworkMetrics({"fvd": official}), {}, {})["fvd"]
    assert line.startswith(f"i3d/i3d_pretrained_400.pt, SHA-256 {digest[:16]} (not pinned)")
    assert "not pinned" not in describe_networks(NetworkMetrics({"fvd": packaged}), {}, {})["fvd"]


def random_resnet_state() -> dict[str, Tensor]:
    """Random weights with the names and shapes of resnet-50-kinetics.pth, without `module.` and the classifier."""
    shapes, norms, channels = {"conv1": (64, 3, 7, 7, 7)}, {"bn1": 64}, 64
    for layer, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for number in range(count):
            block = f"layer{layer}.{number}"
            shapes[f"{block}.conv1"] = (width, channels, 1, 1, 1)
            shapes[f"{block}.conv2"] = (width, width, 3, 3, 3)
            shapes[f"{block}.conv3"] = (4 * width, width, 1, 1, 1)
            norms |= {f"{block}.bn1": width, f"{block}.bn2": width, f"{block}.bn3": 4 * width}
            if number == 0:
                shapes[f"{block}.downsample.0"] = (4 * width, channels, 1, 1, 1)
                norms[f"{block}.downsample.1"] = 4 * width
            channels = 4 * width
    state = {f"{name}.weight": torch.randn(shape) * (2 / np.prod(shape[1:])) ** 0.5 for name, shape in shapes.items()}
    for name, width in norms.items():
        state |= {f"{name}.weight": 0.5 + 0.5 * torch.rand(width), f"{name}.running_var": 0.5 + torch.rand(width)}
        state |= {f"{name}.bias": 0.1 * torch.randn(width), f"{name}.running_mean": 0.1 * torch.randn(width)}
    return state


def restated_resnet(state: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """A 3D ResNet-50 with shortcuts of type B, as its authors' models/resnet.py defines it, up to its average pool."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{of}"] for of in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def convolve(name: str, x: Tensor, stride: int | tuple[int, ...] = 1, padding: int = 0) -> Tensor:
        return functional.conv3d(x, state[f"{name}.weight"], None, stride, padding)

    hidden = functional.max_pool3d(norm("bn1", convolve("conv1", hidden, (1, 2, 2), 3)).relu(), 3, stride=2, padding=1)
    for layer, count in enumerate((3, 4, 6, 3), start=1):
        for number in range(count):
            block, stride = f"layer{layer}.{number}", 2 if layer > 1 and number == 0 else 1
            inner = norm(f"{block}.bn1", convolve(f"{block}.conv1", hidden)).relu()
            inner = norm(f"{block}.bn2", convolve(f"{block}.conv2", inner, stride, padding=1)).relu()
            inner = norm(f"{block}.bn3", convolve(f"{block}.conv3", inner))
            if number == 0:
                hidden = norm(f"{block}.downsample.1", convolve(f"{block}.downsample.0", hidden, stride))
            hidden = (hidden + inner).relu()
    return functional.avg_pool3d(hidden, (1, 4, 4), stride=1).flatten(1)


@pytest.mark.slow
def test_the_resnet_reads_the_names_of_its_authors_file_and_computes_what_they_define(tmp_path):
    """In that file all names begin with `module.`, there is a classifier, and counters of batches are absent."""
    torch.manual_seed(0)
    state = random_resnet_state()
    assert sum(value.numel() for name, value in state.items() if "running" not in name) == 47_018_576 - 2048 * 400 - 400
    stored = {f"module.{name}": value for name, value in state.items()}
    stored |= {"module.fc.weight": torch.zeros(400, 2048), "module.fc.bias": torch.zeros(400)}
    (tmp_path / "resnet3d").mkdir()
    path = tmp_path / "resnet3d" / "resnet-50-kinetics.pth"
    torch.save({"arch": "resnet-50", "epoch": 1, "state_dict": stored}, path)
    network = ResNet3D().load(tmp_path)
    clip = 60 * torch.randn(1, 3, 16, 112, 112)
    features = network(clip)
    assert features.shape == (1, 2048)
    assert features.std() > 0.1 * features.mean() > 0, "they say something"
    torch.testing.assert_close(features, restated_resnet(state, clip), rtol=1e-4, atol=1e-4 * float(features.mean()))
    line = describe_networks(NetworkMetrics({"fid_vid": network}), {}, {})["fid_vid"]
    assert f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]} (not pinned)" in line


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
