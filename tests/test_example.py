"""The example in docs/ runs without changes."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "docs" / "example.py"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLE))
    assert (tmp_path / "survival.png").stat().st_size > 10_000
    # What the example says of its last lines is true of them.
    ranked, result = names["ranked"], names["result"]
    assert sum(o.counts["lost"] for o in ranked.outcomes) <= sum(o.counts["lost"] for o in result.outcomes)
    assert "torch.Size([2, 1, 20, 9])" in capsys.readouterr().out
