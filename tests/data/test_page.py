"""The blocks of docs/data.md run, in order, in an empty folder."""

import re
import shlex
from pathlib import Path

from mmmae.cli import main


def test_the_blocks_of_the_data_page_run(tmp_path, monkeypatch, capsys):
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    blocks = re.findall(r"```(python|sh)\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 13
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
            continue
        for line in text.splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    assert "tensor([ True, False,  True])" in printed
    assert "scene1@0,24" in printed
    assert names["two"].wavelengths.tolist() == [550, 600]
    assert names["values"].mean() < -5
    assert names["maps"]["scene1"].shape == (12, 64, 64)
    assert names["cached"].names == names["sharded"].names
