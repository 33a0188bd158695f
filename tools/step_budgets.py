"""Counts what one step of each full-size training recipe costs, and compares it with tools/step_budgets.csv.

    python tools/step_budgets.py            # count, and write the table
    python tools/step_budgets.py --check    # count, and fail if a number differs by more than 1 % from the table

Nothing is computed: the step runs on fake tensors (`training.planning.step_cost`). One row is one micro batch of one
process, forward and backward, in units of 1e12 operations (TF), 1e9 bytes (GB), operators of torch, and GiB of
activations at the peak. `form` says what the batch holds, pictures or stored latents; no activation is computed
again, as on GPUs of 80 GB (`sharding.gradient_checkpointing: auto`), but in stage 2's form `latents, transformers`,
the level for GPUs that are tight. The rows of commit 5194bb1 stay as they are: it had pictures alone, and its recipes
repeated the blocks. The columns also give the phases of a step: `encoders` is what stored latents save,
`recomputation` what was saved by repeating nothing.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from dreamdance.recipe import load_recipe
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.training.planning.operator_count import PHASES
from dreamdance.training.planning.step_cost import StepCost, count_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".csv")
RECIPES = ("stage1_domains", "stage1_geometry", "stage1_temporal", "stage2")
NOW = "now"
_LATENTS = "data.latents.local=data/dance/latents"
# The forms of a step: what the recipe is changed by.
FORMS: dict[str, tuple[str, ...]] = {
    "pictures": ("sharding.gradient_checkpointing=none",),
    "latents": (_LATENTS, "sharding.gradient_checkpointing=none"),
    "latents, transformers": (_LATENTS, "sharding.gradient_checkpointing=transformers"),
}
# Of which recipes a form is counted, if not of all.
ONLY_OF = {"latents, transformers": ("stage2",)}
UNITS = {"TF": 1e12, "GB": 1e9, "GiB": 2**30}
# A number may exceed the table by this share: versions of torch differ in a few operators.
TOLERANCE = 0.01

Row = dict[str, str]


def forms_of(recipe_name: str) -> list[str]:
    """The forms in which a recipe's step is counted."""
    return [form for form in FORMS if recipe_name in ONLY_OF.get(form, RECIPES)]


def count(recipe_name: str, form: str) -> StepCost:
    """Counts one form of a recipe's step."""
    recipe = load_recipe(REPOSITORY / "recipes" / f"{recipe_name}.yaml", FORMS[form])
    assert isinstance(recipe, TrainingRecipe), "all four train"
    return count_recipe(recipe)


def numbers(cost: StepCost) -> dict[str, float]:
    """The numbers of a row by column."""
    total = cost.total
    by_phase = {f"{phase} TF": cost.work[phase].total_flops / UNITS["TF"] for phase in PHASES}
    return {
        "TF": total.total_flops / UNITS["TF"],
        "GB": total.num_bytes / UNITS["GB"],
        "operators": total.num_operators,
        "peak GiB": cost.peak_bytes / UNITS["GiB"],
        **by_phase,
        **{f"{phase} GB": cost.work[phase].num_bytes / UNITS["GB"] for phase in PHASES},
        **{f"{phase} operators": cost.work[phase].num_operators for phase in PHASES},
    }


def read_table() -> list[Row]:
    """The rows of the committed table."""
    if not TABLE.is_file():
        return []
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def row_of(recipe_name: str, form: str, commit: str = NOW) -> Row:
    """One row of the committed table."""
    (row,) = _find(read_table(), recipe_name, form, commit)
    return row


def _find(rows: list[Row], recipe_name: str, form: str, commit: str) -> list[Row]:
    wanted = (recipe_name, form, commit)
    return [row for row in rows if (row["recipe"], row["form"], row["commit"]) == wanted]


def differences(found: Mapping[str, float], row: Row) -> Iterator[str]:
    """The numbers that differ from a row by more than the tolerance: worse ones, and better ones to put into it."""
    for column, value in found.items():
        before = float(row[column])
        if value > before * (1 + TOLERANCE) + 0.005:
            yield f"{column} {value:.2f} is above {before:g}"
        elif value < before * (1 - TOLERANCE) - 0.005:
            yield f"{column} {value:.2f} is better than {before:g}: update the table"


def main(arguments: list[str] | None = None) -> int:
    """Counts all rows of this commit; writes them, or compares them with the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)} (all)")
    parser.add_argument("--check", action="store_true", help="compare with the table, write nothing")
    options = parser.parse_args(arguments)
    chosen, rows, failed = options.recipes or RECIPES, read_table(), False
    for name in chosen:
        for form in forms_of(name):
            found = numbers(count(name, form))
            row = next(iter(_find(rows, name, form, NOW)), None)
            print(
                f"{name}, {form}: " + ", ".join(f"{column} {value:,.2f}" for column, value in found.items()), flush=True
            )
            if options.check:
                problems = list(differences(found, row)) if row is not None else ["not in the table"]
                failed = failed or bool(problems)
                print("".join(f"  {problem}\n" for problem in problems), end="", file=sys.stderr)
                continue
            if row is None:
                rows.append(row := {"recipe": name, "form": form, "commit": NOW})
            row.update({column: _text(value) for column, value in found.items()})
            write_table(rows)  # after each row: a count takes a while
    return int(failed)


def write_table(rows: list[Row]) -> None:
    """Writes the table, the rows of a recipe together."""
    order = {name: place for place, name in enumerate(RECIPES)}
    rows = sorted(rows, key=lambda row: (order[row["recipe"]], row["commit"] == NOW))
    with TABLE.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
