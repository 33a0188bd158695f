"""How frames and clips are prepared by each protocol, and what becomes of networks' answers over all clips."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import require_weights

from dreamdance.errors import MissingInputError, RecipeError
from dreamdance.evaluation.clips import Prediction, ResultError, Truth
from dreamdance.evaluation.compared_frames import ComparedFrames, describe_first, describe_references
from dreamdance.evaluation.measured import EvaluatedClip, MeasuredClips
from dreamdance.evaluation.measures import Measures, describe_measures, measure_clip
from dreamdance.evaluation.network_metrics import Cost, NetworkMetrics, describe_costs, frechet_scores, open_networks
from dreamdance.evaluation.networks.i3d import I3D
from dreamdance.evaluation.networks.lpips import Lpips
from dreamdance.evaluation.networks.resnet3d import ResNet3D
from dreamdance.evaluation.protocols import clip_frames, disco_frames, network_input, resize_frames
from dreamdance.evaluation.split import read_split
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW, Table
from dreamdance.evaluation.times import find_runs
from dreamdance.media.grids import GridRow
from dreamdance.recipe.metric_section import MetricSettings
from dreamdance.recipe.parse import load_recipe

# A clip whose frames 1 and 2 were compared, and whose first frame was the reference.
FRAMES = ComparedFrames((1, 2), 0, 3)


def pictures(num_frames: int = 18, height: int = 40, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth moving pictures in [0, 1]."""
    coarse = np.random.default_rng(seed).uniform(size=(num_frames, 5, 4, 3)).astype(np.float32)
    return resize_frames(coarse, (height, width))


def test_disco_frames_are_those_of_opencvs_linear_resize():
    frames = pictures(3, 384, 512)
    as_opencv = [cv2.resize(np.rint(frame * 255).astype(np.uint8), (256, 256)) for frame in frames]
    found = disco_frames(frames)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.stack(as_opencv)).max() <= 1
    square = pictures(2, 256, 256)
    np.testing.assert_array_equal(disco_frames(square), np.rint(square * 255).astype(np.uint8))


def test_true_clips_lie_side_by_side_and_discos_begin_at_every_frame_but_the_last():
    run = list(range(3, 40))
    assert clip_frames([run], "true") == [list(range(3, 19)), list(range(19, 35))]
    assert [clip[0] for clip in clip_frames([run], "disco")] == list(range(3, 24))
    assert clip_frames([run], "disco") == clip_frames([run], "disco_gif")
    assert clip_frames([list(range(15)), list(range(16, 40))], "true") == [list(range(16, 32))]
    assert clip_frames([list(range(16))], "disco") == []


def test_frames_beside_the_reference_are_two_runs():
    assert find_runs([(0, 0), (1, 1), (3, 3), (4, 4)]) == [[0, 1], [2, 3]]
    assert find_runs([(1, 1), (2, 2), (3, 3)]) == [[0, 1, 2]]
    assert find_runs([(0, 0), (1, 2), (2, 4), (4, 8), (5, 10)]) == [[0, 1, 2], [3, 4]]
    assert find_runs([(7, 7)]) == [[0]]
    assert find_runs([]) == []


def test_inputs_of_video_networks_keep_channels_and_time_and_gifs_repeat_frames_eight_times():
    clip = np.zeros((16, 40, 32, 3), dtype=np.float32)
    clip[..., 0] = np.arange(16)[:, None, None] / 15
    true = network_input(clip, 24, "true")
    assert true.shape == (3, 16, 24, 24)
    np.testing.assert_allclose(true[0, :, 5, 7], np.arange(16) * 17, atol=1e-3)
    assert true[1:].abs().max() == 0
    small = np.rint(clip * 255).astype(np.uint8)
    disco, gif = network_input(small, 24, "disco"), network_input(small, 24, "disco_gif")
    np.testing.assert_allclose(disco[0, :, 5, 7], np.arange(16) * 17, atol=1e-3)
    assert gif.shape == (3, 128, 24, 24)
    assert torch.equal(gif[:, 8:16], gif[:, 8:9].expand(-1, 8, -1, -1))
    edge = np.zeros((16, 40, 32, 3), dtype=np.uint8)
    edge[:, :, 16:] = 255
    assert network_input(edge, 24, "disco").max() > 255, "bicubic overshoots, and is not rounded"


