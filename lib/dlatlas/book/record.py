"""Record what other seeds and the full profile give: book/results/seeds.json and book/results/full/<part>/<chapter>.json.

    python -m dlatlas.book.record seeds --seeds 0 1 2 3 4 [part/chapter ...]
    python -m dlatlas.book.record full [part/chapter ...]

These records are the only generated files that are kept in git. Chapters that are not named keep their record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlatlas import catalog
from dlatlas.book import execute, ledger
from dlatlas.book.execute import ChapterError, Outcome, write_atomically


def seeds(root: Path, chapters: Sequence[str], numbers: Sequence[int], jobs: int | None = None) -> list[Outcome]:
    """Execute the chapters on each seed and record how often each claim held. Drifted verdicts are the result, not a failure."""
    outcomes: list[Outcome] = []
    for seed in numbers:
        print(f"seed {seed}")
        out = root / "_build" / "seeds" / str(seed)
        outcomes += execute.run(root, chapters, seed=seed, out=out, jobs=jobs, allow_drift=True)
    record = read_seeds(root)
    record["profile"] = "quick"
    by_chapter: dict[str, dict[str, Any]] = {}
    for outcome, seed in zip(outcomes, [s for s in numbers for _ in range(len(outcomes) // len(numbers))]):
        if outcome.status == "failed":
            continue
        entry = by_chapter.setdefault(outcome.chapter, {"seeds": [], "versions": execute.versions(), "claims": {}})
        entry["seeds"].append(seed)
        for row in outcome.claims:
            known = entry["claims"].setdefault(
                row["id"], {"key": row["key"], "text": row["text"], "expected": row["expected"], "holds": []}
            )
            known["holds"].append(row["holds"])
    order = {chapter: i for i, chapter in enumerate(catalog.chapters())}
    record["chapters"] = dict(sorted((record.get("chapters", {}) | by_chapter).items(), key=lambda item: order[item[0]]))
    write_atomically(root / "book/results/seeds.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for chapter, entry in by_chapter.items():
        for claim in entry["claims"].values():
            held = sum(claim["holds"])
            if claim["expected"] != (held == len(claim["holds"])):
                print(f"{chapter}: held on {held} of {len(claim['holds'])} seeds: {claim['text']}")
    return outcomes


def read_seeds(root: Path) -> dict[str, Any]:
    """The recorded seeds, or an empty record."""
    path = root / "book/results/seeds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def full(root: Path, chapters: Sequence[str], jobs: int | None = None) -> list[Outcome]:
    """Execute the chapters in the full profile and record their claims with device, versions and seconds."""
    outcomes = execute.run(root, chapters, profile="full", jobs=jobs or 1, timeout=7200, allow_drift=True)
    for outcome in outcomes:
        if outcome.status == "failed":
            continue
        meta = ledger.load(root / "_build/full/src/chapters" / f"{outcome.chapter}.ipynb")["metadata"]["dlatlas"]
        keep = ("id", "key", "text", "criterion", "values", "null", "holds", "expected", "why", "reported")
        record = {
            "device": meta["used"]["device"],
            "versions": meta["versions"],
            "seconds": meta["seconds"],
            "seed": meta["parameters"]["seed"],
            "commit": meta["commit"],
            "date": meta["date"],
            "claims": [{name: row[name] for name in keep} for row in outcome.claims],
        }
        write_atomically(root / "book/results/full" / f"{outcome.chapter}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 0 only when every chapter ran to its end."""
    parser = argparse.ArgumentParser(prog="python -m dlatlas.book.record", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("seeds", "full"))
    parser.add_argument("chapters", nargs="*", metavar="part/chapter")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int)
    options = parser.parse_intermixed_args(arguments)
    root = catalog.repository()
    if root is None:
        print("dlatlas: run this in a checkout of the repository", file=sys.stderr)
        return 2
    try:
        if options.what == "seeds":
            outcomes = seeds(root, options.chapters, options.seeds, options.jobs)
        else:
            outcomes = full(root, options.chapters, options.jobs)
    except ChapterError as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 2
    print(execute.summary(outcomes))
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
