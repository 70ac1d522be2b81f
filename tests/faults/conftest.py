import pytest
from harness import run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    status, _, errors = run(folder)
    assert status == 0, errors
    return folder
