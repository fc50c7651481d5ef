"""A data set of one's own needs names, bands and `__getitem__`, and serves wherever those of the package do."""

import pickle

import pytest
import torch

import mmmae
from mmmae.data import CachedSubjects, PairedFolder, Sample, ShardedSubjects, Subjects, write_cache, write_shards
from mmmae.phantom import Phantom, write_phantom
from mmmae.training.inference.encode import encode
from mmmae.training.inference.reconstruct import reconstruct


class Noise(Subjects):
    bands = 12

    def __init__(self):
        self.names = ["first", "second"]

    def __getitem__(self, index):
        noise = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(index))
        return Sample(self.names[index], noise, {}, torch.ones(32, 32, dtype=torch.bool))


def test_what_is_left_out_has_a_default():
    noise = Noise()
    assert len(noise) == 2
    assert dict(noise.modalities) == noise.files(0) == {}
    assert noise.wavelengths is None
    assert list(noise.positions) == []
    cube = noise[0].hsi[0]
    assert torch.equal(noise.normalization.apply("hsi", cube), cube)
    assert torch.equal(noise.normalization.invert("hsi", cube), cube)
    assert pickle.loads(pickle.dumps(noise))[1].name == "second"  # as workers that do not fork get it


def test_a_class_without_samples_is_refused():
    class Nothing(Subjects):
        names, bands = ("first",), 12

    with pytest.raises(TypeError, match="abstract method"):
        Nothing()


def test_a_data_set_of_ones_own_can_be_stored_encoded_and_reconstructed(tmp_path):
    noise = Noise()
    for write, read in ((write_cache, CachedSubjects), (write_shards, ShardedSubjects)):
        stored = read(write(noise, tmp_path / read.__name__))
        assert stored.names == noise.names
        assert torch.equal(stored[1].hsi, noise[1].hsi)
    model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux={}, target="pixels")
    assert encode(model.hsi_encoder(), noise, tmp_path / "features.npz") == (2, 64)
    rows = reconstruct(model, noise, tmp_path / "pictures", first=1)
    assert {row["wavelength_nm"] for row in rows} == {""}
    assert all(row["rmse"] == row["rmse_normalised"] for row in rows)  # values are in their own units


def test_the_data_sets_of_the_package_are_subjects(tmp_path):
    write_phantom(tmp_path / "eyes", 2, 16)
    folder = PairedFolder(tmp_path / "eyes" / "hsi")
    cache = CachedSubjects(write_cache(folder, tmp_path / "cache"))
    for subjects in (folder, cache, Phantom(2, 16)):
        assert isinstance(subjects, Subjects)
        assert len(subjects) == len(subjects.names) == 2
        assert subjects.wavelengths.shape == (subjects.bands,)
    assert folder.files(1)["hsi"].is_file()
