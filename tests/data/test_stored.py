"""A cache and shards return the stored samples bit by bit, or name the damaged file."""

import json
import os
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmmae.data import CachedSubjects, PairedFolder, ShardedSubjects, collate, write_cache, write_shards
from mmmae.data.store import cache
from mmmae.data.store.shards import sample_of
from mmmae.phantom import Phantom, write_phantom

WRITERS = {"cache": (write_cache, CachedSubjects), "shards": (partial(write_shards, per_shard=2), ShardedSubjects)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five subjects of 12 bands, some without an image."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, subjects=5, image_size=24, missing=0.4)
    return PairedFolder(folder / "hsi", {"ir": folder / "ir", "af": folder / "af"}, image_size=16)


@pytest.fixture(params=list(WRITERS))
def stored(request, data, tmp_path):
    write, read = WRITERS[request.param]
    return read(write(data, tmp_path / request.param))


def equal(one, other):
    tensors = [(one.hsi, other.hsi), (one.valid, other.valid)]
    tensors += [(one.aux[name], other.aux[name]) for name in one.aux]
    return one.name == other.name and one.aux.keys() == other.aux.keys() and all(torch.equal(*pair) for pair in tensors)


def test_samples_are_those_of_the_folder_bit_by_bit(data, stored):
    assert len(stored) == len(data) == 5
    assert stored.names == data.names
    assert all(equal(stored[index], data[index]) for index in range(5))
    assert {name for index in range(5) for name in data[index].aux} == {"ir", "af"}
    assert any(len(data[index].aux) < 2 for index in range(5))


def test_what_the_data_set_says_of_itself_is_kept(data, stored):
    assert stored.bands == 12
    assert stored.modalities == data.modalities
    assert stored.normalization == data.normalization
    assert stored.image_size == (16, 16)
    assert torch.equal(stored.wavelengths, data.wavelengths)
    assert stored.positions == []
    assert "5 subjects" in repr(stored)


def test_two_workers_give_what_the_main_process_gives(stored):
    load = partial(DataLoader, stored, batch_size=2, collate_fn=partial(collate, modalities=stored.modalities))
    for alone, worked in zip(load(), load(num_workers=2), strict=True):
        assert alone.names == worked.names
        assert torch.equal(alone.hsi, worked.hsi)
        assert alone.present.keys() == worked.present.keys()


def test_workers_that_write_change_nothing(data, tmp_path):
    for name, (write, read) in WRITERS.items():
        made = read(write(data, tmp_path / name, workers=2))
        assert all(equal(made[index], data[index]) for index in range(5))


def test_only_the_asked_images_are_read(stored):
    few = type(stored)(stored.folder, ["af"])
    assert few.modalities == {"af": 1}
    assert all(set(few[index].aux) <= {"af"} for index in range(5))
    with pytest.raises(ValueError, match=r"no modality \['uv'\]; it has \['ir', 'af'\]"):
        type(stored)(stored.folder, ["uv"])


def test_tiles_keep_their_positions(data, tmp_path):
    tiles = PairedFolder(data.folder, tile=16, overlap=8)
    for name, (write, read) in WRITERS.items():
        assert read(write(tiles, tmp_path / name)).positions == tiles.positions


def test_generated_subjects_can_be_stored(tmp_path):
    data = Phantom(length=3, image_size=16, bands=3)
    for name, (write, read) in WRITERS.items():
        made = read(write(data, tmp_path / name))
        assert all(equal(made[index], data[index]) for index in range(3))


def test_a_flipped_bit_is_refused_with_the_path(stored):
    path = max(stored.folder.rglob("*.[st]a[fr]*"))
    content = bytearray(path.read_bytes())
    offset = json.loads((stored.folder / "index.json").read_text())["subjects"][-1].get("offset", 0)
    header = int.from_bytes(content[offset : offset + 8], "little")
    content[offset + 8 + header + 40] ^= 1
    path.write_bytes(content)
    again = type(stored)(stored.folder)
    again[0]
    with pytest.raises(ValueError, match=rf"{path.name}: is damaged: .* is not what was written"):
        again[4]


def test_a_truncated_or_missing_file_is_refused_at_construction(stored):
    path = max(stored.folder.rglob("*.[st]a[fr]*"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 8])
    with pytest.raises(ValueError, match=rf"{path.name}: has {len(content) // 8} bytes, expected"):
        type(stored)(stored.folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}: is missing"):
        type(stored)(stored.folder)


def test_a_file_whose_header_is_damaged_is_refused_with_the_path(stored):
    path = max(stored.folder.rglob("*.[st]a[fr]*"))
    offset = json.loads((stored.folder / "index.json").read_text())["subjects"][-1].get("offset", 0)
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: is damaged"):
        type(stored)(stored.folder)[4]


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "mmmae-%s-1"}'])
def test_a_damaged_index_is_refused_with_its_path(stored, text):
    index = stored.folder / "index.json"
    index.write_text(text % stored.folder.name if "%" in text else text)
    with pytest.raises(ValueError, match=r"index\.json: (is damaged|has the format)"):
        type(stored)(stored.folder)