def random_networks(*names: str) -> NetworkMetrics:
    torch.manual_seed(0)
    makers = {"lpips_alex": lambda: Lpips("alex"), "lpips_vgg": lambda: Lpips("vgg"), "fvd": I3D, "fid_vid": ResNet3D}
    return NetworkMetrics({name: makers[name]().eval() for name in names}, {}, torch.device("cpu"))


@pytest.fixture(scope="module")
def measured():
    """A truth that is its own result, and an answer that stands still, by random video networks and two protocols."""
    truth = pictures()
    answers = {RESULT_ROW: Prediction(truth), "still": Prediction(np.repeat(1 - truth[:1], len(truth), axis=0))}
    settings = MetricSettings(networks=["fvd", "fid_vid"], protocols=["disco"])
    beats: list[str] = []
    measures = Measures(settings, random_networks("fvd", "fid_vid"), beats.append)
    runs = [list(range(len(truth)))]
    whole = Truth(Prediction(truth), None, None, None, None)
    found = measure_clip(answers, whole, truth_row=TRUTH_ROW, runs=runs, measures=measures)
    return found, measures, beats


def test_lpips_has_a_key_for_each_protocol_and_equal_frames_are_at_no_distance():
    truth = pictures(2, 64, 48)
    still = np.repeat(1 - truth[:1], 2, axis=0)
    answers, beats = {RESULT_ROW: truth, "other": 1 - truth, "still": still}, []
    networks = random_networks("lpips_alex", "lpips_vgg")
    scores, costs = networks.lpips(answers, truth, disco=False, beat=beats.append)
    in_bytes = {row: np.rint(frames * 255).astype(np.uint8) for row, frames in answers.items()}
    true_bytes = np.rint(truth * 255).astype(np.uint8)
    disco, _ = networks.lpips(in_bytes, true_bytes, disco=True, beat=beats.append)
    assert set(scores["other"]) == {"lpips_alex", "lpips_vgg"}
    assert set(disco["other"]) == {"lpips_disco"}
    assert set(scores[RESULT_ROW].values()) == set(disco[RESULT_ROW].values()) == {0.0}
    assert disco["other"]["lpips_disco"] != pytest.approx(scores["other"]["lpips_vgg"], rel=0.01)
    assert costs["lpips_alex"].frames == 2 + 2 + 2 + 1, "what stands still is described once"
    assert len(beats) == 3 * 2, "every frame is a sign of life"
    of_frames = [networks.lpips({"a": 1 - truth[i : i + 1]}, truth[i : i + 1], disco=False, beat=str) for i in (0, 1)]
    mean = np.mean([found["a"]["lpips_vgg"] for found, _ in of_frames])
    assert scores["other"]["lpips_vgg"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("name", "least"), [("lpips_alex", 31), ("lpips_vgg", 16)])
def test_frames_that_are_too_small_for_lpips_are_refused_with_the_keys_to_set(name, least):
    networks = random_networks(name)
    for height, width in ((least, least + 9), (least + 9, least)):
        truth = pictures(1, height, width)
        assert np.isfinite(networks.lpips({"a": 1 - truth}, truth, disco=False, beat=str)[0]["a"][name])
    for height, width in ((least - 1, least + 9), (least + 9, least - 1)):
        truth = pictures(1, height, width)
        with pytest.raises(ResultError, match=rf"{width}x{height} .* too small for {name}.* set metrics\.width"):
            networks.lpips({"a": truth}, truth, disco=False, beat=str)


