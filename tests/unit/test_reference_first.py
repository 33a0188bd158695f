"""The reference as the first frame of every window: in shards, latents, training, sampling and `animate`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.dancer_shards import write_dancer_shards
from support.latents import encode_recipe, with_latents
from support.recipes import HEIGHT, WIDTH, record_inputs, tiny_stage2_recipe
from support.tiny_pipelines import random_pictures, tiny_animation_pipeline, tiny_geometry_pipeline

from dreamdance.data.loading.batch import collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.stored_clip import ReferenceFrame, Window
from dreamdance.data.shards.index import DETAILS_KEY
from dreamdance.errors import ShardError, UserError
from dreamdance.inference.driving_videos import KeypointFinder
from dreamdance.inference.entry_inputs import Size, load_inputs
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.media.keypoints import NUM_KEYPOINTS, KeypointSequence, write_keypoint_file
from dreamdance.media.pose_drawing import draw_pose
from dreamdance.media.transforms import flip_map, pictures_to_tensor
from dreamdance.pipelines import AnimationPipeline, DreamDancePipeline
from dreamdance.pipelines.windows import blend_windows, plan_windows, repeat_noise
from dreamdance.recipe.annotator_section import DrivingAnnotators
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.encoding.encode import encode
from dreamdance.training.encoding.fit import require_fitting_latents
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import make_loader

ON = {"objective.reference_first": True}
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}


def mimicmotion_windows(num_frames: int, tile_size: int, tile_overlap: int) -> list[list[int]]:
    """As mimicmotion/pipelines/pipeline_mimicmotion.py plans them; `num_frames` includes the reference."""
    windows = [
        [0, *range(i + 1, min(i + tile_size, num_frames))]
        for i in range(0, num_frames - tile_size + 1, tile_size - tile_overlap)
    ]
    if windows[-1][-1] < num_frames - 1:
        windows.append([0, *range(num_frames - tile_size + 1, num_frames)])
    return windows


@pytest.mark.parametrize(
    ("num_frames", "size", "shared"), [(73, 16, 4), (28, 16, 5), (17, 16, 4), (15, 16, 4), (9, 4, 1)]
)
def test_windows_are_those_of_mimicmotion_and_weights_sum_to_one(num_frames, size, shared):
    """MimicMotion counts the reference among the shared frames."""
    plan = plan_windows(num_frames, size, shared, reference_first=True)
    expected = (
        mimicmotion_windows(num_frames + 1, size, shared + 1) if num_frames >= size else [[*range(num_frames + 1)]]
    )
    assert [window.frames for window in plan] == expected
    assert plan[0].num_frames == min(size, num_frames + 1)
    total = torch.zeros(num_frames + 1)
    for window in plan:
        total[window.frames] += window.weights
    torch.testing.assert_close(total, torch.ones(num_frames + 1), rtol=0, atol=3e-7)
    assert len({window.weights[0].item() for window in plan}) == 1
    blended = blend_windows(lambda window: torch.arange(num_frames + 1.0)[None, window.frames], plan)
    torch.testing.assert_close(blended[0], torch.arange(num_frames + 1.0), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"window_overlap must be less than window_frames 4 - 1, not 3"):
        plan_windows(9, 4, 3, reference_first=True)


def test_repeated_noise_is_mimicmotions_and_each_window_has_every_noise_once():
    noise = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    repeated = repeat_noise(noise, 40, reference_first=False)
    assert torch.equal(repeated, noise.repeat(1, 40 // 16 + 1, 1)[:, :40])
    anchored = repeat_noise(noise, 41, reference_first=True)
    assert torch.equal(anchored[:, 0], noise[:, 0])
    for plan, values in (
        (plan_windows(40, 16, 4), repeated),
        (plan_windows(40, 16, 4, reference_first=True), anchored),
    ):
        for window in plan:
            assert {*values[0, window.frames, 0].tolist()} == {*noise[0, :, 0].tolist()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clips of six frames; in `stored` with references of their own, in `plain` without."""
    folder = tmp_path_factory.mktemp("data")
    write_dancer_shards(folder / "stored", num_train=2, num_validation=1, references=3)
    write_dancer_shards(folder / "plain", num_train=2, num_validation=1, references=0)
    return folder


def training(folder: Path, changes: dict | None = None):
    shards = {f"data.{name}": {"local": str(folder / name)} for name in ("train", "validation")}
    return tiny_stage2_recipe({**shards, **ON, "data.flip_probability": 0.5, "data.num_workers": 0, **(changes or {})})


