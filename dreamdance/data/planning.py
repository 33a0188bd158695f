"""Plans the work of `prepare`: the clips of each part, their split, and the settings that decide their content."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.prepare_notes import read_skipped
from dreamdance.data.writing.annotated_clips import AnnotatedVideoPart
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.data.writing.dancer_clips import render_record
from dreamdance.data.writing.same_footage import group_footage, report_leaks
from dreamdance.data.writing.shard_parts import Part, PartSource
from dreamdance.data.writing.video_clips import Split, VideoPart, choose_validation
from dreamdance.data.writing.video_list import listed_videos, missing_names
from dreamdance.data.writing.video_opening import clip_files
from dreamdance.media.video_names import part_name, printable, video_ids
from dreamdance.modalities import ADDED_TO_DANCERS
from dreamdance.recipe.annotator_section import Annotators
from dreamdance.recipe.schema import DancersSource, PrepareRecipe, VideosSource
from dreamdance.runs.files import write_atomically
from dreamdance.runs.work_queue import WorkQueue

logger = logging.getLogger(__name__)

MISSING_FILE = "missing_videos.txt"  # in the output; the names in `videos.list` that no video has
SIDE_FILES_FOLDER = "annotations"  # in the output; holds the results of annotators


def describe_source(recipe: PrepareRecipe) -> dict[str, Any]:
    """Exactly the settings that decide the content of the clips; the note of each part has the videos' hashes."""
    source = recipe.dancers or recipe.videos
    if source is None:
        raise ValueError("a prepare recipe names either `dancers` or `videos`")  # `recipe.rules` checks this first
    details: dict[str, Any] = {"clips_per_part": recipe.clips_per_part, **source.model_dump(mode="json")}
    if isinstance(source, VideosSource):
        for key in ("on_error", "list", "images_fps"):  # the list of videos and their hashes are compared instead
            details.pop(key)
        details.update(seed=recipe.seed, files="noted by their hashes")
        if source.annotators is None:
            del details["annotators"]
        else:
            details["annotators"] = describe_annotators(source.annotators)
    elif ADDED_TO_DANCERS:  # the files of a new map of videos are among the hashes
        details["added_maps"] = list(ADDED_TO_DANCERS)
    if not source.references:
        del details["references"]  # outputs of older commits have none
    if not details.get("pairs", True):
        del details["pairs"]
    return details


def describe_annotators(section: Annotators) -> dict[str, Any]:
    """The settings that decide what annotators find; not where their weights lie, and where they run."""
    networks = open_networks(section)
    found = {task: networks.identity(task) for task in networks.names}
    return {**found, "person": section.person, "smooth": section.smooth}


def plan_parts(recipe: PrepareRecipe, queue: WorkQueue) -> dict[Split, list[Part]]:
    """Divides the work of both splits into parts; every rank gets the same parts.

    With `videos.annotators`, videos of the same footage belong to the same split: the ranks hash the videos first.

    Raises:
        MissingInputError: the folder has no usable videos.
    """
    if recipe.dancers is not None:
        return plan_dancers(recipe.dancers, recipe.clips_per_part)
    if recipe.videos is None:
        raise ValueError("a prepare recipe names either `dancers` or `videos`")
    output, source = Path(recipe.output), recipe.videos
    skipped = read_skipped(output)
    groups = None
    if source.annotators is not None and source.split_by == "clip" and source.validation_fraction > 0:
        groups = group_footage(source, output, queue, skipped=skipped)
    parts = plan_videos(source, recipe.seed, output=output, skipped=skipped, groups=groups)
    if groups is not None and queue.ranks.is_main:
        report_leaks(output, {split: part_names(planned) for split, planned in parts.items()}, queue)
    return parts


def side_files_folder(section: Annotators, output: Path) -> Path:
    """The folder of the results of annotators."""
    return Path(section.side_files or output / SIDE_FILES_FOLDER)


