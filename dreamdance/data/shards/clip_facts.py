"""What training must know of every clip before it reads one: its scores, and whether its maps show the background.

`prepare` lists both in the index, so that no head is read at the start of a training, and nothing is downloaded. Sets
whose index has no such list are read from the heads of their clips; clips of schema 1 have neither.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamdance.data.shards.index import ShardIndex
from dreamdance.data.shards.range_reads import read_sample_head
from dreamdance.errors import ShardError

# Key in an index's details: the facts of all clips in the order of the samples; empty if no clip has any.
FACTS_KEY = "clips"
# The entries of a clip's metadata that are facts, and their types.
_FACTS: dict[str, type] = {"scores": dict, "background": str}

Facts = Mapping[str, Any]


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in a clip's metadata: `scores` and `background`, where it has them."""
    return {name: metadata[name] for name in _FACTS if name in metadata}


def list_facts(folder: Path, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry in an index's details for a folder that is being completed; the list is empty if no clip has any facts.

    Args:
        folder: the folder of the shards.
        shards: the entries of its index, of schema 2.

    Returns:
        No entry if a shard is compressed: its heads cannot be read before it is unpacked.
    """
    facts: list[dict[str, Any]] = []
    for shard in shards:
        if shard["zip_data"] is not None:
            return {}
        path = folder / shard["raw_data"]["basename"]
        for position in range(shard["samples"]):
            head = read_sample_head(path, position, where=f"sample {position} of shard {path}")
            facts.append(facts_of(head.clip.metadata))
    return {FACTS_KEY: facts if any(facts) else []}


def listed_facts(index: ShardIndex) -> list[Facts] | None:
    """The facts that an index lists, one entry per clip; None if it lists none, so that heads must be read.

    Raises:
        ShardError: the list is damaged.
    """
    if all(shard.schema_version == 1 for shard in index.shards):
        return [{}] * index.num_samples
    facts = index.details.get(FACTS_KEY)
    if facts is None:
        return None
    if facts == []:
        return [{}] * index.num_samples
    if not isinstance(facts, list) or len(facts) != index.num_samples or not all(map(_is_sound, facts)):
        raise ShardError(f"{index.path}: '{FACTS_KEY}' is no list of facts for {index.num_samples} clips; damaged")
    return facts


def _is_sound(facts: Any) -> bool:
    return isinstance(facts, dict) and all(
        name in _FACTS and isinstance(value, _FACTS[name]) for name, value in facts.items()
    )