def test_every_protocol_has_keys_of_its_own_and_a_clip_that_stands_still_is_described_once(measured):
    found, _, beats = measured
    disco = {"l1_disco", "psnr_disco", "psnr_disco_overflow", "ssim_disco"}
    of_frames = {"l1", "psnr", "ssim", "grain", "grain_distance", "flicker", "colour_drift"}
    assert set(found.scores[RESULT_ROW]) == disco | of_frames
    shapes = {key: values.shape for key, values in found.features["still"].items()}
    assert shapes == {"fvd": (1, 400), "fid_vid": (1, 2048), "fvd_disco": (2, 400), "fid_vid_disco": (2, 2048)}
    assert set(found.features) == {RESULT_ROW, "still", TRUTH_ROW}
    assert found.costs["fvd_disco"].frames == 16 * (2 + 2 + 1)
    assert all(cost.seconds > 0 for cost in found.costs.values())
    assert len(beats) == 2 * 3 * (1 + 2), "every pass is a sign of life"


@pytest.mark.slow
def test_gifs_have_keys_and_a_table_of_their_own_and_the_resnet_averages_their_eight_parts():
    """17 frames have one window of `disco_gif`: its frames 2 k and 2 k + 1, each 8 times, are part k."""
    truth = pictures(17)
    settings = MetricSettings(networks=["fvd", "fid_vid"], protocols=["disco_gif"])
    measures, seen, passes = Measures(settings, random_networks("fvd", "fid_vid")), [], []
    networks = measures.networks.networks
    networks["fvd"].register_forward_pre_hook(lambda _, clips: seen.append(clips[0].shape))
    networks["fid_vid"].register_forward_hook(
        lambda _, clips, found: passes.append((clips[0][0].numpy(), found[0].numpy()))
    )
    whole = Truth(Prediction(truth), None, None, None, None)
    found = measure_clip({}, whole, truth_row=TRUTH_ROW, runs=[list(range(17))], measures=measures)
    features = found.features[TRUTH_ROW]
    assert seen == [(1, 3, 16, 224, 224), (1, 3, 128, 224, 224)], "I3D sees all of it at once"
    shapes = {key: values.shape for key, values in features.items()}
    assert shapes == {"fvd": (1, 400), "fid_vid": (1, 2048), "fvd_disco_gif": (1, 400), "fid_vid_disco_gif": (1, 2048)}
    in_palette = [Image.fromarray(frame).quantize(256).convert("RGB") for frame in disco_frames(truth)[:16]]
    channels = [[np.float32(one) for one in picture.split()] for picture in in_palette]
    small = np.array([[Image.fromarray(one).resize((112, 112), Image.Resampling.BICUBIC) for one in all_of_it]
                      for all_of_it in channels])  # fmt: skip
    small -= np.float32([114.7748, 107.7354, 99.4750])[:, None, None]
    parts = [np.repeat(small[2 * k : 2 * k + 2], 8, axis=0).transpose(1, 0, 2, 3) for k in range(8)]
    clips, outputs = zip(*passes[1:], strict=True)
    np.testing.assert_allclose(clips, parts, atol=1e-3)
    np.testing.assert_allclose(features["fid_vid_disco_gif"][0], np.mean(outputs, axis=0), rtol=1e-5)
    assert np.std(outputs, axis=0).max() > 1e-3 * np.mean(outputs), "the parts differ"
    shifted = {key: values + 0.5 for key, values in features.items()}
    videos, windows = frechet_scores([{TRUTH_ROW: features, RESULT_ROW: shifted}] * 2, truth_row=TRUTH_ROW)
    text = Table(videos, windows=windows).as_markdown()
    (table,) = [part for part in text.split("## ") if part.startswith("DisCo's protocol through GIFs")]
    header, _, row = (line.split("|") for line in table.split("\n\n")[1].splitlines())
    assert [title.strip() for title in header[2:-1]] == ["FVD (DisCo, GIF) ↓", "FID-VID (DisCo, GIF) ↓"]
    assert [value.strip() for value in row[2:-1]] == ["100.0 (too few)", "512.00 (too few)"], "0.25 for each feature"
    lines = describe_measures(measures, found.costs, windows, [ComparedFrames(tuple(range(17)), None, 17)])
    assert "fvd_disco_gif: 2 clips of 16 frames" in lines["fvd"]
    assert "each frame 8 times" in lines["protocol disco_gif"]


