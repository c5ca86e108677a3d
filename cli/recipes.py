"""`upcycle recipes`: the recipes that ship with upcycle."""

from . import output
from .merge import Json


def recipes(as_json: Json = False) -> None:
    """List the recipes, their papers and what they need."""
    from upcycle.recipe_file import builtin_recipes

    known = builtin_recipes()
    if as_json:
        output.data_object(
            {
                "recipes": [
                    {**recipe.resolved(), "needs": recipe.needs, "example": recipe.example} for recipe in known.values()
                ]
            }
        )
        return
    output.entries(
        [(recipe.name, f"{recipe.summary}.\nNeeds {recipe.needs}.\n{recipe.paper}") for recipe in known.values()]
    )
