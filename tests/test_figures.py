"""The pictures of README and docs, drawn from a small run. Needs requirements-figures.txt."""
import json

import pytest

from experiments import figures

pytest.importorskip("matplotlib")


def test_pictures_without_a_run(tmp_path):
    for name in ("masks", "recipe", "cache", "example"):
        figures.main([name, "--assets", str(tmp_path)])
        assert (tmp_path / f"{name}.png").stat().st_size > 2000


def test_pictures_of_a_run(small_run, quick_scores, tmp_path):
    for name in ("curves", "fan", "drift"):
        figures.main([name, str(small_run), "--assets", str(tmp_path)])
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
    folder = tmp_path / "table" / "seed0" / "stage2"
    folder.mkdir(parents=True)
    scores = {"quality_error": 0.1, "energy": 0.2, "spread": 0.5}
    (folder / "scores-report.json").write_text(json.dumps(scores))
    figures.main(["front", str(tmp_path / "table"), "--assets", str(tmp_path)])
    assert (tmp_path / "front.png").is_file()