def test_distances_over_all_clips_are_zero_for_the_truth_and_say_that_there_are_too_few(measured, tmp_path):
    found, measures, _ = measured
    videos, windows = frechet_scores([found.features, found.features, {}], truth_row=TRUTH_ROW)
    assert windows == {"fvd": 2, "fid_vid": 2, "fvd_disco": 4, "fid_vid_disco": 4}
    assert videos[RESULT_ROW]["fvd_disco"] == pytest.approx(0.0, abs=1e-6)
    assert videos["still"]["fvd_disco"] > 0
    table = Table({row: found.scores[row] | videos.get(row, {}) for row in found.scores}, windows=windows)
    text = table.as_markdown()
    assert text.count("(too few)") == 2 * 4
    assert table.as_json()["windows"] == windows
    lines = describe_measures(measures, found.costs, windows, [FRAMES])
    assert "2 clips of 16 frames, too few (below 400)" in lines["fvd"]
    assert "fid_vid: 2 clips of 16 frames, too few (below 2048)" in lines["fid_vid"]
    assert "(2048 for fid_vid, 2048 for fid_vid_disco, 400 for fvd, 400 for fvd_disco)" in lines["too few"]


@pytest.mark.parametrize(("number", "few"), [(399, {"fvd", "fid_vid"}), (400, {"fid_vid"}), (2048, set())])
def test_a_distance_needs_as_many_windows_as_its_network_has_features(measured, number, few):
    found, measures, _ = measured
    windows = dict.fromkeys(found.features[TRUTH_ROW], number)
    videos, _ = frechet_scores([found.features, found.features], truth_row=TRUTH_ROW)
    lines = describe_measures(measures, found.costs, windows, [FRAMES])
    assert {name for name in ("fvd", "fid_vid") if "too few" in lines[name]} == few
    assert ("too few" in lines) == bool(few)
    text = Table(videos, windows=windows).as_markdown()
    assert text.count("(too few)") == 2 * len(few) * len({row for row in videos if row != TRUTH_ROW})


def test_features_and_costs_are_kept_with_the_measurement(measured, tmp_path):
    found, _, _ = measured
    recipe = load_recipe(write_recipe(tmp_path))
    folders = [MeasuredClips(tmp_path / "measured", recipe, networks=hashes) for hashes in ((), ("1",))]
    clip = EvaluatedClip(found.scores, GridRow("clip", []), FRAMES, {}, found.features, found.costs)
    folders[0].write(tmp_path / "clip", clip)
    kept = folders[0].read(tmp_path / "clip")
    assert (kept.costs, kept.compared) == (found.costs, FRAMES)
    for row, features in found.features.items():
        for key, values in features.items():
            np.testing.assert_array_equal(kept.features[row][key], values)
    assert not folders[1].holds(tmp_path / "clip"), "other weights are another measurement"


def test_absent_networks_are_left_out_by_name_with_the_file_to_get(tmp_path):
    settings = MetricSettings(networks=["lpips_vgg", "fid_vid"], weights=str(tmp_path))
    networks = open_networks(settings)
    assert networks.networks == {}
    lines = describe_measures(Measures(settings, networks), {}, {}, [FRAMES])
    assert lines["lpips_vgg"].startswith("not measured: ")
    assert "bash tools/networks.sh" in lines["lpips_vgg"]
    assert "resnet3d/resnet-50-kinetics.pth" in lines["fid_vid"]
    assert "lpips_alex, fvd: metrics.networks does not name them" in lines["not measured"]
    assert networks.watched == [tmp_path]


def test_fetched_networks_are_named_with_file_and_hash():
    settings = MetricSettings(networks=["lpips_alex"], weights=str(require_weights("lpips/alexnet.ckpt")))
    networks = open_networks(settings)
    line = describe_measures(Measures(settings, networks), {"lpips_alex": Cost(2.0, 64)}, {}, [FRAMES])["lpips_alex"]
    assert line == "lpips/alexnet.ckpt, SHA-256 443c5bc35326b81e; lpips_alex"
    assert describe_costs({"lpips_alex": Cost(2.0, 64)}) == "lpips_alex 0.5 s"


