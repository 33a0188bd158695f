"""Rules about relations between the values of a recipe of `encode`; see `rules`."""

from collections.abc import Iterator

from dreamdance.recipe.encode_recipe import EncodeRecipe
from dreamdance.recipe.yaml_text import Problem

# Pixels for each latent of the published autoencoders.
AUTOENCODER_DOWNSCALE = 8


def encode_problems(recipe: EncodeRecipe) -> Iterator[Problem]:
    """The problems of a recipe that stores latents, or maps of a trained stage 1."""
    given = [name for name in ("stage", "model") if getattr(recipe, name) is not None]
    if recipe.geometry_from is not None:
        others = {"domains": recipe.domains is not None, "flip": recipe.flip}
        for name in (*given, *(name for name, is_given in others.items() if is_given)):
            yield Problem.at(
                name, f"{name} describes latents, but with geometry_from maps are stored; leave one of them out"
            )
    elif len(given) < 2:
        missing = " and ".join(name for name in ("stage", "model") if name not in given)
        yield Problem.at(
            "task", f"{missing} missing, for latents; or geometry_from, for maps that a trained stage 1 makes"
        )
    patch_size = None if recipe.model is None else recipe.model.autoencoder.patch_size
    factor = patch_size or (1 if recipe.model is None else AUTOENCODER_DOWNSCALE)
    for name, size in (("width", recipe.width), ("height", recipe.height)):
        if size % factor:
            yield Problem.at(name, f"{name} {size} must be a multiple of {factor}, the autoencoder's factor")
    if recipe.geometry_from is not None:
        return
    if len(set(recipe.encoded_domains)) != len(recipe.encoded_domains) or "rgb" not in recipe.encoded_domains:
        yield Problem.at(
            "domains", f"domains {recipe.domains} must name each map once, and rgb, which every stage reads"
        )
