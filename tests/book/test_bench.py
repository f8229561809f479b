"""The speed tables."""

from dlatlas.book import bench


def test_the_machinery_is_measured_and_the_processor_named():
    (caption, rows), *_ = bench.machinery()
    assert caption == "Start of a chapter"
    seconds = {row["step"]: row["seconds"] for row in rows}
    assert all(0 < value < 120 for value in seconds.values())
    assert len(seconds) == 3
    assert bench.processor()


def test_parts_offer_tables(monkeypatch, capsys):
    monkeypatch.setattr(bench, "machinery", lambda: iter([("Start", [{"step": "a", "seconds": 1.5}])]))
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("one thread")
    assert "Start\nstep  seconds\na     1.5" in out
