"""The sub-command `explain`: shows what recipe keys mean. It reads the schema alone, so that it answers at once."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dreamdance.errors import RecipeError
from dreamdance.launch.program import program
from dreamdance.recipe.keys import explain
from dreamdance.recipe.parse import TASKS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}\n{self.format_usage().rstrip()}")


def explanation(words: Sequence[str]) -> str:
    """What `explain` prints.

    Args:
        words: the words of the command line after `explain`.

    Raises:
        RecipeError: no recipe has the key, or a word is not understood.
    """
    parser = _Parser(
        prog=f"{program()} explain",
        usage=f"{program()} explain [KEY] [--task TASK]",
        description="Shows type, default, unit and meaning of a recipe key, of all keys of a section, or of all keys.",
        allow_abbrev=False,
    )
    parser.add_argument("key", nargs="?", metavar="KEY", help="a dotted key, such as optimizer.lr, or a section")
    parser.add_argument("--task", choices=list(TASKS), help="only the keys of this task's recipes")
    options = parser.parse_args(list(words))
    return explain(options.key, options.task)
