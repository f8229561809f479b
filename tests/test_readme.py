"""What the README promises runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_of_reuse_runs_and_shows_what_it_says():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True).stdout
    loss, rate = re.fullmatch(r"loss (\S+), learning rate grew to (\S+)\n", out).groups()
    assert float(loss) < 0.65  # a coin's is 0.69
    assert float(rate) > 1e-4


def test_links_to_files_exist():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / link).exists(), link