def report_missing(source: VideosSource, output: Path) -> None:
    """Warns about names in `videos.list` without a video, and lists them in the output."""
    path = output / MISSING_FILE
    missing = missing_names(source, listed_videos(source))
    if not missing:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, "".join(f"{printable(name)}\n" for name in missing))
    logger.warning(
        "%d names in %s (`videos.list`) have no video in the folder, such as %s; all are listed in %s",
        len(missing),
        source.list,
        ", ".join(map(printable, missing[:10])),
        path,
    )


def part_names(parts: Sequence[Part]) -> set[str]:
    """The names of the videos of parts."""
    return {part.source.name for part in parts if part.source is not None}


def plan_dancers(source: DancersSource, clips_per_part: int) -> dict[Split, list[Part]]:
    """Makes parts of `clips_per_part` dancers; training and validation use disjoint ranges of seeds.

    With `source.pairs`, the parts of all held-out dancers are followed by those of the pairs: the motion of each on the
    next one, that of the last on the first.
    """
    first = source.skip_validation_clips
    seeds: dict[Split, range] = {
        "train": TRAINING_SEEDS[: source.num_train_clips],
        "validation": HELD_OUT_SEEDS[first : first + source.num_validation_clips],
    }
    work: dict[Split, list[DancerPart | PairPart]] = {
        split: [DancerPart(source, chosen[start : start + clips_per_part])
                for start in range(0, len(chosen), clips_per_part)]
        for split, chosen in seeds.items()
    }  # fmt: skip
    if source.pairs:
        held_out = seeds["validation"]
        pairs = [(seed, held_out[(number + 1) % len(held_out)]) for number, seed in enumerate(held_out)]
        work["validation"] += [
            PairPart(source, tuple(pairs[start : start + clips_per_part]))
            for start in range(0, len(pairs), clips_per_part)
        ]
    return {
        split: [Part(f"part_{number:05d}", make) for number, make in enumerate(makers)]
        for split, makers in work.items()
    }


def plan_videos(
    source: VideosSource,
    seed: int,
    *,
    output: Path,
    skipped: Collection[str] = (),
    groups: Sequence[Sequence[str]] | None = None,
) -> dict[Split, list[Part]]:
    """Makes one part for each video and each split that the video belongs to.

    Args:
        source: the folder of the videos and the settings of the split.
        seed: seed of the draw for validation.
        output: the folder of the shards, in which the side files of annotators lie by default.
        skipped: names of damaged videos that a complete output was made without. They take part in the draw even if
            their files have been removed since, so that all other videos stay in their splits.
        groups: all names in groups that the split must not divide.
    """
    found = set(listed_videos(source))
    names = sorted(found.union(skipped))
    ids = video_ids(names)
    splits: dict[Split, list[str]] = {"train": names, "validation": names}
    if source.split_by == "clip":
        held_out = choose_validation(names, fraction=source.validation_fraction, seed=seed, groups=groups)
        splits = {
            "train": [name for name in names if name not in held_out],
            "validation": [name for name in names if name in held_out],
        }
    if source.validation_fraction == 0:
        del splits["validation"]

    def plan(name: str, split: Split) -> Part:
        files = clip_files(source, name) if name in found else ()
        make: VideoPart | AnnotatedVideoPart = VideoPart(source, name, ids[name], split)
        if source.annotators is not None:
            make = AnnotatedVideoPart(source, name, ids[name], split, side_files_folder(source.annotators, output))
        return Part(part_name(name), make, PartSource(name, ids[name], files))

    return {split: [plan(name, split) for name in chosen] for split, chosen in splits.items()}


@dataclass(frozen=True)
class DancerPart:
    """The dancers of one part; the worker that writes the part renders them."""

    source: DancersSource
    seeds: range

    def __call__(self) -> Iterator[ClipRecord]:
        """Yields one clip per seed."""
        return (render_record(seed, self.source) for seed in self.seeds)


@dataclass(frozen=True)
class PairPart:
    """Motions of one part on other dancers: (seed of the motion, seed of the person and the place)."""

    source: DancersSource
    pairs: tuple[tuple[int, int], ...]

    def __call__(self) -> Iterator[ClipRecord]:
        """Yields one clip per pair."""
        return (render_record(seed, self.source, person_seed=person) for seed, person in self.pairs)
