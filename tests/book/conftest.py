"""A small book with one chapter, executed and built for real, for the tests of the site."""

import shutil
from pathlib import Path

import pytest

from dlatlas.book import execute, ledger, site

ROOT = Path(__file__).parents[2]
CHAPTER = "gans/critics"
TEXT = r"""---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
dlatlas:
  question: "Does the machinery work?"
  prerequisites: [theory/optimizers]
---
(ch-gans-critics)=
# Critics

```{code-cell} ipython3
:tags: [parameters]
profile = "quick"
seed = 0
```

(miyato2018spectral)=
## Spectral normalisation

```{paper} miyato2018spectral
```

The largest singular value $\sigma(W)$ bounds the slope {cite}`miyato2018spectral`:

$$\|f\|_{\mathrm{Lip}} \le \prod_l \sigma(W_l).$$

```{code-cell} ipython3
from dlatlas import plot
from dlatlas.claims import claim, glue

fig, ax = plot.figure()
plot.curves(ax, {"a line": [0, 1, 2]}, xlabel="x", ylabel="y")
plot.show(fig, alt="A line that rises from zero to two")
plot.table([{"method": "one", "error": [0.1, 0.2]}, {"method": "two", "error": [0.3, 0.5]}], caption="Errors", name="side-by-side")
glue(product=2 * 2)
```

```{code-cell} ipython3
claim("miyato2018spectral", "Twice two is four, not five", criterion="product == 4", product=2 * 2, null=dict(product=5))
```

The product is {glue:text}`product`.

````{exercise}
:label: ex-gans-critics-1
Multiply.
````

```{solution-start} ex-gans-critics-1
:class: dropdown
```

```{code-cell} ipython3
3 * 3
```

```{solution-end}
```
"""


@pytest.fixture(scope="session")
def small_book(tmp_path_factory):
    """Root of a checkout with one chapter, executed."""
    root = tmp_path_factory.mktemp("book")
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns("results"))
    path = root / "chapters" / f"{CHAPTER}.md"
    path.parent.mkdir(parents=True)
    path.write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "missing", lambda chapter, rows: [])
        (outcome,) = execute.run(root, jobs=1, say=lambda line: None)
    assert outcome.status == "ran", outcome.error
    return root


@pytest.fixture(scope="session")
def small_site(small_book):
    """Folder of the built site of the small book."""
    return site.build(small_book).parent
