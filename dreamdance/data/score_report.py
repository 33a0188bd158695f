"""What `--dry-run` shows about the clips of a set: histograms of their scores, and what filters would drop."""

from pathlib import Path

from dreamdance.data.curation.filters import choose_clips, filter_limits
from dreamdance.data.curation.histograms import draw_histograms
from dreamdance.data.curation.scores import Scores
from dreamdance.data.loading.clip_choice import facts_of_clips, scores_of
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.errors import ShardError
from dreamdance.recipe.filter_section import ScoreFilters
from dreamdance.recipe.schema import PrepareRecipe, Recipe, TrainingRecipe
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.ranks import Ranks


def describe_scores(recipe: Recipe) -> str:
    """The scores of the training clips that a recipe reads or has written; empty if they are not on this disk."""
    if isinstance(recipe, TrainingRecipe):
        shards, filters = recipe.data.train, recipe.data.filters
    elif isinstance(recipe, PrepareRecipe):
        shards, filters = Shards(local=str(Path(recipe.output) / "train")), ScoreFilters()
    else:
        return ""
    if not (Path(shards.local) / INDEX_FILE).is_file():
        return ""
    try:
        clips = StoredClips(shards, ranks=Ranks())
        return _describe(scores_of(facts_of_clips(clips), where=shards.local), filters, shards.local)
    except ShardError as error:
        return f"scores of the clips: {error}"


def _describe(scores: list[Scores], filters: ScoreFilters, folder: str) -> str:
    limits = filter_limits(filters)
    if all(one == Scores() for one in scores):
        dropped = "; data.filters would drop all of them" if limits else ""
        return f"scores of the clips: none are stored with the {len(scores)} clips of {folder}{dropped}"
    lines = [f"scores of the {len(scores)} clips of {folder}", draw_histograms(scores, limits)]
    if limits:
        lines.append(f"data.filters: {choose_clips(scores, filters).report()}")
    return "\n\n".join(lines)
