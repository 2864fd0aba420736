"""A plain VLM: answer questions about what stands in the first user turn. It makes the base of comatch-nano."""

from comatch.recipe import Recipe, Stage, Visibility

RECIPES = (
    Recipe(
        "vlm",
        (
            Stage(
                "answer",
                Visibility(("context", "dialogue"), ("c.", "cc")),
                {"next_token": 1.0},
                layout="chat",
            ),
        ),
    ),
)
