"""The experiment on real scenes runs, and goes on where it was stopped."""

import json
import sys

import torch

from tests.training.test_land_cover import data, land_cover  # noqa: F401  fixtures


def test_a_quick_run_measures_each_method_once(land_cover, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    methods = ["random forest", "logistic regression", "tiny scratch", "tiny pretrained"]
    command = ["land_cover.py", "--data", str(data), "--out", str(tmp_path), "--quick", "--threads", "1"]
    command += ["--seeds", "0", "--methods"]
    threads = torch.get_num_threads()
    try:
        for some in (methods[:1], methods, methods):
            monkeypatch.setattr(sys, "argv", [*command, *some])
            land_cover.main()
    finally:
        torch.set_num_threads(threads)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(land_cover.key(result)[:2] for result in results) == sorted(
        (method, share) for method in methods for share in ("few", "all")
    )
    pixels = 224 * 224  # of the scene that is held out, each of which has a label and counts once
    assert {torch.tensor(result["confusion"]).sum().item() for result in results} == {pixels}
    assert "| few | tiny pretrained |" in capsys.readouterr().out
    assert (tmp_path / "pretraining" / "tiny-0" / "encoder" / "model.safetensors").is_file()
