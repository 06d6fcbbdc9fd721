"""Files that several tests of datasets share."""

import pytest
from data_rows import BLUE, GREEN, RED, encoded


@pytest.fixture
def folder(tmp_path):
    """Return a folder with r.png, g.png and b.png of one colour each."""
    for name, color in (("r", RED), ("g", GREEN), ("b", BLUE)):
        (tmp_path / f"{name}.png").write_bytes(encoded(color))
    return tmp_path
