"""The task `encode`: what it stores, what it refuses, and how it continues; see also distributed/test_latents.py."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from support.autoencoder_recipes import recipe_with_autoencoder, save_autoencoder
from support.dancer_shards import NUM_FRAMES, write_dancer_shards
from support.latents import encode_recipe, with_latents

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.stored_clip import ReferenceFrame, Window
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.cache import open_index
from dreamdance.data.shards.latents import EMBEDDING
from dreamdance.errors import ShardError, UserError
from dreamdance.modalities import DOMAINS
from dreamdance.models.equal_rewrites import apply_equal_rewrites
from dreamdance.recipe.sections import Shards
from dreamdance.training.encoding.encode import encode
from dreamdance.training.encoding.fit import autoencoder_digest, require_fitting_latents
from dreamdance.training.encoding.verify_latents import EncodeError
from dreamdance.training.stages.training_stage import stage_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dancer_shards(folder, num_train=5, references=0)
    save_autoencoder(folder / "vae", temporal=False)
    return folder


@pytest.fixture(scope="module")
def training(data):
    changes = {"data.train": {"local": str(data / "train")}, "data.validation": {"local": str(data / "validation")}}
    return recipe_with_autoencoder(data / "vae", temporal=False, train="domains", changes=changes)


@pytest.fixture(scope="module")
def latents(data, training):
    recipe = encode_recipe(training, data / "latents", flip=True)
    encode(recipe, data / "run")
    return recipe


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def pixels_and_latents(training, folder: Path):
    """The training's dataset, and the folder of latents."""
    data = training.data
    clips = ClipDataset(data.train, width=data.width, height=data.height, num_frames=1, maps=["normal", "depth"])
    return clips, StoredClips(Shards(local=str(folder)))


