"""MyST as plain Markdown."""

import pytest

from dlatlas.book import portable


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("(label)=\n## Title\n", "## Title\n"),
        ("{glue:text}`error:.2f` and {glue:text}`n`", "0.13 and 7"),
        ("see {ref}`ch-theory-optimizers` and {ref}`the chapter <ch-x>`", "see ch-theory-optimizers and the chapter"),
        ("```{math}\n:label: eq\nx^2\n```", "$$\nx^2\n$$"),
        (":::{note}\nMind the gap.\n:::", "> **Note**\n>\n> Mind the gap."),
        ("````{exercise}\n:label: ex-1\nDo it:\n```python\n1\n```\n````", "**Exercise.** Do it:\n```python\n1\n```"),
        ("```{solution-start} ex-1\n:class: dropdown\n```\nSo.\n```{solution-end}\n```", "**Solution.**\nSo.\n"),
        ("```python\nx = {1: 2}\n```", "```python\nx = {1: 2}\n```"),
    ],
)
def test_directives_and_roles(text, plain):
    assert portable.markdown(text, {"error": 0.131, "n": 7}) == plain


def test_the_quoted_source_is_the_library_s():
    text = portable.markdown("```{literalinclude} /lib/dlatlas/train.py\n:language: python\n:pyobject: History.final\n```", {})
    assert text.startswith("```python\n    def final(self, k: int = 10") and text.endswith("[-k:]))\n```")
    decorated = portable.source("/lib/dlatlas/train.py", "History.steps")
    assert decorated.startswith("    @property\n")


def test_the_student_s_notebook_has_neither_solutions_nor_outputs():
    def text(source):
        return {"cell_type": "markdown", "id": f"m{len(source)}", "metadata": {}, "source": source}

    def code(source, *outputs):
        return {
            "cell_type": "code",
            "id": f"c{len(source)}",
            "metadata": {},
            "execution_count": 1,
            "source": source,
            "outputs": list(outputs),
        }

    start, end = "```{solution-start} ex-1\n:class: dropdown\n```", "```{solution-end}\n```"
    glued = {"output_type": "display_data", "metadata": {"scrapbook": {"name": "n"}}, "data": {f"{portable.GLUE}text/plain": "7"}}
    cells = [
        code("glue(n=7)", glued),
        text(f"It is {{glue:text}}`n`.\n\n````{{exercise}}\n:label: ex-1\nHow many?\n````\n\n{start}\n\nSeven, because:"),
        code("secret()"),
        text(f"And so on.\n\n{end}\n\n## Where next"),
        code("after()"),
    ]
    made = portable.without_solutions({"cells": cells, "metadata": {}})["cells"]
    whole = "\n".join(cell["source"] for cell in made)
    for hidden in ("Seven", "secret", "And so on", "solution-"):
        assert hidden not in whole
    assert [cell["source"] for cell in made if cell["cell_type"] == "code"] == ["glue(n=7)", "", "after()"]
    assert "It is 7." in whole and "**Exercise.** How many?" in whole and whole.index("Your solution") < whole.index("## Where next")
    assert all(not cell["outputs"] for cell in made if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in made}) == len(made)
    assert cells[0]["outputs"]  # the argument stays as it was
