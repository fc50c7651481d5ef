"""Five thousand random ENVI and TIFF files of each kind, with other seeds than the default tests'."""

import pytest

from tests.data.raster_files import DRAWS, misread


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_random_file_is_read_exactly_or_refused(tmp_path, kind):
    assert [wrong for seed in range(1000, 6000) if (wrong := misread(kind, tmp_path / "files", seed))] == []
