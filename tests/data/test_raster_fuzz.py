"""Random ENVI and TIFF files are read exactly or, if they are cut short, refused; see raster_files.py."""

import pytest

from tests.data.raster_files import DRAWS, misread


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_random_file_is_read_exactly_or_refused(tmp_path, kind):
    assert [wrong for seed in range(25) if (wrong := misread(kind, tmp_path / "files", seed))] == []