def test_the_table_names_the_reference_and_the_frame_against_which_colours_drift():
    first, last, longer = FRAMES, ComparedFrames((0, 1), 2, 3), ComparedFrames((0, 1, 2, 3, 4), 5, 6)
    apart, middle = ComparedFrames((0, 1, 2), None, 3), ComparedFrames((0, 2), 1, 3)
    references = {
        (first, first): "frame 0 of each clip, its first",
        (last, last): "frame 2 of each clip, its last",
        (last, longer): "the last frame of each clip",
        (middle, longer): "each result's own, frames 1 to 5 of the clips",
        (apart, apart): "a picture that is stored with each clip and is none of its frames",
        (middle,): "frame 1 of each clip",
    }
    assert {clips: describe_references(clips) for clips in references} == references
    mixed = describe_references([middle, last, apart])
    assert mixed.endswith("frames 1 to 2 of the clips; in 1 of 3 clips a picture that is none of its frames")
    assert describe_references([apart, middle]) == (
        "each result's own, frame 1 of the clips; in 1 of 2 clips a picture that is none of its frames"
    )
    assert describe_first([first, first]) == "frame 1 of each clip, since frame 0 is the reference"
    assert describe_first([last, apart]) == "frame 0 of each clip"
    assert describe_first([ComparedFrames((2, 3, 4), 5, 6)]) == "frame 2 of each clip, the first that was compared"
    assert describe_first([first, last]) == "the first compared frame of each clip"
    measures = Measures(MetricSettings(protocols=["disco"]))
    lines = {clip: describe_measures(measures, {}, {}, [first, clip]) for clip in (first, last)}
    assert "against that of frame 1 of each clip" in lines[first]["over time"]
    assert "papers" not in lines[first]["protocol disco"]
    assert lines[last]["protocol disco"].endswith(
        "; the papers take the first frame as the reference, these results do not"
    )


def test_frames_and_masks_are_compared_at_the_size_of_the_recipe():
    truth, mask = pictures(2, 20, 16), np.zeros((2, 20, 16), dtype=bool)
    mask[:, :10] = True
    frames = truth.copy()
    frames[:, :10] += 0.25
    whole = Truth(Prediction(truth), mask, None, None, None)
    measures = Measures(MetricSettings(width=8, height=10))
    found = measure_clip({"a": Prediction(frames)}, whole, truth_row=TRUTH_ROW, runs=[[0, 1]], measures=measures)
    assert found.scores["a"]["l1_body"] == pytest.approx(0.25, abs=0.03)
    assert found.scores["a"]["l1"] == pytest.approx(0.125, abs=1e-3)


def test_the_size_of_the_recipe_does_not_change_what_discos_protocol_sees():
    truth = pictures(2, 40, 32)
    whole = Truth(Prediction(truth), None, None, None, None)
    answers = {"a": Prediction(np.roll(truth, 3, axis=2)), "maps alone": Prediction()}
    found = []
    for size in ({}, {"width": 8, "height": 10}):
        measures = Measures(MetricSettings(protocols=["disco"], **size))
        scores = measure_clip(answers, whole, truth_row=TRUTH_ROW, runs=[[0, 1]], measures=measures).scores["a"]
        found.append(scores)
    for key, value in found[0].items():
        assert (found[1][key] == value) == key.endswith(("_disco", "_overflow")), key


def write_recipe(folder, *lines: str):
    path = folder / "evaluate.yaml"
    path.write_text("\n".join(["task: evaluate", "name: some", "results: r", "truth: {local: t}", *lines]) + "\n")
    return path


def test_width_goes_with_height(tmp_path):
    with pytest.raises(RecipeError, match=r"metrics\.width and metrics\.height go together"):
        load_recipe(write_recipe(tmp_path, "metrics: {width: 256}"))


def test_a_split_file_has_one_id_in_each_line(tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("# ten videos\nfirst\n\n second \n")
    assert read_split(path) == {"first", "second"}
    path.write_text("# none\n")
    with pytest.raises(MissingInputError, match=r"names no clip.*key: split"):
        read_split(path)
    with pytest.raises(MissingInputError, match="cannot be read"):
        read_split(tmp_path / "absent.txt")