@pytest.mark.parametrize("kind", ["stored", "plain"])
@pytest.mark.parametrize("flip", [False, True])
def test_frame_0_of_every_map_is_the_references_own(data, kind, flip):
    dataset = ClipDataset(
        Shards(local=str(data / kind / "train")), width=WIDTH, height=HEIGHT, num_frames=4, maps=["normal", "depth"]
    )
    clip = dataset.clip(1)
    reference = ReferenceFrame(2, "references" if kind == "stored" else "clip")
    window = Window(frames=[0, 1, 4], stride=1, reference=reference, flip=flip, reference_first=True)
    sample = dataset.cut(clip, window, (0, 0, 1)).floats()
    without = dataset.cut(clip, replace(window, reference_first=False), (0, 0, 1)).floats()
    for name, frames in sample.maps.items():
        assert torch.equal(frames[1:], without.maps[name])
        stored = clip.pictures(name, [reference.number], subject=reference.subject)
        own = pictures_to_tensor(stored)[0].expand(3, -1, -1)
        if name != "pose":
            kinds = {"rgb": "colours", "normal": "normals", "depth": "values"}
            own = flip_map(own, kind=kinds[name]) if flip else own
            torch.testing.assert_close(frames[0], own, rtol=0, atol=1e-6)
        elif not flip:
            torch.testing.assert_close(frames[0], own, rtol=0, atol=1e-6)
        else:  # drawn again: mirrored ink up to rounded pixels, other colours
            drawn, mirrored = frames[0].amax(0) > 0.3, (own.amax(0) > 0.3).flip(-1)
            assert (drawn & mirrored).sum() > 0.8 * (drawn | mirrored).sum()
    assert torch.equal(sample.maps["rgb"][0], sample.reference)


def test_the_loader_delivers_the_reference_and_one_frame_less(data):
    stage = stage_of(training(data / "stored"))
    batch = next(iter(make_loader(stage, Ranks())))[0].to("cpu")
    assert batch.rgb.shape[:2] == (2, stage.recipe.data.num_frames)
    assert torch.equal(batch.rgb[:, 0], batch.reference)


def test_samples_of_held_out_clips_begin_with_the_reference_and_are_compared_without_it(data):
    """As `Validator` reads, samples and measures them; the videos have three frames in windows of 1 + 2."""
    windows = {"sampling.window_frames": 3, "sampling.window_overlap": 1, "sampling.num_inference_steps": 1}
    stage = stage_of(training(data / "stored", windows))
    shards = stage.recipe.data.validation
    clips = fixed_clips(shards, width=WIDTH, height=HEIGHT, num_frames=4, count=1, reference_first=True)
    batch, objective = collate_clips(clips), stage.build()
    maps, features = record_inputs(objective.controller), record_inputs(objective.controlnet)
    predictions = stage.predict(objective, batch)
    assert predictions["rgb"].shape == (1, 3, 3, HEIGHT, WIDTH)
    (given, *_), _ = maps[0]
    torch.testing.assert_close(given["pose"], batch.pose[0])
    assert torch.equal(batch.rgb[:, 0], batch.reference)
    assert {len(arguments[4]) for arguments, _ in features} == {2 * 3}, "guidance doubles 1 + 2 frames"
    assert stage.show(batch, {"rgb": batch.rgb[:, 1:]}).scores == pytest.approx({"l1_rgb": 0.0, "psnr_rgb": 100.0})
    assert stage.show(batch, predictions).scores["psnr_rgb"] < 40


def test_references_without_maps_are_refused_by_name(data):
    clip = ClipDataset(Shards(local=str(data / "stored" / "train")), width=WIDTH, height=HEIGHT, num_frames=4).clip(0)
    with pytest.raises(ShardError, match=r"no surface frames of references.*objective.reference_first: false"):
        clip.frames("surface", [0], subject="references")


@pytest.mark.parametrize("kind", ["stored", "plain"])
def test_latents_give_the_loss_of_pixels(data, tmp_path, kind):
    recipe = training(data / kind)
    encode(encode_recipe(recipe, tmp_path / "latents", flip=True), tmp_path / "run")
    read = with_latents(recipe, str(tmp_path / "latents"), {})
    objective = stage_of(recipe).build()
    require_fitting_latents(read, objective)
    losses = []
    for each in (recipe, read):
        dataset = make_loader(stage_of(each), Ranks()).dataset
        batch = collate_clips([dataset.stored_sample(SampleKey(0, number)) for number in range(2)])
        losses.append(objective(batch).loss)
    assert torch.equal(*losses)