def test_a_folder_that_is_neither_is_not_found(tmp_path):
    for _, read in WRITERS.values():
        with pytest.raises(FileNotFoundError, match=r"index\.json: no such file"):
            read(tmp_path)


def test_a_folder_with_something_in_it_is_refused(data, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for write, _ in WRITERS.values():
        with pytest.raises(ValueError, match="is not empty"):
            write(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def interrupt(monkeypatch):
    """Fail at the third file of a cache."""
    written = []

    def save(tensors, path, metadata):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        original(tensors, path, metadata)

    original = cache.save_file
    monkeypatch.setattr(cache, "save_file", save)
    return written


def test_a_cache_that_was_interrupted_goes_on(data, tmp_path, interrupt, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        write_cache(data, tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        CachedSubjects(tmp_path / "cache")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(first) == 2
    monkeypatch.undo()
    (tmp_path / "cache" / "0000" / ".0000002.safetensors.x.partial").write_bytes(b"killed while it was written")
    left = []
    made = CachedSubjects(write_cache(data, tmp_path / "cache", track=lambda numbers: left.extend(numbers) or numbers))
    assert left == [2, 3, 4]
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert all(equal(made[index], data[index]) for index in range(5))
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert names == {"index.json", *(f"{index:07d}.safetensors" for index in range(5))}


def test_the_beginning_of_another_cache_is_refused(data, tmp_path, interrupt):
    with pytest.raises(KeyboardInterrupt):
        write_cache(data, tmp_path / "cache")
    other = PairedFolder(data.folder, image_size=8)
    with pytest.raises(ValueError, match=r"holds a cache of other data, with other .*height, width"):
        write_cache(other, tmp_path / "cache")


def test_a_whole_cache_is_not_written_again(data, tmp_path):
    folder = write_cache(data, tmp_path / "cache")
    before = (folder / "index.json").stat().st_mtime_ns
    assert write_cache(data, folder, track=lambda _: pytest.fail("writes again")) == folder
    assert (folder / "index.json").stat().st_mtime_ns == before


def test_the_command_given_again_mends_a_cache(data, tmp_path):
    folder = write_cache(data, tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    paths = sorted(folder.rglob("*.safetensors"))
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(before[1][:-9])
    paths[2].write_bytes(before[2][:-1] + bytes([before[2][-1] ^ 1]))
    paths[3].write_bytes(before[4])  # whole, but of another subject
    left = []
    write_cache(data, folder, track=lambda numbers: left.extend(numbers) or numbers)
    assert left == [0, 1, 2, 3]
    assert [path.read_bytes() for path in paths] == before
    assert json.loads((folder / "index.json").read_text()) == index
    assert not (folder / "unfinished.json").exists()


def test_a_file_that_was_damaged_after_an_interruption_is_written_again(data, tmp_path, interrupt, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        write_cache(data, tmp_path / "cache")
    monkeypatch.undo()
    path = tmp_path / "cache" / "0000" / "0000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    made = CachedSubjects(write_cache(data, tmp_path / "cache"))
    assert path.read_bytes() == content
    assert equal(made[1], data[1])


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_of_files_that_have_changed_is_refused(tmp_path, interrupt, monkeypatch, write_raster, finished):
    (tmp_path / "hsi").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        write_raster(tmp_path / "hsi" / f"{name}.img", rng.normal(size=(3, 16, 16)).astype(np.float32))
    statistics = PairedFolder(tmp_path / "hsi").normalization
    data = PairedFolder(tmp_path / "hsi", normalization=statistics)
    if finished:
        monkeypatch.undo()
        write_cache(data, tmp_path / "cache")
    else:
        with pytest.raises(KeyboardInterrupt):
            write_cache(data, tmp_path / "cache")
    (tmp_path / "hsi" / "b.img").write_bytes(rng.normal(size=(3, 16, 16)).astype(np.float32).tobytes())
    with pytest.raises(ValueError, match="holds a cache of other data, with other source_files"):
        write_cache(data, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry["crc32"].pop("hsi"), "KeyError 'hsi'"),
        (lambda entry: entry.pop("crc32"), "KeyError 'crc32'"),
        (lambda entry: entry.pop("bytes"), "KeyError 'bytes'"),
        (lambda entry: entry["crc32"].update(valid="x"), "has the entry 'x'"),
        (lambda entry: entry.update(file="../../secret"), "expected a path within the folder"),
        (lambda entry: entry.update(file="/etc/passwd"), "expected a path within the folder"),
        (lambda entry: entry.update(file=3), "TypeError"),
        (lambda entry: entry.update(name="../../x"), "named '../../x', expected a name that a file can have"),
        (lambda entry: entry.update(name="/x"), "expected a name that a file can have"),
        (lambda entry: entry.update(position=["..", 0, 0, 8, 8]), "expected a name that a file can have"),
    ],
)
def test_a_damaged_entry_of_the_index_is_refused(stored, change, message):
    index = json.loads((stored.folder / "index.json").read_text())
    change(index["subjects"][1])
    (stored.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json: is damaged: .*{message}"):
        type(stored)(stored.folder)


def test_shards_that_fail_leave_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_shards(data, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_shards_can_not_hold_is_told_before_files_are_read(tmp_path, monkeypatch):
    (tmp_path / "hsi").mkdir()
    path = tmp_path / "hsi" / "\udcff.npy"  # the byte 0xff
    np.save(path, np.random.default_rng(0).random((3, 4, 4)))
    subjects = PairedFolder(tmp_path / "hsi")
    assert CachedSubjects(write_cache(subjects, tmp_path / "cache")).names == ["\udcff"]
    monkeypatch.setattr(PairedFolder, "__getitem__", lambda *arguments: pytest.fail("a file was read"))
    with pytest.raises(ValueError, match=f"^{path}: its name is not UTF-8"):
        write_shards(subjects, tmp_path / "shards")


def test_shards_are_as_long_as_asked_and_hold_no_pickles(data, tmp_path):
    folder = write_shards(data, tmp_path / "100% of it", per_shard=2)
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"shard-00000{number}.tar" for number in range(3)]
    suffixes = set()
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as archive:
            suffixes |= {name.split(".", 1)[1] for name in archive.getnames()}
    assert suffixes == {"safetensors", "txt"}
    with pytest.raises(ValueError, match="0 a shard"):
        write_shards(data, tmp_path / "none", per_shard=0)


def test_webdataset_streams_the_shards(data, tmp_path):
    from webdataset import WebDataset

    folder = write_shards(data, tmp_path / "shards", per_shard=3)
    stream = WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).map(sample_of)
    for index, sample in enumerate(stream):
        assert equal(sample, data[index])
    assert index == 4


def test_shards_without_webdataset_say_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"pip install 'mmmae\[shards\]'"):
        write_shards(data, tmp_path / "shards")


def test_real_scenes_come_back_bit_by_bit(scenes, tmp_path):
    data = PairedFolder(scenes / "S2L2A", {"VV": f"{scenes}/S1RTC:0", "DEM": scenes / "DEM"}, tile=112, image_size=64)
    for name, (write, read) in WRITERS.items():
        made = read(write(data, tmp_path / name))
        assert all(equal(made[index], data[index]) for index in range(0, len(data), 7))
        np.testing.assert_equal(made.positions, data.positions)
