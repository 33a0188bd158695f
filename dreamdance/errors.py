"""What a user can mend.

Every error here is printed as its text alone, without a traceback, and ends the command with a code that is not 0.
"""


class UserError(ValueError):
    """Something that the user gave is wrong: the text names the value, what is accepted and the key to change."""


class RecipeError(UserError):
    """A recipe, or a `key=value` on the command line, is wrong."""


class ShardError(UserError):
    """A shard or its index is damaged, missing, foreign or hostile."""


class LostWorkerError(ShardError):
    """A process that reads or writes shards died or hangs; another start, perhaps elsewhere, may fare better."""


class CheckpointError(UserError):
    """A checkpoint or an export cannot be used."""


class ManifestError(UserError):
    """An entry of an inference manifest is wrong."""


class MissingInputError(UserError):
    """Weights, data, a run or a device that the recipe names is not there."""