def test_latents_of_references_without_deviations_are_refused(data, tmp_path):
    recipe = training(data / "stored")
    encode(encode_recipe(recipe, tmp_path / "latents", flip=True), tmp_path / "run")
    index = tmp_path / "latents" / "index.json"
    content = json.loads(index.read_text())
    assert content[DETAILS_KEY]["settings"].pop("reference_moments") is True
    index.write_text(json.dumps(content))
    read = with_latents(recipe, str(tmp_path / "latents"), {})
    with pytest.raises(UserError, match=r"objective.reference_first is true, the latents of references.*stage: stage2"):
        require_fitting_latents(read, stage_of(recipe).build())


def anchored(pipeline: AnimationPipeline) -> AnimationPipeline:
    """The pipeline as after a training with `reference_first`."""
    pipeline.controlnet.register_to_config(reference_first=True)
    return pipeline


def test_a_pipeline_names_the_frames_with_which_its_windows_begin():
    """In frames of the result, which does not contain the reference."""
    pipeline = tiny_animation_pipeline()
    assert pipeline.window_starts(20, 8, 2) == [0, 6, 12]
    assert anchored(pipeline).window_starts(20, 8, 2) == [0, 5, 10, 13]
    assert pipeline.window_starts(5, 8, 2) == [0]


def still_and_clip(num_frames: int) -> tuple[dict, dict]:
    names = ("pose", "depth", "normal")
    return (
        {name: random_pictures(3, HEIGHT, WIDTH, seed=10 + m) for m, name in enumerate(names)},
        {name: random_pictures(num_frames, 3, HEIGHT, WIDTH, seed=20 + m) for m, name in enumerate(names)},
    )


def test_one_window_is_the_clip_with_the_reference_before_it_whose_output_is_dropped():
    image, (still, clip) = random_pictures(3, HEIGHT, WIDTH), still_and_clip(3)
    noise = torch.randn(1, 4, 12, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(2))
    settings = {
        **ONE_STEP,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "fps": 7.0,
        "window_frames": 4,
        "window_overlap": 1,
    }
    joined = {name: torch.cat([still[name][None], frames]) for name, frames in clip.items()}

    def run(pipeline: AnimationPipeline, **maps):
        generator = torch.Generator().manual_seed(3)
        return pipeline(image, latents=noise, generator=generator, **maps, **settings).frames

    whole = run(tiny_animation_pipeline(), maps=joined)
    found = run(anchored(tiny_animation_pipeline()), maps=clip, reference_maps=still)
    assert torch.equal(found, whole[:, 1:])


def test_every_window_shows_the_networks_the_reference_first():
    pipeline, image, (still, clip) = (
        anchored(tiny_animation_pipeline()),
        random_pictures(3, HEIGHT, WIDTH),
        still_and_clip(6),
    )
    calls = record_inputs(pipeline.controlnet)
    found = pipeline(image, maps=clip, reference_maps=still, window_frames=4, window_overlap=1, **ONE_STEP).frames
    assert found.shape[1] == 6
    features = [arguments[4].unflatten(0, (1, 4)) for arguments, _ in calls]
    assert len(features) == 3  # frames 1 to 3, 3 to 5, 4 to 6 of six
    assert all(torch.equal(each[:, 0], features[0][:, 0]) for each in features)
    assert torch.equal(features[0][:, 3], features[1][:, 1])
    assert not torch.equal(features[0][:, 1], features[0][:, 0])


def test_missing_and_superfluous_maps_of_the_reference_are_refused_by_name():
    image, (still, clip) = random_pictures(3, HEIGHT, WIDTH), still_and_clip(2)
    pipeline = anchored(tiny_animation_pipeline())
    with pytest.raises(ValueError, match=r"objective.reference_first.*its own pose and depth and normal"):
        pipeline(image, maps=clip, **ONE_STEP)
    still.pop("depth")
    with pytest.raises(ValueError, match=r"its own depth$"):
        pipeline(image, maps=clip, reference_maps=still, **ONE_STEP)
    with pytest.raises(ValueError, match="trained without reference_first"):
        tiny_animation_pipeline()(image, maps=clip, reference_maps=still, **ONE_STEP)
    both = DreamDancePipeline.from_stages(tiny_geometry_pipeline(), pipeline)
    with pytest.raises(ValueError, match="reference_pose is missing"):
        both(image, clip["pose"], geometry_height=HEIGHT, geometry_width=WIDTH)


