"""Docstrings become MyST that shows what was written and cannot break the book."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlatlas.book import docs

SOURCE = '''r"""AMSGrad (reddi2018amsgrad).

Adam forgets a large and rare gradient at once,
AMSGrad never does.

Equations:

$$\\\\hat v_t = \\\\max(\\\\hat v_{t-1}, v_t)$$

Deviations from the paper:

1. The step is constant; the paper's falls
   like one over the root of t.
2. No bias correction.

Later work: no advantage was found (Choi et al., 2019).
"""
__all__ = ["Thing", "solve"]


class Thing(Base):
    """A thing.

    Args:
        x: where to start,
            far away.
        **more: the rest.

    Raises:
        ValueError: x < 0.
    """

    def __init__(self, x: float = 1.0, *, flag=True, **more):
        pass

    @property
    def size(self) -> int:
        """How large."""

    def _hidden(self):
        """Not shown."""


def solve(a, /, b: int = 2, *rest) -> Tensor:
    """Solve $a x = b$ for `x`."""


def helper():
    """Not public."""
'''


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "thing.py"
    path.write_text(SOURCE)
    return docs.read(path)


def test_the_public_api_is_read_from_the_source(module):
    thing, solve = module.entries
    assert (thing.name, thing.kind, solve.kind) == ("Thing", "class", "function")
    assert thing.signature == "class Thing(x: float = 1.0, *, flag=True, **more)  # Base"
    assert solve.signature == "solve(a, /, b: int = 2, *rest) -> Tensor"
    assert [(m.name, m.kind, m.signature) for m in thing.members] == [("size", "property", "size -> int")]


def test_the_idea_is_told_apart_from_the_rest(module):
    idea, rest = docs.split_idea(module.doc)
    assert idea.splitlines()[0] == "AMSGrad (reddi2018amsgrad)." and "never does" in idea
    assert rest.startswith("Equations:")


def test_sections_lists_and_formulas_are_laid_out(module):
    text = docs.to_myst(docs.split_idea(module.doc)[1])
    assert "### Deviations from the paper" in text
    assert "1. The step is constant; the paper's falls like one over the root of t." in text
    assert "2. No bias correction." in text
    assert "```{math}\n" in text and "v_t" in text
    assert "### Later work" in text and "no advantage was found" in text
    arguments = docs.to_myst(module.entries[0].doc, level=0)
    assert "**Arguments**" in arguments and "- `x`: where to start, far away." in arguments and "- `**more`: the rest." in arguments
    assert "**Raises**" in arguments and "- `ValueError`: x \\< 0." in arguments


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b * c [d] <e>", r"a\_b \* c \[d\] \<e\>"),
        ("`x_i` and ``y``", "`x_i` and `y`"),
        ("costs $5 and $x$", r"costs \$5 and $x$"),
        (":class:`torch.nn.Linear`", "`Linear`"),
        ("see arXiv:1904.09237", "see [arXiv:1904.09237](https://arxiv.org/abs/1904.09237)"),
        ("- not a list", r"\- not a list"),
        ("**bold** and *light*", "**bold** and *light*"),
        (r"$\frac{1}{2$ is broken", r"\$\\frac\{1\}\{2\$ is broken"),
    ],
)
def test_inline_text(text, shown):
    assert docs.inline(text) == shown


@given(st.text(alphabet=st.sampled_from(list("ab_*`$[]<>#:-.1) \n{}|\\&~^!>=\"'")), max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_page_with_closed_fences(text):
    out = docs.to_myst(text)
    opened = None
    for line in out.splitlines():
        ticks = len(line.lstrip()) - len(line.lstrip().lstrip("`"))
        if ticks >= 3 and opened is None:
            opened = ticks
        elif ticks >= 3 and line.strip() == "`" * opened:
            opened = None
    assert opened is None


def test_every_module_of_the_library_can_be_read():
    for path in sorted((Path(docs.__file__).parents[1]).rglob("*.py")):
        module = docs.read(path)
        assert docs.to_myst(module.doc) or not module.doc
        for entry in module.entries:
            docs.to_myst(entry.doc)
            head = entry.signature.removeprefix("class ").split("  # ")[0]
            if entry.kind == "function":
                ast.parse(f"def {head}: ...")


def test_an_example_is_a_script_apart_from_the_text():
    doc = "Title.\n\nText.\n\nExample:\n    import torch\n\n    for i in range(2):\n        print(i)\n\nLater work: none.\n"
    text, script = docs.split_example(doc)
    assert script == "import torch\n\nfor i in range(2):\n    print(i)"
    assert "import" not in text and text.startswith("Title.") and text.endswith("Later work: none.")
    assert docs.split_example("Title.\n\nExample: none.") == ("Title.\n\nExample: none.", "")
