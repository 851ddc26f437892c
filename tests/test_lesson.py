"""Guards the lesson: its cells run in their order, and the page shows what they gave.

New outputs, in a fresh clone with Jupyter: jupyter nbconvert --to notebook --execute --inplace
--ClearMetadataPreprocessor.enabled=True assets/lesson.ipynb
"""
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import safety
from eval import STYLES, Count, Figure, mark

LESSON = Path(__file__).resolve().parent.parent / "assets" / "lesson.ipynb"
CELLS = json.loads(LESSON.read_text("utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CELLS for output in cell.get("outputs", [])]
TINY = {  # the doses of the test, in the place of the lesson's
    "all parts": ["--size=pico", "--threads=1", "--eval.n=10", "--eval.curve_n=5",
                  "--eval.max_new=4", "--base.rows=100", "--insert.rows=200", "--insert.batch=8",
                  "--insert.lr=1e-2", "--sft.rows=100", "--relearn.n=5"],
    "part 1": ["--name=1", "--base.steps=0", "--insert.steps=40"],
    "part 3": ["--sft.steps=4", "--sft.at=0,4"],
    "part 4": ["--rl.reward=rule", "--ppo.iterations=1", "--ppo.rollouts=8", "--ppo.minibatch=8",
               "--rl.at=0,1"],
    "sharp": ["--name=sharp", "--insert.steps=40", "--red.proposals=10", "--red.samples=2",
              "--red.rounds=2", "--adversarial.steps=2", "--adversarial.at=0,2"],
    "part 6": ["--name=6", "--sft.lr=1e-2", "--sft.at=", "--relearn.most=1"],
    "game": ["--name=game", "--insert.steps=4"],
}


def test_every_cell_runs_in_its_order_at_tiny_doses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(safety, "PROPOSER", replace(safety.PROPOSER, steps=1, rows=24))
    monkeypatch.setattr(safety, "IMITATION", replace(safety.IMITATION, steps=1))
    names = {"__name__": "__main__"}
    for source in SOURCES:
        exec(compile(source, LESSON.name, "exec"), names)
        if source.startswith("DOSES"):
            assert names["DOSES"].keys() == TINY.keys()
            names["DOSES"] = TINY
    printed = capsys.readouterr().out
    assert printed.count("You said") == 6
    assert names["same"].item() == pytest.approx(names["by_hand"].item(), abs=1e-6)


def test_code_cells_are_plain_python_on_lines_that_fit_the_page():
    for source in SOURCES:
        assert "IPython" not in source and "get_ipython" not in source
        for line in source.split("\n"):
            assert not line.lstrip().startswith(("%", "!")) and len(line) <= 100, line


def test_the_page_is_small_and_shows_every_result():
    assert LESSON.stat().st_size < 1_000_000
    text = "".join("".join(output.get("text", "")) for output in OUTPUTS)
    assert text.count("You said") == 6
    figures = [output["data"]["image/svg+xml"] for output in OUTPUTS if "data" in output]
    assert len(figures) == len(re.findall(r"^Figure\(", "\n".join(SOURCES), re.MULTILINE))
    for figure in figures:
        ElementTree.fromstring("".join(figure))


def test_the_page_holds_nothing_of_the_machine_that_ran_it():
    for cell in CELLS:
        assert cell["metadata"] == {}
    for output in OUTPUTS:
        assert output["output_type"] in ("stream", "execute_result")  # no error
        assert output.get("name") != "stderr"  # no warning and no progress bar
        text = json.dumps(output)
        assert not re.search(r"/(home|root|tmp|usr|opt|mnt|work|content|Users)/|[A-Z]:\\|0x", text)


def test_a_figure_of_a_notebook_brings_its_colours_along():
    series = {name: {0: mark([Count(0, 9)]), 5: mark([Count(4, 9)])} for name in STYLES}
    drawing = Figure("A < B", series, "updates")._repr_svg_()
    ElementTree.fromstring(drawing)
    assert "class=" not in drawing
    # Each series has a line in the legend and in the drawing, its intervals, and two points.
    assert drawing.count('="currentColor"') == 5 * len(STYLES)
