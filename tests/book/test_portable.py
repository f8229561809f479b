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
