"""Which clips of a set training uses: those that pass `data.filters`, and only one kind of background."""

from collections.abc import Sequence
from typing import Literal

from dreamdance.data.curation.filters import ClipChoice, choose_clips, filter_limits
from dreamdance.data.curation.scores import Scores
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.clip_facts import Facts, facts_of, listed_facts
from dreamdance.errors import ShardError
from dreamdance.recipe.filter_section import ScoreFilters

MixedBackgrounds = Literal["refuse", "accept"]


def facts_of_clips(clips: StoredClips) -> list[Facts]:
    """The facts of all clips: from the index if it lists them, else from the head of each clip.

    Raises:
        ShardError: a shard or the list is damaged.
    """
    facts = listed_facts(clips.index)
    return [facts_of(clips.metadata(number)) for number in range(len(clips))] if facts is None else facts


def choose_training_clips(clips: StoredClips, filters: ScoreFilters, mixed_backgrounds: MixedBackgrounds) -> ClipChoice:
    """Applies a recipe's filters to a set.

    Args:
        clips: the training set.
        filters: the recipe's `data.filters`.
        mixed_backgrounds: the recipe's `data.mixed_backgrounds`; only clips that pass the filters count.

    Raises:
        ShardError: no clip passes, or the clips that pass have two kinds of background; or a shard is damaged.
    """
    facts, folder = facts_of_clips(clips), clips.index.folder
    limits = filter_limits(filters)
    if limits:
        choice = choose_clips(scores_of(facts, where=str(folder)), filters)
    else:
        choice = ClipChoice((True,) * len(facts), {}, {})
    if not any(choice.passed):
        keys = ", ".join(f"data.filters.{name} ({limit})" for name, limit in limits.items())
        raise ShardError(
            f"no clip of {folder} is left to train on: {choice.report()}. Change {keys}; --dry-run shows the scores"
        )
    without = sum(one.get("background") == "none" for one, used in zip(facts, choice.passed, strict=True) if used)
    seen = sum(choice.passed) - without
    if without and seen and mixed_backgrounds == "refuse":
        raise ShardError(
            f"{folder} mixes two kinds of clips: {without} have depth and normals of the person alone, before a flat "
            f"wall (`background: none`), and {seen} of the whole frame. A network that learns from both cannot know "
            "which to predict. Prepare all clips with the same annotators, or set data.mixed_backgrounds: accept"
        )
    return choice


def scores_of(facts: Sequence[Facts], *, where: str) -> list[Scores]:
    """The scores of clips; a clip without scores has none that is known.

    Raises:
        ShardError: a score is unknown or out of its range.
    """
    try:
        return [Scores.from_json(one.get("scores", {})) for one in facts]
    except ValueError as error:
        raise ShardError(f"{where}: the scores of a clip are damaged ({error}); run `prepare` again") from error
