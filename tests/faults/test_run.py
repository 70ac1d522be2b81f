"""Two runs at once on one folder."""

from harness import artifacts, run, same_results, start, wait_until


def test_second_run_on_a_folder_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    assert wait_until(lambda: artifacts(folder))
    status, _, errors = run(folder)
    assert status == 1
    assert f"{folder}: process {first.pid} on " in errors
    assert "--out" in errors
    with first:
        assert first.communicate()[1] == ""
    assert first.returncode == 0
    assert same_results(folder, undisturbed)
