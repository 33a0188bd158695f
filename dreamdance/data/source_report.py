"""What `--dry-run` of `prepare` shows about its videos: how many, how large, how long, and who annotates them.

Headers of a bounded number of videos are read, spread evenly over all.
"""

import os
from collections import Counter
from pathlib import Path

from dreamdance.data.writing.map_files import candidate_files, present_files
from dreamdance.data.writing.video_list import listed_videos
from dreamdance.errors import UserError
from dreamdance.media.picture_names import find_picture_folders
from dreamdance.media.video_glance import Glance, glance_at
from dreamdance.media.video_names import printable
from dreamdance.recipe.annotator_section import Annotators
from dreamdance.recipe.schema import PrepareRecipe, VideosSource
from dreamdance.runs.durations import duration

# The headers of at most this number of videos are read.
MAX_PROBED = 100
# Of sizes, rates and unreadable videos at most this number is listed.
_MAX_LISTED = 5


def describe_videos(recipe: PrepareRecipe) -> str:
    """Lines about the videos and the annotators of a recipe; empty if it renders dancers."""
    source = recipe.videos
    if source is None:
        return ""
    pictures = find_picture_folders(source.folder) if source.annotators is not None else []
    try:
        names = listed_videos(source)
    except UserError as error:
        if not pictures:
            return f"videos: {error}"
        names = []
    lines = [f"videos: {len(names)} in {source.folder}"]
    if pictures:
        lines.append(f"  {len(pictures)} folders of pictures, at {source.images_fps:g} frames per second")
    lines += _describe_headers(source, names)
    if source.annotators is not None:
        lines.append(f"  annotators: {_describe_annotators(source.annotators)}")
    return "\n".join(lines)


def _describe_headers(source: VideosSource, names: list[str]) -> list[str]:
    chosen = [names[place * len(names) // MAX_PROBED] for place in range(MAX_PROBED)]
    chosen = names if len(names) <= MAX_PROBED else chosen
    found, broken, given = list[Glance](), list[str](), Counter[str]()
    for name in chosen:
        files = candidate_files(source.folder, name, plain=source.annotators is not None)
        given.update(modality for modality, paths in files.items() if modality != "rgb" and present_files(paths))
        candidates = files["rgb"]
        try:
            found.append(glance_at(next(iter(present_files(candidates)), candidates[0])))
        except (UserError, OSError) as error:
            broken.append(printable(error))
    lines = []
    if found:
        of_all = "" if len(chosen) == len(names) else f" (from the headers of {len(chosen)} of them)"
        lengths = [one.seconds for one in found if one.seconds is not None]
        about = "about " if len(lengths) < len(names) else ""
        total = sum(lengths) / len(lengths) * len(names) if lengths else 0.0
        length = f"{about}{total:,.0f} s in all ({duration(total)})" if lengths else "lengths are not stated"
        lines.append(f"  {length}{of_all}")
        lines.append(f"  sizes: {_count([f'{one.width}x{one.height}' for one in found])}")
        lines.append(f"  frames per second: {_count([f'{one.fps:.4g}' for one in found])}")
    if given:
        lines.append(f"  given beside them: {', '.join(f'{number} x {name}' for name, number in given.items())}")
    if broken:
        lines.append(f"  cannot be read: {len(broken)} of {len(chosen)}")
        lines += [f"    {text}" for text in broken[:_MAX_LISTED]]
        lines += ["    ..."] if len(broken) > _MAX_LISTED else []
    return lines


def _count(values: list[str]) -> str:
    counts = Counter(values).most_common()
    listed = ", ".join(f"{number} x {value}" for value, number in counts[:_MAX_LISTED])
    return listed + (f", and {len(counts) - _MAX_LISTED} others" if len(counts) > _MAX_LISTED else "")


def _describe_annotators(section: Annotators) -> str:
    tasks = {task: str(getattr(section, task)) for task in ("pose", "mask", "depth", "normal", "cuts")}
    named = ", ".join(f"{task} {name}" for task, name in tasks.items())
    where = "" if os.path.isdir(section.weights) else ", which does not exist"
    return f"{named}; weights in {Path(section.weights)}{where}, on {section.device}"
