"""`upcycle recipes`: the recipes that ship with upcycle, one of them explained, or a file of one's own checked."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .merge import Json

if TYPE_CHECKING:
    from upcycle.explain import Explanation
    from upcycle.recipe import Recipe

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes, explain one, or check a file of your own.

    Without a command: all recipes, their papers and what they need.
    """
    if context.invoked_subcommand:
        if as_json:
            raise typer.BadParameter(
                f"--json stands behind the command: upcycle recipes {context.invoked_subcommand} …"
            )
        return
    from upcycle.recipe_file import builtin_recipes

    known = builtin_recipes()
    if as_json:
        output.data_object({"recipes": [_record(recipe) for recipe in known.values()]})
        return
    output.entries(
        [
            (recipe.name, f"{_sentence(recipe.summary)}\nNeeds {recipe.needs}.\n{recipe.paper}")
            for recipe in known.values()
        ]
    )
    output.data_line("`upcycle recipes show NAME` explains one, with what it costs.")


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a .toml file.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="A dense model's config.json, of which costs are shown.", show_default="a Llama of 1.24 billion"
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(min=2, max=1024, help="Seeds that are mixed, or copies of one.", show_default="4"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain a recipe: what becomes of each weight, its routers, its start, its format, and its cost.

    Example: upcycle recipes show bam --config config.json --num-experts 8
    """
    from upcycle.checkpoint import read_json
    from upcycle.explain import explain
    from upcycle.recipe_file import load_recipe
    from upcycle.scaling import DEFAULT_CONTEXT

    loaded = load_recipe(recipe)
    found = explain(loaded, read_json(config) if config else None, str(config or ""), num_experts)
    if as_json:
        output.data_object(_explained(found))
        return
    about = "\n".join(filter(None, (_sentence(loaded.summary), loaded.paper)))
    output.entries([(loaded.name, about), *found.sections])
    if not found.estimate:
        output.data_line(f"Its cost is not shown: of {found.model}, {found.misfit}. Give --config.")
        return
    title = f"Cost of {found.num_experts} × {found.model} (format {found.estimate.format})"
    output.cost_table(title, found.estimate.cost, found.estimate.dense, DEFAULT_CONTEXT)


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE.toml", help="A recipe file of your own.")],
    as_json: Json = False,
) -> None:
    """Check a recipe file; say in one line what it makes.

    Exit code 0 if it is a recipe, 1 if it is not, with what is wrong. Example: upcycle recipes check mine.toml
    """
    from upcycle.errors import RecipeError
    from upcycle.explain import in_one_line
    from upcycle.recipe_file import load_recipe

    if not file.endswith(".toml"):
        raise RecipeError(f"recipe file '{file}': its name must end in .toml")
    loaded = load_recipe(file)
    if as_json:
        output.data_object({"file": file, "makes": in_one_line(loaded), "recipe": _record(loaded)})
        return
    output.data_line(output.printable(f"{file}: {in_one_line(loaded)}"))


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _record(recipe: "Recipe") -> dict[str, Any]:
    from upcycle.explain import starts_as

    return {
        **recipe.resolved(),
        "needs": recipe.needs,
        "example": recipe.example,
        "start": starts_as(recipe),
    }


def _explained(found: "Explanation") -> dict[str, Any]:
    """What `show --json` prints."""
    costs: dict[str, Any] = {"cost": None, "dense": None, "ratios": None, "misfit": found.misfit}
    if found.estimate:
        cost, dense = asdict(found.estimate.cost), asdict(found.estimate.dense)
        ratios = {key: round(cost[key] / dense[key], 4) for key in cost}
        about = {"format": found.estimate.format, "model_type": found.estimate.model_type}
        costs = {**about, "cost": cost, "dense": dense, "ratios": ratios}
    return {
        "recipe": _record(found.recipe),
        "explanation": dict(found.sections),
        "formats": {model_type: asdict(fit) for model_type, fit in found.formats.items()},
        "of": {"model": found.model, "num_experts": found.num_experts, **costs},
    }
