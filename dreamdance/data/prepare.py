"""The `prepare` task: writes the shards that training reads (C9), and example inputs for `animate`.

`output/train` and `output/validation` are folders of shards; `output/manifest.jsonl` lists the validation clips.
`output/examples/<clip>` contains the reference picture and the poses of each.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreamdance.data.contact_sheets import show_output
from dreamdance.data.examples import MANIFEST_FILE, write_examples
from dreamdance.data.planning import describe_source, part_names, plan_parts, report_missing, side_files_folder
from dreamdance.data.prepare_notes import (
    begun_compression,
    changed_videos_message,
    damage_table,
    damaged_videos_message,
    join_reasons,
    other_settings_message,
    read_inputs,
    report_without_clips,
    unequal_ranks_message,
    unusable_videos_message,
    write_damaged,
    write_inputs,
    write_without_clips,
)
from dreamdance.data.writing.part_notes import OtherSettingsError
from dreamdance.data.writing.picture_folders import with_packed_pictures
from dreamdance.data.writing.shard_parts import Part, ShardFormat
from dreamdance.data.writing.shard_writer import ShardFolder, newly_damaged, share_missing, write_shared
from dreamdance.data.writing.video_clips import Split
from dreamdance.data.writing.video_opening import check_videos
from dreamdance.data.writing_report import WritingReport, count_failed
from dreamdance.errors import ShardError, UserError
from dreamdance.media.video import VideoError
from dreamdance.recipe.schema import PrepareRecipe, VideosSource
from dreamdance.runs.array_member import sharing
from dreamdance.runs.damaged_videos import DAMAGED_FILE, read_damaged, read_without_clips
from dreamdance.runs.folder_lock import lock_folder
from dreamdance.runs.layout import ProgressLog
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

PARTS_PER_CHECK = 64  # a rank checks this number of parts of each split at a time


def prepare(recipe: PrepareRecipe, run_folder: Path) -> None:
    """Writes the shards of a recipe. After a kill, the next start continues; a complete output is not written again.

    Args:
        recipe: the dancers or videos, and the output folder.
        run_folder: the folder for the progress log and the work queue.

    Raises:
        UserError: there are no videos, some cannot be used (the error names all of them), or the output folder was
            made with other settings or from other videos.
        LostWorkerError: another rank gives no sign, or a worker process of this rank died or hangs.
    """
    ranks = Ranks.from_environment()
    progress = ProgressLog(run_folder, ranks)
    output = Path(recipe.output)
    claim = lock_folder(output, key="output", sharing=sharing(run_folder)) if ranks.is_main else nullcontext()
    with claim, WorkQueue(ranks, limits=recipe.cluster, run_folder=run_folder) as queue:
        recipe = find_sources(recipe, queue)
        parts = plan_parts(recipe, queue)
        folders = open_folders(recipe, parts, queue)
        error = write_output(recipe, folders, queue, progress, ProgressLog(run_folder, ranks))
    if error is None:
        total = sum(len(planned) for planned in parts.values())
        failed = count_failed(recipe, len(read_damaged(output)), len(read_without_clips(output)))
        progress.write(done=total, total=total, unit="parts", message=f"{output} is complete", **failed)
    elif ranks.is_main:  # only this one: the launcher may stop the main rank when another rank fails
        raise error


def open_folders(
    recipe: PrepareRecipe, parts: Mapping[Split, Sequence[Part]], queue: WorkQueue
) -> dict[Split, ShardFolder]:
    """The folder of each split. What was begun with other settings is removed if it has no clip.

    Raises:
        ShardError: the output has clips that were made with other settings.
    """
    output, settings, shard_format = Path(recipe.output), describe_source(recipe), choose_format(recipe)
    try:
        folders = {
            split: ShardFolder(
                output / split,
                planned,
                settings={**settings, "split": split, "shard_size_mib": recipe.shard_size_mib},
                shard_format=shard_format,
                queue=queue,
                on_error=recipe.videos.on_error if recipe.videos else "stop",
            )
            for split, planned in parts.items()
        }
    except OtherSettingsError as error:
        source = "videos" if recipe.dancers is None else "dancers"
        raise ShardError(other_settings_message(output, error.differing, source=source)) from error

    def discard() -> None:
        for folder in folders.values():
            folder.discard_stale()

    queue.once("discard", discard)
    return folders


def find_sources(recipe: PrepareRecipe, queue: WorkQueue) -> PrepareRecipe:
    """The recipe with a folder of videos in the place of a folder of folders of pictures; reports missing videos."""
    source, output = recipe.videos, Path(recipe.output)
    if source is None:
        return recipe
    if source.annotators is not None:
        source = with_packed_pictures(source, side_files_folder(source.annotators, output), queue)
    if queue.ranks.is_main and source.list is not None:
        report_missing(source, output)
    return recipe.model_copy(update={"videos": source})


def choose_format(recipe: PrepareRecipe) -> ShardFormat:
    """The format of the shards; an output that was begun keeps its compression unless the recipe sets another."""
    return ShardFormat(
        shard_size_mib=recipe.shard_size_mib,
        compression=recipe.compression or begun_compression(Path(recipe.output)) or "none",
        rgb_format=recipe.rgb_format or ("png" if recipe.dancers is not None else "jpeg"),
        rgb_quality=recipe.rgb_quality,
        smaller_sizes=tuple(recipe.smaller_sizes),
    )


def write_output(
    recipe: PrepareRecipe,
    folders: Mapping[Split, ShardFolder],
    queue: WorkQueue,
    progress: ProgressLog,
    opening: ProgressLog,
) -> UserError | None:
    """Checks inputs, writes missing parts, completes the output; returns the error, the same on all ranks, or None."""
    output = Path(recipe.output)
    found = check_inputs(recipe, folders, queue, opening)
    if isinstance(found, UserError):
        return found
    damaged = write_missing(recipe, folders, found, queue, progress)
    queue.once("complete", partial(complete, recipe, folders, queue, damaged))
    if (reason := queue.stop_reason()) is None:
        if recipe.contact_sheets:
            show_output(output, queue, num_played=recipe.page_clips)
        return None
    if damaged and queue.ranks.is_main:
        write_damaged(output, damaged)
    return ShardError(reason) if reason else VideoError(damaged_videos_message(damaged, output))


@dataclass(frozen=True)
class Findings:
    """What the check of the inputs found.

    Attributes:
        missing: split -> the names of the parts to write.
        without_clips: split -> name -> why a video whose part is kept gave this split no clip.
    """

    missing: dict[Split, list[str]]
    without_clips: dict[str, dict[str, str]]


def check_inputs(
    recipe: PrepareRecipe, folders: Mapping[Split, ShardFolder], queue: WorkQueue, progress: ProgressLog
) -> Findings | UserError:
    """Compares the existing parts with their sources, and opens the videos of missing parts; the ranks share the work.

    Returns:
        The parts to write, for all ranks; or the error that ends the run, the same on all ranks. It names
        all videos concerned: the ranks found different videos in the folder, a complete output was made from other
        videos, or, unless `videos.on_error` is `skip`, headers show that videos cannot be used.
    """
    output = Path(recipe.output)
    agree_on_plan(recipe, folders, queue)
    answers = check_shares(recipe, folders, queue, progress)
    if reason := queue.stop_reason():
        return ShardError(reason)
    changed, added = ({name for answer in answers for name in answer[key]} for key in ("changed", "added"))
    removed = {name for folder in folders.values() for name in folder.removed_sources()}
    if others := changed_videos_message(output, changed=changed, added=added, removed=removed):
        return ShardError(others)
    broken, damaged = (
        {name: why for answer in answers for name, why in answer[key].items()} for key in ("broken", "damaged")
    )
    without_clips = {str(split): _merged(answers, "without_clips", split) for split in folders}
    is_stopped = bool(broken) and recipe.videos is not None and recipe.videos.on_error == "stop"

    def record() -> None:
        # Also where there are none: the tables of an earlier run must not be taken for those of this one.
        write_damaged(output, damaged | broken)
        write_without_clips(output, join_reasons(without_clips, planned_names(folders)))
        if not is_stopped:
            states = {name: state for answer in answers for name, state in answer["states"].items()}
            write_inputs(output, states, planned=source_files(folders))

    if recipe.videos is not None:
        queue.once("record", record)  # before `complete` writes these files again
    if is_stopped:
        return VideoError(unusable_videos_message(broken, output))
    if broken and queue.ranks.is_main:
        logger.warning(
            "`prepare` leaves out %d videos (videos.on_error=skip), see %s:\n%s",
            len(broken),
            output / DAMAGED_FILE,
            damage_table(broken),
        )
    missing = {split: [name for answer in answers for name in answer["missing"].get(split, [])] for split in folders}
    return Findings(missing, without_clips)


def _merged(answers: Sequence[Mapping[str, Any]], key: str, split: Split) -> dict[str, str]:
    return {name: reason for answer in answers for name, reason in answer[key].get(split, {}).items()}


def agree_on_plan(recipe: PrepareRecipe, folders: Mapping[Split, ShardFolder], queue: WorkQueue) -> None:
    """Stops the work if the ranks made different plans, because the folder of videos changed between them."""
    parts = [(split, part) for split, folder in folders.items() for part in folder.parts]
    planned = [
        [split, part.name, None if part.source is None else [part.source.clip_id, len(part.source.files)]]
        for split, part in parts
    ]
    names = sorted({part.source.name for _, part in parts if part.source is not None and part.source.files})
    own = {"rank": queue.ranks.rank, "names": names, "plan": sha256(json.dumps(planned).encode()).hexdigest()}
    first = json.loads(queue.agree("plan", json.dumps(own)))
    if first["plan"] != own["plan"]:
        seen = {first["rank"]: set(first["names"]), queue.ranks.rank: set(names)}
        queue.stop(unequal_ranks_message(recipe.videos.folder if recipe.videos else recipe.output, seen))


def check_shares(
    recipe: PrepareRecipe, folders: Mapping[Split, ShardFolder], queue: WorkQueue, progress: ProgressLog
) -> list[dict[str, Any]]:
    """Surveys all parts in shares, and opens the videos of missing parts; returns the findings of all ranks."""
    num_parts = max(len(folder.parts) for folder in folders.values())
    num_videos = len({part.source.name for folder in folders.values() for part in folder.parts if part.source})
    known = read_inputs(Path(recipe.output))
    share = queue.share("check", [str(start) for start in range(0, num_parts, PARTS_PER_CHECK)])
    for item in share.take():
        if item is None:
            continue
        chosen = slice(int(item), int(item) + PARTS_PER_CHECK)
        surveys = {split: folder.survey(folder.parts[chosen], known) for split, folder in folders.items()}
        missing: dict[Split, list[str]] = {split: survey.missing for split, survey in surveys.items()}
        parts = [
            part for split, folder in folders.items() for part in folder.parts[chosen] if part.name in missing[split]
        ]
        broken = {} if recipe.videos is None else open_parts(recipe.videos, parts, recipe.num_workers, queue)
        found = {
            "missing": missing,
            "changed": [name for survey in surveys.values() for name in survey.changed],
            "added": [name for survey in surveys.values() for name in survey.added],
            "broken": broken,
            "damaged": {name: reason for survey in surveys.values() for name, reason in survey.damaged.items()},
            "without_clips": {split: survey.without_clips for split, survey in surveys.items()},
            "states": {name: state.to_json() for survey in surveys.values() for name, state in survey.states.items()},
        }
        share.finish(item, json.dumps(found))
        if recipe.videos is not None and any(missing.values()):
            done = num_videos * share.num_done() // len(share.items)
            progress.write(done=done, total=num_videos, unit="videos", message=f"opening {recipe.videos.folder}")
    return [json.loads(text) for text in share.results().values()]


def open_parts(source: VideosSource, parts: Sequence[Part], num_threads: int, queue: WorkQueue) -> dict[str, str]:
    """Opens the videos of parts; returns the problems: name -> reasons."""
    wanted = sorted({part.source.name for part in parts if part.source is not None})

    def report(number: int) -> None:
        queue.watchdog.enter("opening videos", f"{number} of {len(wanted)}")

    report(0)
    return check_videos(source, wanted, num_threads=num_threads, on_video=report)


def write_missing(
    recipe: PrepareRecipe,
    folders: Mapping[Split, ShardFolder],
    found: Findings,
    queue: WorkQueue,
    progress: ProgressLog,
) -> dict[str, str]:
    """Writes missing parts of both splits with all other ranks, until all are written or the work is stopped.

    Returns:
        The videos that any rank found damaged while it decoded them: name -> reason.
    """
    share = share_missing(queue, {folders[split]: names for split, names in found.missing.items()})
    report = WritingReport(recipe, folders, share, progress, queue.ranks, without_clips=found.without_clips)
    write_shared(list(folders.values()), share, recipe.num_workers, queue, report)
    return newly_damaged(list(folders.values()), share)


def complete(
    recipe: PrepareRecipe, folders: Mapping[Split, ShardFolder], queue: WorkQueue, damaged: Mapping[str, str]
) -> None:
    """Writes the indices, the examples and the records of the videos; only one rank runs this.

    The output contains no clips of a damaged video, even if its part in one split could be written.
    """
    output = Path(recipe.output)
    left_out = {name: reason for folder in folders.values() for name, reason in folder.damaged_sources().items()}
    left_out |= damaged
    states = {
        name: state.to_json()
        for folder in folders.values()
        for note in folder.notes.values()
        for name, state in note.files.items()
        if state is not None
    }
    if recipe.videos is not None:
        write_damaged(output, left_out)
        reasons = {str(split): folder.sources_without_clips() for split, folder in folders.items()}
        sound = {
            split: {name: why for name, why in one.items() if name not in left_out} for split, one in reasons.items()
        }
        report_without_clips(output, join_reasons(sound, planned_names(folders)))
    if left_out:
        logger.warning(
            "the output contains no clips of %d damaged videos, see %s:\n%s",
            len(left_out),
            output / DAMAGED_FILE,
            damage_table(left_out),
        )
    for split, folder in folders.items():
        folder.complete(left_out, may_be_empty=split == "validation")
    if recipe.videos is not None:
        write_inputs(output, states, planned=source_files(folders))
    if "validation" in folders:
        has_pairs = recipe.dancers is not None and recipe.dancers.pairs
        before_clip = partial(queue.watchdog.enter, "writing an example")
        count = write_examples(output, before_clip=before_clip, has_pairs=has_pairs)
        logger.info("%s lists %d validation clips for `animate`", output / MANIFEST_FILE, count)


def planned_names(folders: Mapping[Split, ShardFolder]) -> dict[str, set[str]]:
    """The names of the videos of each split."""
    return {split: part_names(folder.parts) for split, folder in folders.items()}


def source_files(folders: Mapping[Split, ShardFolder]) -> set[str]:
    """The names of all files that the parts are made from."""
    parts = [part for folder in folders.values() for part in folder.parts]
    return {path.name for part in parts if part.source is not None for path in part.source.files}
