"""Checkpoints are checked by their checksums, two are kept, and a folder belongs to one run at a time."""

import contextlib
import errno
import fcntl
import io
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import mmmae
from mmmae import files
from mmmae.files import hold
from mmmae.phantom import Phantom
from mmmae.training.checkpoints import LAST, PREVIOUS, WholeCheckpoints, find_checkpoint, read_checkpoint
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings
from tests import permissions

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), target="pixels", aux={})
SETTINGS = PretrainSettings(steps=4, batch=2, warmup=1, checkpoint_every=2)
# The module is loaded from its file, which spares the import of torch.
HOLDS = f"""
import runpy, sys
from pathlib import Path
with runpy.run_path({files.__file__!r})["hold"](Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), out, SETTINGS)
    return out


def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(finished, tmp_path):
    whole = (finished / "checkpoints" / "last.ckpt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        inside = [record for record in archive.infolist() if "/data/" in record.filename]
    broken = tmp_path / "broken.ckpt"
    rng = np.random.default_rng(0)
    for record in rng.choice(inside, 20):
        # A local header is 30 bytes, the name and an extra field, whose length it tells at 28.
        extra = int.from_bytes(whole[record.header_offset + 28 : record.header_offset + 30], "little")
        first = record.header_offset + 30 + len(record.filename) + extra
        place = first + int(rng.integers(record.file_size))
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"no whole checkpoint: {record.filename} is not what was written"):
            read_checkpoint(broken)


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    last, previous = out / "checkpoints" / "last.ckpt", out / "checkpoints" / "previous.ckpt"
    assert read_checkpoint(previous)["run"]["finished"] is False
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(
        UserWarning, match=r"last.ckpt: no whole checkpoint: .* goes on from .*previous.ckpt, after step 4"
    ):
        assert find_checkpoint(out, "auto").path == previous
    last.unlink()  # as a process leaves them that is killed between the renamings
    assert find_checkpoint(out, "auto").path == previous
    last.write_bytes(b"")
    previous.unlink()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        find_checkpoint(out, "auto")


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / LAST).chmod(0)
    with permissions.obeyed(), pytest.raises(PermissionError, match=r"last\.ckpt"):
        find_checkpoint(out, "auto")


def test_a_folder_in_use_is_refused_and_the_owner_is_named(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with subprocess.Popen([sys.executable, "-c", HOLDS, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"{out} is in use by process {owner.pid} on .*, since .*; name another"):
            pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), out, SETTINGS, resume="auto")
        owner.kill()
    pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), out, SETTINGS, resume="auto")  # the owner died without releasing it


def test_the_last_checkpoint_keeps_its_name_until_the_next_is_whole_on_the_disk(tmp_path, monkeypatch):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    files = WholeCheckpoints()
    for step in (1, 2):
        files.save_checkpoint({"step": step}, last)
    before = last.read_bytes(), previous.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.save_checkpoint({"step": 3}, last)
    assert (last.read_bytes(), previous.read_bytes()) == before
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_full_disk_is_an_error_of_the_file(tmp_path):
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, most[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt: can't be written"):
            WholeCheckpoints().save_checkpoint({"weight": torch.zeros(2**15)}, tmp_path / LAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert not list((tmp_path / LAST).parent.iterdir())


def test_there_is_a_last_checkpoint_before_and_after_each_renaming(tmp_path, monkeypatch):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    files, replace = WholeCheckpoints(), os.replace
    files.save_checkpoint({"step": 1}, last)
    renamed = []

    def watched(source, target):
        assert last.exists()
        replace(source, target)
        assert last.exists()
        renamed.append(Path(target).name)

    monkeypatch.setattr(os, "replace", watched)
    files.save_checkpoint({"step": 2}, last)
    assert renamed == ["previous.ckpt", "last.ckpt"]
    assert [torch.load(path, weights_only=True)["step"] for path in (previous, last)] == [1, 2]
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_without_links_the_checkpoint_before_is_kept_all_the_same(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files = WholeCheckpoints()
    for step in (1, 2, 3):
        files.save_checkpoint({"step": step}, tmp_path / LAST)
    assert [torch.load(tmp_path / path, weights_only=True)["step"] for path in (PREVIOUS, LAST)] == [2, 3]


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_that_the_run_goes_on_from(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / LAST).write_bytes(b"damaged")
    whole = (out / PREVIOUS).read_bytes()
    with pytest.warns(UserWarning, match="goes on from"):
        files = WholeCheckpoints(find_checkpoint(out, "auto"))
    files.save_checkpoint({"step": 5}, out / LAST)
    assert (out / PREVIOUS).read_bytes() == whole
    fifth = (out / LAST).read_bytes()
    files.save_checkpoint({"step": 6}, out / LAST)
    assert (out / PREVIOUS).read_bytes() == fifth


def test_either_checkpoint_of_a_folder_can_be_resumed_there_and_no_other(finished, tmp_path):
    for part in (LAST, PREVIOUS):
        assert find_checkpoint(finished, str(finished / part)).path == finished / part
    with pytest.raises(ValueError, match="holds a run already"):
        find_checkpoint(finished, shutil.copy(finished / LAST, tmp_path))


def test_a_run_does_not_go_on_from_a_checkpoint_that_another_run_has_replaced(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    found = find_checkpoint(out, "auto")
    WholeCheckpoints().save_checkpoint(found.content, out / LAST)
    with pytest.raises(ValueError, match=f"{out} was written by another run meanwhile: resume it"):
        pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), out, SETTINGS, resume=found)


def test_a_run_does_not_begin_where_another_has_begun_meanwhile(finished, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def after_another(folder):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        yield

    monkeypatch.setattr("mmmae.training.pretrain.hold", after_another)
    with pytest.raises(ValueError, match="was written by another run meanwhile"):
        pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), tmp_path / "run", SETTINGS)
    assert (tmp_path / "run" / LAST).read_bytes() == (finished / LAST).read_bytes()


def test_a_process_holds_a_folder_once(tmp_path):
    relative = Path(os.path.relpath(tmp_path))
    with hold(tmp_path):
        with pytest.raises(ValueError, match=f"{relative} is in use by this process"), hold(relative):
            pass
        with subprocess.Popen(
            [sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as other:
            assert b"is in use by process" in other.stderr.read()  # the second attempt has not released the first
    with hold(tmp_path):
        pass


def test_an_error_where_there_are_no_locks_is_not_one_of_the_lock(tmp_path, monkeypatch):
    def refuse(opened, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(ValueError, match="of the block") as caught, hold(tmp_path):
        raise ValueError("of the block")
    assert caught.value.__context__ is None
