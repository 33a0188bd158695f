"""Hostile files that would run code: recipes, manifests, folders of base models. For shards see test_hostile_shards."""

import json
import os
import pickle
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from support.fault_log import record_fault
from support.recipes import tiny_unet_config
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.errors import ManifestError, RecipeError
from dreamdance.inference.manifest import read_entries
from dreamdance.recipe import load_recipe
from dreamdance.recipe.schema import ImageEncoderSource, NetworkSource
from dreamdance.training.networks.sources import open_image_encoder, open_unet


class Runs:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("protocol", [0, 5])
@pytest.mark.parametrize(("read", "error"), [(load_recipe, RecipeError), (read_entries, ManifestError)])
def test_a_recipe_or_manifest_that_is_a_pickle_is_refused_and_never_unpickled(tmp_path, read, error, protocol):
    trace, path = tmp_path / "ran", tmp_path / "hostile"
    path.write_bytes(pickle.dumps(Runs(trace), protocol=protocol))  # 0 is plain text
    pickle.loads(path.read_bytes())
    assert trace.is_dir(), "it does run when it is unpickled"
    trace.rmdir()
    with pytest.raises(error, match="hostile"):
        read(path)
    assert not trace.exists()
    record_fault(
        f"pickle in place of a {'recipe' if read is load_recipe else 'manifest'}",
        how=f"an object that makes a folder when it is unpickled, protocol {protocol}",
        promised="refused with a clear error, the code does not run",
        happened=error.__name__,
    )


@pytest.mark.parametrize("network", ["unet", "image_encoder"])
def test_code_in_a_base_models_folder_is_never_run(tmp_path, network):
    """The configuration names a module beside it, as for `trust_remote_code`, which makes a folder when imported."""
    folder, trace = tmp_path / network, tmp_path / "ran"
    if network == "unet":
        UNet2DConditionModel(**tiny_unet_config()).save_pretrained(folder)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=24)).save_pretrained(folder)
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Hostile: pass\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "hostile.Hostile", "AutoModel": "hostile.Hostile"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    if network == "unet":
        loaded = open_unet(NetworkSource(path=str(folder)), UNet2DConditionModel, published={}, device="cpu")
    else:
        loaded = open_image_encoder(ImageEncoderSource(path=str(folder)), huge=False, device="cpu")
    assert not trace.exists()
    assert type(loaded).__module__.startswith(("diffusers.", "transformers."))
