"""The snippets of docs/data.md run, in order, in an empty folder."""

import re
from pathlib import Path


def test_the_snippets_of_the_data_page_run(tmp_path, monkeypatch, capsys):
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), names)
    assert "[True, False, True]" in capsys.readouterr().out.replace("tensor(", "").replace(" ", "").replace(",", ", ")
    assert names["two"].wavelengths.tolist() == [550, 600]
    assert names["values"].mean() < -5
