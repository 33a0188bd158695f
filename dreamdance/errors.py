"""Errors whose text tells the user what to fix.

The command prints such an error without a traceback and exits with a code that is not 0.
"""

import errno

# Causes in the user's setup: paths, permissions, space, the kind of file system. Every other number (EIO, ESTALE,
# ETIMEDOUT, ENOTCONN, ...) counts as a failure of a machine or of storage that may be over at the next attempt.
USER_FIXABLE_ERRNOS = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP),
    }
)


class UserError(ValueError):
    """A value that the user gave is wrong. The text names the value, what is accepted, and the key to change."""


class RecipeError(UserError):
    """A recipe, or a `key=value` on the command line, is wrong."""


class ShardError(UserError):
    """A shard or its index is damaged, missing, foreign or hostile."""


class LostWorkerError(ShardError):
    """A process that reads or writes shards died or hangs; starting again, perhaps on another node, can help."""


class LostDeviceError(UserError):
    """A GPU that the job asked for is missing; starting again, perhaps on another node, can help."""


class CheckpointError(UserError):
    """A checkpoint or an export cannot be used."""


class ManifestError(UserError):
    """An entry of an inference manifest is wrong."""


class MissingInputError(UserError):
    """Weights, data, a run or a device that the recipe names is missing."""


def is_transient(error: BaseException) -> bool:
    """Whether starting again can help without any change by the user: a machine or its storage failed.

    A `UserError` may have been raised because a file operation failed, so the errors that caused it count as well.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LostWorkerError | LostDeviceError):
            return True
        if isinstance(seen, OSError):
            return seen.errno is not None and seen.errno not in USER_FIXABLE_ERRNOS
        seen = seen.__cause__ or seen.__context__
    return False