@pytest.mark.parametrize("mirrored", [False, True])
def test_stored_moments_are_those_of_diffusers_own_autoencoder(data, training, latents, mirrored):
    """Compared at float64, for pictures as the dataset gives them: rounding alone may differ."""
    vae = AutoencoderKL.from_pretrained(data / "vae").double()
    clips, stored = pixels_and_latents(training, data / "latents")
    for sample_id, frame in ((0, 5), (4, 2)):
        pixels, found = cut(clips, sample_id, frame, mirrored), stored.latents(sample_id)
        for name in DOMAINS:
            with torch.no_grad():
                exact = vae.encode(pixels[name].double() * 2 - 1).latent_dist
            moments = found.moments(name, [frame], mirrored=mirrored)
            torch.testing.assert_close(moments[0, 0].double(), exact.mean[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(moments[0, 1].double(), exact.std[0], rtol=1e-3, atol=1e-4)


def cut(clips: ClipDataset, sample_id: int, frame: int, flip: bool) -> dict[str, torch.Tensor]:
    window = Window(frames=[frame], stride=1, reference=ReferenceFrame(0), flip=flip)
    return dict(clips.cut(clips.clip(sample_id), window, (0, 0, sample_id)).floats().maps)


def test_every_sample_has_latents_of_its_own_clip_in_the_same_order(data, training, latents):
    clips, stored = pixels_and_latents(training, data / "latents")
    assert len(stored) == len(clips) == 5
    for sample_id in range(5):
        found = stored.latents(sample_id)
        assert (found.clip_id, found.num_frames) == (clips.clip(sample_id).clip_id, NUM_FRAMES)
        assert found.embeddings(range(NUM_FRAMES), mirrored=True).isfinite().all()
    with pytest.raises(ShardError, match="no latents of nothing"):
        found.moments("nothing", [0], mirrored=False)


def test_references_have_means_alone(tmp_path, data, training):
    write_dancer_shards(tmp_path, num_train=2, references=2)
    changed = training.model_copy(
        update={"data": training.data.model_copy(update={"train": Shards(local=str(tmp_path / "train"))})}
    )
    encode(encode_recipe(changed, tmp_path / "latents"), tmp_path / "run")
    found = StoredClips(Shards(local=str(tmp_path / "latents"))).latents(1)
    shape = found.moments("rgb", [0], mirrored=False).shape
    assert found.means("rgb", [1], subject="references", mirrored=False).shape == (1, *shape[2:])
    with pytest.raises(ShardError, match=r"no latents of rgb\.deviation \(references\)"):
        found.moments("rgb", [1], subject="references", mirrored=False)


def test_bf16_rounds_each_value_by_at_most_half_a_unit(data, training, latents, tmp_path):
    encode(encode_recipe(training, tmp_path / "half", precision="bf16"), tmp_path / "run")
    exact, half = StoredClips(Shards(local=latents.output)), StoredClips(Shards(local=str(tmp_path / "half")))
    for name in (*DOMAINS, EMBEDDING):
        one, other = (
            clips.latents(2).embeddings([3], mirrored=False)
            if name == EMBEDDING
            else clips.latents(2).moments(name, [3], mirrored=False)
            for clips in (exact, half)
        )
        assert torch.equal(other, one.bfloat16().float())
        assert not torch.equal(other, one)
    assert sum(map(len, files(tmp_path / "half").values())) < 0.4 * sum(map(len, files(data / "latents").values()))


def test_a_complete_folder_is_not_written_again_and_a_removed_shard_comes_back_the_same(data, latents, tmp_path):
    before = files(data / "latents")
    stamps = {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.mds")}
    encode(latents, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.mds")} == stamps
    removed = min(stamps)
    removed.unlink()
    encode(latents, tmp_path / "again")
    assert files(data / "latents") == before


def test_other_networks_or_shards_are_refused_when_encoding_continues(data, training, latents, tmp_path):
    save_autoencoder(tmp_path / "vae", temporal=False)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    vae.save_pretrained(tmp_path / "vae")
    changed = latents.model_copy(
        update={"model": latents.model.model_copy(update={"autoencoder": changed_path(latents, tmp_path / "vae")})}
    )
    with pytest.raises(ShardError, match=r"autoencoder was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        encode(changed, tmp_path / "run")
    write_dancer_shards(tmp_path / "other", num_train=4, references=0)
    other = latents.model_copy(update={"shards": Shards(local=str(tmp_path / "other" / "train"))})
    with pytest.raises(ShardError, match=r"source was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        encode(other, tmp_path / "run")


def changed_path(recipe, path: Path):
    return recipe.model.autoencoder.model_copy(update={"path": str(path)})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data.width": 64}, "data.width is 64, the latents are of 32"),
        ({"data.height": 64}, "data.height is 64, the latents are of 48"),
        ({"model.image_encoder": {"stand_in_width": 48}}, "model.image_encoder is [0-9a-f]{64}, .* of [0-9a-f]{64}"),
        ({"model.autoencoder": "other"}, "model.autoencoder is [0-9a-f]{64}, .* of [0-9a-f]{64}.*recipes/encode.yaml"),
        ({"data.train": "other"}, "data.train.local is [0-9a-f]{64}, .* of [0-9a-f]{64}"),
    ],
)
def test_a_training_refuses_latents_of_other_pictures_or_networks(data, training, latents, tmp_path, changes, text):
    changes = dict(changes)
    if changes.get("model.autoencoder") == "other":
        save_autoencoder(tmp_path / "vae", temporal=False)
        vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
        vae.register_to_config(scaling_factor=0.25)
        vae.save_pretrained(tmp_path / "vae")
        changes["model.autoencoder"] = {"path": str(tmp_path / "vae")}
    if changes.get("data.train") == "other":
        write_dancer_shards(tmp_path, num_train=4, references=0)
        changes["data.train"] = {"local": str(tmp_path / "train")}
    if "model.image_encoder" in changes:
        changes["model.unet.config"] = {**training.model.unet.config, "cross_attention_dim": 48}
    recipe = with_latents(training, latents.output, changes)
    with pytest.raises(UserError, match=text):
        require_fitting_latents(recipe, stage_of(recipe).build())


def test_flips_without_mirrored_latents_are_refused(training, tmp_path):
    recipe = with_latents(training, str(tmp_path / "latents"), {"data.flip_probability": 0.5})
    encode(encode_recipe(recipe, tmp_path / "latents", flip=False), tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.flip_probability is 0\.5.*`flip: true`"):
        require_fitting_latents(recipe, stage_of(recipe).build())


def test_a_folder_of_pixels_is_not_taken_for_latents_and_latents_not_for_pixels(data, training, latents):
    recipe = with_latents(training, str(data / "train"), {})
    with pytest.raises(ShardError, match="lists no latents"):
        require_fitting_latents(recipe, stage_of(recipe).build())
    clips = ClipDataset(Shards(local=latents.output), width=32, height=48, num_frames=1)
    with pytest.raises(ShardError, match="no rgb frames"):
        clips.training_sample(SampleKey(epoch=0, sample_id=0))


def test_verification_finds_latents_of_other_pictures(data, training, tmp_path, monkeypatch):
    """The frames of the first clip are stored as if they were those of the third, with checksums that match."""
    recipe = encode_recipe(training, tmp_path / "latents", verify_samples=0)
    encode(recipe, tmp_path / "run")
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    other = encode_recipe(training, tmp_path / "other", verify_samples=0)
    vae = AutoencoderKL.from_pretrained(data / "vae")
    with torch.no_grad():
        vae.quant_conv.bias += 0.1
    vae.save_pretrained(tmp_path / "vae")
    other = other.model_copy(
        update={"model": other.model.model_copy(update={"autoencoder": changed_path(other, tmp_path / "vae")})}
    )
    encode(other, tmp_path / "run")
    for path in (tmp_path / "other").glob("*.mds"):
        os.replace(path, tmp_path / "latents" / path.name)
    assert index == json.loads((tmp_path / "latents" / "index.json").read_text())
    with pytest.raises(EncodeError, match=r"clip 'dancer_\d+', frame 0, rgb: .* differ by"):
        encode(recipe.model_copy(update={"verify_samples": 2}), tmp_path / "run")


def test_verification_prints_the_quality_of_decoded_latents(data, latents, tmp_path, caplog):
    caplog.set_level("INFO")
    encode(latents, tmp_path / "run")
    lines = [record.getMessage() for record in caplog.records if "dB against the pixels" in record.getMessage()]
    assert len(lines) == 2 * len(DOMAINS)
    assert all("stored values differ by 0.0e+00" in line for line in lines)


def test_the_index_names_shards_and_networks(latents):
    settings = open_index(Shards(local=latents.output)).details["settings"]
    assert {"source", "autoencoder", "image_encoder", "width", "height", "flip", "precision"} <= settings.keys()


def test_rewrites_that_compute_the_same_do_not_make_another_autoencoder(data):
    """Latents that an older commit encoded, before the rewrites, stay usable."""
    vae = AutoencoderKL.from_pretrained(data / "vae")
    before = autoencoder_digest(vae)
    apply_equal_rewrites(vae)
    assert type(vae.encoder.down_blocks[0].resnets[0]) is not ResnetBlock2D
    assert autoencoder_digest(vae) == before
    vae.encoder.conv_in.stride = (2, 2)
    assert autoencoder_digest(vae) != before
