"""The command line, as a newcomer types it."""

import subprocess
import sys

import pytest

from dlatlas.__main__ import main


def test_list_search_and_show(capsys):
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 425
    assert main(["list", "theory/optimizers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert main(["search", "AMSGrad"]) == 0
    assert "reddi2018amsgrad" in capsys.readouterr().out
    for name in ("reddi2018amsgrad", "6", "AMSGrad"):
        assert main(["show", name]) == 0
        out = capsys.readouterr().out
        assert "On the Convergence of Adam and Beyond" in out and "dlatlas.theory.amsgrad" in out and "@inproceedings" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "thoery"], "no part or chapter 'thoery'"),
        (["search", "no", "such", "words"], "nothing found"),
        (["show", "reddi2018amsgard"], "did you mean reddi2018amsgrad"),
        (["data", "nmist"], "mnist"),
        (["run", "theory/optimisers"], "no such chapter"),
    ],
)
def test_mistakes_are_explained_and_fail(arguments, message, capsys):
    assert main(arguments) != 0
    assert message in capsys.readouterr().err


def test_data_lists_every_set_with_its_licence(capsys):
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    for name in ("mnist", "fashion-mnist", "usps", "digits", "photos", "brown", "bible-kjv"):
        assert name in out
    assert "cache:" in out


def test_the_module_runs_and_importing_the_package_is_light():
    out = subprocess.run([sys.executable, "-m", "dlatlas", "--version"], capture_output=True, text=True, check=True).stdout
    assert out.startswith("dlatlas ")
    code = "import sys, dlatlas, dlatlas.catalog, dlatlas.__main__; print('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
