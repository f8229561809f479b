"""Command line: list and search the papers, show one, fetch data, execute chapters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from dlatlas import __version__, catalog


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``dlatlas`` and ``python -m dlatlas``; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="dlatlas", description="The Deep Learning Atlas: every method of ICLR 2018.")
    parser.add_argument("--version", action="version", version=f"dlatlas {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    listing = commands.add_parser("list", help="list the papers, of one part or chapter if named")
    listing.add_argument("where", nargs="?", help="a part (theory) or a chapter (theory/optimizers)")
    listing.add_argument("--built", action="store_true", help="only methods that the library has")

    searching = commands.add_parser("search", help="find papers by method, title, author or key")
    searching.add_argument("words", nargs="+")

    showing = commands.add_parser("show", help="show one paper: links, module, chapter, BibTeX")
    showing.add_argument("key", help="key (reddi2018amsgrad), number (6) or method (AMSGrad)")

    data = commands.add_parser("data", help="list the data sets, or fetch those named")
    data.add_argument("names", nargs="*", metavar="name", help="data sets to fetch; 'all' for every one")

    commands.add_parser("run", help="execute chapters (options: see `dlatlas run --help`)", add_help=False)

    if arguments[:1] == ["run"]:  # the runner parses its own options
        from dlatlas.book import execute

        return execute.main(arguments[1:])
    options = parser.parse_args(arguments)
    return {"list": _list, "search": _search, "show": _show, "data": _data}[options.command](options)


def _list(options: argparse.Namespace) -> int:
    where = options.where
    if where and where not in catalog.parts() and where not in catalog.chapters():
        print(f"no part or chapter {where!r}; parts: {', '.join(catalog.parts())}", file=sys.stderr)
        return 1
    rows = [p for p in catalog.papers().values() if not where or where in (p.part, p.chapter)]
    _print_rows(p for p in rows if p.implemented or not options.built)
    return 0


def _search(options: argparse.Namespace) -> int:
    rows = catalog.search(" ".join(options.words))
    if not rows:
        print(f"nothing found for {' '.join(options.words)!r}", file=sys.stderr)
        return 1
    _print_rows(rows)
    return 0


def _show(options: argparse.Namespace) -> int:
    wanted = options.key
    row = catalog.papers().get(wanted) or next((p for p in catalog.papers().values() if str(p.number) == wanted), None)
    if row is None:
        found = catalog.search(wanted)
        if len(found) != 1:
            print(f"no paper {wanted!r}{catalog.suggestion(wanted)}", file=sys.stderr)
            _print_rows(found[:10], file=sys.stderr)
            return 1
        row = found[0]
    print(f"{row.title}\n{', '.join(row.authors)}. ICLR 2018 (paper {row.number})\n")
    print(f"method   {row.method}\nchapter  {row.chapter}\nmodule   {row.module}{'' if row.implemented else ' (not built yet)'}")
    for name, address in row.links.items():
        print(f"{name:8} {address}")
    print(f"\n{row.bibtex}", end="")
    return 0


def _data(options: argparse.Namespace) -> int:
    from dlatlas import data

    if not options.names:
        for name in data.NAMES:
            print(data.describe(name))
        print(f"cache: {data.cache_dir()}")
        return 0
    try:
        data.fetch_all(list(data.NAMES) if options.names == ["all"] else options.names)
    except (data.DataError, ValueError) as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 1
    return 0


def _print_rows(rows: Iterable[catalog.Paper], file=None) -> None:
    for row in rows:
        print(f"{row.number:4}  {row.key:28} {'built' if row.implemented else '':6} {row.chapter:30} {row.method}", file=file)


if __name__ == "__main__":
    sys.exit(main())
