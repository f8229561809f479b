"""Build the book: fetch the data that the chapters name, execute what changed, build the site.

python -m dlatlas.book.build --profile quick
"""

from __future__ import annotations

import argparse
import sys
import time

from dlatlas import catalog, data
from dlatlas.book import execute, site


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 0 only when every chapter stands and the site was built without a warning."""
    parser = argparse.ArgumentParser(prog="python -m dlatlas.book.build", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--jobs", type=int, help="chapters at a time (default: one per core)")
    options = parser.parse_args(arguments)
    root = catalog.repository()
    if root is None:
        print("dlatlas: the book is not part of an installed package; run this in a checkout of the repository", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        data.fetch_all(execute.needed_data(root))
        outcomes = execute.run(root, profile=options.profile, jobs=options.jobs)
    except (data.DataError, execute.ChapterError) as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished chapters are kept, the next `make book` goes on from here", file=sys.stderr)
        return 130
    print(execute.summary(outcomes))
    if any(outcome.status == "failed" for outcome in outcomes):
        print("the site was not built: mend the failed chapters first", file=sys.stderr)
        return 1
    try:
        index = site.build(root, options.profile)
    except site.SiteError as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 1
    print(f"done in {time.perf_counter() - start:.0f} s. Open {index.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
