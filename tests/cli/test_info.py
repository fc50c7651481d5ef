"""`mmmae info`: what it says of this machine, of GPUs, and of machines that are not here."""

import re
from types import SimpleNamespace

import pytest
import torch

from mmmae.cli import main
from mmmae_kernels.attention.op import BACKENDS
from mmmae_kernels.gpu import architecture


def test_info_names_each_op_and_each_reason(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "patch_embed", "random_masking", "attention", "sdpa", "eager", "serves"):
        assert word in printed


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("sm_80:fp16", "flash_attn_2"),
        ("sm_90:bf16", "flash_attn_4"),
        ("sm_100:bf16", "flash_attn_4"),
        ("gfx942:bf16", "flash_attn_2"),
        ("cpu:fp32", "native"),
        ("sm_75:fp32:80", "sdpa"),
        ("sm_120:fp32", "torch_efficient"),
        ("cpu:fp16", "torch_cpu"),
    ],
)
def test_info_names_the_attention_of_another_machine_and_why_not_the_others(capsys, target, chosen):
    assert main(["info", "--for", target]) == 0
    answers = dict(re.findall(r"^│ (\w+) +│ (.+?) +│$", capsys.readouterr().out, re.MULTILINE))
    assert list(answers) == list(BACKENDS)
    assert [name for name, answer in answers.items() if answer.startswith("chosen")] == [chosen]
    assert all(len(answer) > 10 for name, answer in answers.items() if name != chosen)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sm_90", "--for is 'sm_90', expected TARGET:DTYPE"),
        ("h100:bf16", "--for has the target 'h100', expected cpu, sm_80"),
        ("sm_90:int8", "--for has the type 'int8', must be one of fp32, fp16, bf16, fp64"),
        ("sm_90:bf16:0", "--for has the head width '0', expected a whole number >= 1"),
    ],
)
def test_info_for_an_unknown_machine_says_what_is_known(capsys, target, message):
    assert main(["info", "--for", target]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "attention", "kernels"),
    [
        (
            "sm_60:fp16",
            "chosen; the memory-efficient kernel, where",
            "PyTorch's code, because Triton kernels need compute capability",
        ),
        (
            "sm_70:fp16",
            "chosen; the memory-efficient kernel, where",
            "PyTorch's code, because Triton kernels need compute capability",
        ),
        (
            "sm_75:bf16",
            "chosen; plain products",
            "PyTorch's code, because Triton kernels need compute capability 8.0 or above",
        ),
        ("sm_80:fp16:264", "chosen; the memory-efficient kernel", "Triton kernels, launch tables of ampere"),
        (
            "sm_103:bf16",
            "serves, but flash_attn_4 comes first; cuDNN's kernel",
            "Triton kernels, launch tables of hopper",
        ),
        (
            "gfx950:bf16",
            "serves, but flash_attn_2 comes first; the flash kernel",
            "PyTorch's code, because Triton kernels are",
        ),
    ],
)
def test_info_says_of_another_gpu_which_kernels_run_there(capsys, target, attention, kernels):
    assert main(["info", "--for", target]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"│ sdpa │ {attention}" in printed
    assert f"other ops on {target.split(':')[0]}: {kernels}" in printed


@pytest.mark.parametrize(
    ("tuned", "said"), [("0", "off: launches use the first config of their tables"), ("1", "on: 2 results in")]
)
def test_info_says_of_each_gpu_here_whether_kernels_run_on_it_and_are_tuned(capsys, monkeypatch, tmp_path, tuned, said):
    properties = [
        SimpleNamespace(name="T4", major=7, minor=5, total_memory=15 << 30),
        SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 << 30),
    ]
    architecture._architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda number: (properties[number].major, properties[number].minor)
    )
    monkeypatch.setenv("MMMAE_AUTOTUNE", tuned)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mmmae" / "autotune").mkdir(parents=True)
    for name in ("a.json", "b.json"):
        (tmp_path / "mmmae" / "autotune" / name).write_text("")
    try:
        assert main(["info"]) == 0
    finally:
        architecture._architecture.cache_clear()
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "T4, capability 7.5, 15 GiB PyTorch's code, because Triton kernels need compute capability 8.0 or above"
        in printed
    )
    assert "H100, capability 9.0, 80 GiB Triton kernels, launch tables of hopper" in printed
    assert f"autotuning {said}" in printed
    assert ", 3.6 or newer is needed for GPU kernels" in printed
