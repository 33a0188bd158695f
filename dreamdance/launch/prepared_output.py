"""What users see of a complete output of `prepare`: how many clips it has, where their page is, and what comes next."""

import json
import shlex
from pathlib import Path

from dreamdance.errors import UserError
from dreamdance.launch.program import launcher_command
from dreamdance.recipe import PrepareRecipe, TrainingRecipe, load_recipe
from dreamdance.runs.finished_clips import INDEX_FILE, SPLITS
from dreamdance.runs.layout import PAGE_PATH

# The first training; it is looked for beside the recipe, and in the folder above.
NEXT_RECIPE = "stage1_domains.yaml"


def describe_clips(recipe: PrepareRecipe) -> dict[str, str]:
    """The number of clips, and the path of the page if there is one; empty unless the output is complete."""
    output = Path(recipe.output)
    counts = {split: count for split in SPLITS if (count := _num_clips(output / split / INDEX_FILE)) is not None}
    if "train" not in counts:
        return {}
    lines = {"clips": f"{counts['train']} for training, {counts.get('validation', 0)} for validation"}
    page = output / PAGE_PATH
    return {**lines, "page": str(page)} if page.is_file() else lines


def describe_output(recipe: PrepareRecipe, recipe_file: Path, runs: Path) -> str:
    """The same in lines, and the command that trains with the clips."""
    lines = [f"  {name + ':':<6} {text}" for name, text in describe_clips(recipe).items()]
    if lines and (command := next_command(recipe, recipe_file, runs)) is not None:
        lines.append(f"  next:  {command}")
    return "\n".join(lines)


def next_command(recipe: PrepareRecipe, recipe_file: Path, runs: Path) -> str | None:
    """The command of the first training; None if there is no such recipe, or the clips have no depth and normals."""
    if recipe.videos is not None and recipe.videos.annotators is None:
        names = [path.name.lower() for path in Path(recipe.videos.folder).glob("*.*")]
        if not all(any(f".{modality}." in name for name in names) for modality in ("normal", "depth")):
            return None
    places = (recipe_file.parent / NEXT_RECIPE, recipe_file.parent.parent / NEXT_RECIPE)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        return None
    try:
        training = load_recipe(found)
    except UserError:
        return None
    words = [shlex.quote(str(found))]
    if isinstance(training, TrainingRecipe):
        for split, shards in zip(SPLITS, (training.data.train, training.data.validation), strict=True):
            if Path(shards.local) != Path(recipe.output) / split:
                words.append(shlex.quote(f"data.{split}.local={Path(recipe.output) / split}"))
    return launcher_command(" ".join(words), runs)


def _num_clips(index: Path) -> int | None:
    try:
        return int(json.loads(index.read_text(encoding="utf-8"))["dreamdance"]["num_samples"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