def test_stage_1_makes_the_references_own_maps_from_its_pose():
    image, (still, clip) = random_pictures(3, HEIGHT, WIDTH), still_and_clip(2)
    geometry, animation = tiny_geometry_pipeline(), anchored(tiny_animation_pipeline())
    both = DreamDancePipeline.from_stages(geometry, animation)
    both.set_progress_bar_config(disable=True)
    poses, maps = record_inputs(both.geometry_pose_encoder), record_inputs(both.controller)
    sizes = {"geometry_height": HEIGHT, "geometry_width": WIDTH}
    result = both(image, clip["pose"], reference_pose=still["pose"], num_inference_steps=1, output_type="pt", **sizes)
    assert result.frames.shape[1] == result.normals.shape[1] == 2
    drawn = torch.cat([arguments[0] for arguments, _ in poses])
    torch.testing.assert_close(drawn, torch.cat([clip["pose"], still["pose"][None]]))
    (given, *_), _ = maps[0]
    torch.testing.assert_close(given["pose"], torch.cat([still["pose"][None], clip["pose"]]))
    assert given["depth"].shape[0] == 3


@pytest.fixture
def entry(tmp_path) -> ManifestEntry:
    """A picture of 40x60 pixels and key points of three frames, of a stage 2 that needs the reference's pose."""
    points = np.random.default_rng(0).uniform(0.2, 0.8, (3, NUM_KEYPOINTS, 3)).astype(np.float32).round(6)
    points[..., 2] = 1.0
    Image.new("RGB", (40, 60)).save(tmp_path / "image.png")
    write_keypoint_file(tmp_path / "driving.json", KeypointSequence(points, 40, 60, 8.0))
    return ManifestEntry(
        id="a", image=tmp_path / "image.png", keypoints=tmp_path / "driving.json", needs_reference_pose=True
    )


def test_the_references_pose_comes_from_key_points_a_drawing_or_a_frame(entry, tmp_path):
    points = np.random.default_rng(1).uniform(0.2, 0.8, (1, NUM_KEYPOINTS, 3)).astype(np.float32).round(6)
    points[..., 2] = 1.0
    write_keypoint_file(tmp_path / "own.json", KeypointSequence(points, 40, 60, 1.0))
    Image.fromarray(draw_pose(points[0], width=40, height=60)).save(tmp_path / "own.png")
    size = Size(20, 30)

    def loaded(**changes) -> torch.Tensor:
        inputs = load_inputs(replace(entry, **changes), aspect=size, pose_sizes={size})
        assert torch.equal(inputs.poses[size], plain)
        return inputs.reference_poses[size]

    plain = load_inputs(replace(entry, needs_reference_pose=False), aspect=size, pose_sizes={size}).poses[size]
    by_points = loaded(reference_keypoints=tmp_path / "own.json")
    assert by_points.shape == (3, 30, 20)
    assert torch.equal(by_points, loaded(reference_pose=tmp_path / "own.png"))
    assert torch.equal(loaded(reference_frame=1), plain[1])
    with pytest.raises(UserError, match="reference_frame 3 is not one of the 3 frames"):
        loaded(reference_frame=3)
    Image.new("RGB", (60, 60)).save(tmp_path / "own.png")
    with pytest.raises(UserError, match=r"own.png has 60x60 pixels and .*image.png has 40x60"):
        loaded(reference_pose=tmp_path / "own.png")
    assert "reference_keypoints" in replace(entry, reference_keypoints=tmp_path / "own.json").files
    assert load_inputs(replace(entry, needs_reference_pose=False), aspect=size, pose_sizes={size}).reference_poses == {}


def test_without_any_pose_of_the_reference_animate_refuses_the_entry_by_name(entry, tmp_path):
    finder = KeypointFinder(DrivingAnnotators(weights=str(tmp_path / "none")), tmp_path)
    with pytest.raises(UserError, match=r"objective.reference_first.*'reference_keypoints'.*'reference_frame'.*none"):
        load_inputs(entry, aspect=Size(20, 30), pose_sizes=set(), finder=finder)
