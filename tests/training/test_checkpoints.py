"""Checkpoints are checked by their checksums, two are kept, and a folder belongs to one run at a time."""

import io
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import mmmae
from mmmae.phantom import Phantom
from mmmae.training.checkpoints import find_checkpoint, read_checkpoint
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), target="pixels", aux={})
SETTINGS = PretrainSettings(steps=4, batch=2, warmup=1, checkpoint_every=2)
HOLDS = """
import sys
from pathlib import Path
from mmmae.files import hold
with hold(Path(sys.argv[1])):
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


def test_a_folder_in_use_is_refused_and_the_owner_is_named(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with subprocess.Popen([sys.executable, "-c", HOLDS, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"{out} is in use by process {owner.pid} on .*, since .*; name another"):
            pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), out, SETTINGS, resume="auto")
        owner.kill()
    pretrain(CONFIG, Phantom(2, 32, 12, aux=[]), out, SETTINGS, resume="auto")  # the owner died without releasing it
