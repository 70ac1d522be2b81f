"""Units of work on this machine and on a Dask cluster: all done, in spite of those that fail, hang or die."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import units
import yaml
from dask import config
from dask_cluster import DaskCluster
from distributed.security import Security
from small import small_study
from units import Item, lines, wait_until

from datawall.engine import cluster, disk, forkserver, processes
from datawall.engine.cluster import Need, UnitsFailedError, run_units
from datawall.study.study import Study

TESTS = Path(__file__).parent
FIVE = [Item(f"good_{i}") for i in range(5)]


# Workers are ready at once; where a test switches that off, they start from scratch.
pytestmark = pytest.mark.usefixtures("forks")


@pytest.fixture
def study(tmp_path):
    def make(**changes):
        return small_study(tmp_path, **{"workers": 2, **changes})

    return make


@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory):
    with closing(DaskCluster(tmp_path_factory.mktemp("dask"))) as started:
        yield started


@pytest.fixture(params=["here", "dask"])
def executor(request):
    return "local" if request.param == "here" else request.getfixturevalue("dask_cluster").address


def process_ids(folder, items):
    return {int(line.split()[0]) for item in items for line in lines(folder, item)}


def gone(pid):
    """Whether a process ends, or has ended, soon."""
    ended = lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # noqa: E731
    return wait_until(ended, 10)


def test_each_unit_is_done_once_in_another_process(executor, study):
    given = study(executor=executor)
    run_units(given, units.succeed, FIVE, "test")
    assert [len(lines(given.folder, item)) for item in FIVE] == [1] * 5
    assert not list(given.folder.glob(".*"))
    pids = process_ids(given.folder, FIVE)
    assert len(pids) <= 2
    assert os.getpid() not in pids
    assert executor != "local" or all(gone(pid) for pid in pids)  # those beside Dask's workers wait for more


def test_nothing_to_do_starts_nothing(study, monkeypatch):
    monkeypatch.setattr(processes, "Worker", None)
    run_units(study(), units.succeed, [], "test")


def test_units_have_one_thread_and_no_gpu_where_there_is_none(study, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    monkeypatch.setenv(forkserver.ADDRESS, "off")
    item = Item("one")
    run_units(study(), units.tell_circumstances, [item], "test")
    assert lines(study().folder, item)[0].split(maxsplit=2)[2] == "None [1] False"


def test_longest_unit_begins_first(study):
    items = [Item(str(seconds), seconds) for seconds in (1, 3, 2)]
    run_units(study(workers=1), units.succeed, items, "test", lambda study, item: Need(seconds=item.value))
    begun = {item.value: float(lines(study().folder, item)[0].split()[1]) for item in items}
    assert begun[3] < begun[2] < begun[1]


BAD = {
    "raises": "raises 0: ValueError: it is no good",
    "dies": "dies 0: its process died (signal SIGKILL); perhaps memory ran out",
    "hangs": "hangs 0: stopped after 3 seconds, the time limit of a unit",
    "exhausts_memory": "exhausts_memory 0: MemoryError:",
}
MIXED = [Item(name) for name in ("good_1", *BAD, "good_2", "good_3")]


def test_units_that_fail_are_reported_when_the_others_are_done(executor, study):
    given = study(executor=executor, time_limit=3.0)
    with pytest.raises(UnitsFailedError, match="4 of 7 units of test failed 2 times each") as raised:
        run_units(given, units.misbehave, MIXED, "test")
    assert all(message in str(raised.value) for message in BAD.values()), raised.value
    assert [len(lines(given.folder, item)) for item in MIXED] == [1, 2, 2, 2, 2, 1, 1]
    for line in lines(given.folder, Item("hangs")):  # with what it had started
        assert gone(int(line.split()[2]))


def test_units_that_fail_once_are_done_in_the_end(study):
    items = [Item("raises"), Item("dies"), Item("good")]
    run_units(study(), units.misbehave_once, items, "test")
    assert [len(lines(study().folder, item)) for item in items] == [2, 2, 1]


def test_one_worker_is_this_very_process(study):
    given = study(workers=1, time_limit=1.0)
    items = [Item("good"), Item("raises"), Item("sleeps")]
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UnitsFailedError, match="2 of 3 units of test failed 2 times each") as raised:
        run_units(given, units.misbehave, items, "test")
    assert BAD["raises"] in str(raised.value)
    assert "sleeps 0: TimeoutError: stopped after 1 seconds" in str(raised.value)
    assert process_ids(given.folder, items) == {os.getpid()}
    assert [len(lines(given.folder, item)) for item in items] == [1, 2, 2]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_message_names_some_of_many(study):
    items = [Item(f"raises_{i}") for i in range(25)]
    with pytest.raises(UnitsFailedError, match="25 of 25 units") as raised:
        run_units(study(retries=0, workers=1), units.misbehave, items, "test")
    assert str(raised.value).count("ValueError") == 20
    assert "and 5 more" in str(raised.value)


@pytest.mark.parametrize(("share", "together"), [(0.4, True), (0.6, False)])
def test_units_run_together_as_far_as_memory_goes_round(share, together, study):
    memory = share * processes.memory_gib()
    pair = [Item("a", 1.5), Item("b", 1.5)]
    run_units(study(), units.pause, pair, "test", lambda study, item: Need(memory_gib=memory))
    spans = [[float(line.split()[1]) for line in lines(study().folder, item)] for item in pair]
    begins, ends = zip(*spans, strict=True)
    assert (min(ends) > max(begins)) == together


def test_gpus_are_dealt_out(study, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    items = [Item(f"pair_{i}", 2) for i in range(2)] + [Item(f"one_{i}", 1) for i in range(3)]
    run_units(study(workers=None), units.tell_gpus, items, "test", lambda study, item: Need(gpus=int(item.value)))
    folder = study().folder
    devices = {item.name: lines(folder, item)[0].split()[2] for item in items}
    assert devices["pair_0"] == devices["pair_1"] == "5,6"
    assert {devices[f"one_{i}"] for i in range(3)} <= {"5", "6", "7"}
    with pytest.raises(ValueError, match="4 GPUs each, and this machine has 3"):
        run_units(study(), units.succeed, items, "test", lambda study, item: Need(gpus=4))


@pytest.mark.parametrize(
    ("given", "gpus"),
    [("", []), ("-1", []), ("No such GPU-5a", []), ("0,-1,1", ["0"]), ("2, GPU-5a,MIG-1", ["2", "GPU-5a", "MIG-1"])],
)
def test_gpus_are_those_that_cuda_sees_or_that_the_driver_lists(given, gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert processes.visible_gpus() == gpus
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = given.replace(",", "\n")  # an error of a broken driver is printed there, too
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert processes.visible_gpus() == gpus


@pytest.mark.parametrize(
    ("mine", "limits", "expected"),
    [
        ("0::/job/step", {"job/memory.max": 2**30, "job/step/memory.max": "max"}, 1),
        ("0::/", {"memory.max": 2**30}, 1),  # of a container, which sees its own group as the whole
        ("0::/of/the/host", {"memory.max": 2**30}, 1),  # or is told where it is, and cannot go there
        ("3:cpu,cpuacct:/b\n4:memory:/a", {"memory/a/memory.limit_in_bytes": 2**29}, 0.5),
        ("", {}, None),
    ],
)
def test_memory_is_that_of_the_smallest_group_around(mine, limits, expected, tmp_path):
    (tmp_path / "cgroup").write_text(mine)
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    of_machine = processes.memory_gib(tmp_path, tmp_path / "nowhere")
    assert of_machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert processes.memory_gib(tmp_path, tmp_path / "cgroup") == (expected or of_machine)


INTERRUPTED = """
import sys
from pathlib import Path
import units
from datawall.engine.cluster import run_units
from small import small_study
study = small_study(Path(sys.argv[1]), executor=sys.argv[2], workers=2)
run_units(study, units.misbehave, [units.Item("hangs_1"), units.Item("hangs_2")], "test")
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(how, executor, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    if how == signal.SIGKILL:  # which `test_forkserver` tries with forks
        environment[forkserver.ADDRESS] = "off"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), executor],
        env=environment,
        stderr=subprocess.DEVNULL,
        # What a shell runs in the background ignores SIGINT, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    hanging = [Item("hangs_1"), Item("hangs_2")]
    assert wait_until(lambda: all(lines(tmp_path, item) for item in hanging), 120)
    pids = {int(word) for item in hanging for word in lines(tmp_path, item)[0].split()[::2]}  # and their children
    assert len(pids) == 4
    process.send_signal(how)
    process.wait(timeout=30)
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("n_gpus", [0, 2])
def test_a_network_on_several_gpus_is_trained_by_torchrun_where_there_are_some(n_gpus, study, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n_gpus))))  # torch finds none of them
    launched, launch = [], Study._launch
    monkeypatch.setattr(Study, "_launch", lambda self, run, n: launched.append(n) or launch(self, run, n))
    small = {"n_layers": 2, "n_embd": 16, "max_length": 32, "batch_size": 8}
    options = {"hyperparameters": {"Geneformer": small}, "gpus": {"Geneformer": 4}, "workers": 1}
    given = study(models=["Geneformer"], steps=4, **options)
    table = given.pretrain()
    assert launched == [2] * (n_gpus > 0)
    assert table[["steps", "samples_seen"]].to_numpy().tolist() == [[4, 32]]
    assert not list((given.folder / "checkpoints").glob("*"))
    assert given.embedding(given.pretraining_runs()[0], given.params.held_out_name).shape[1] == 16
    alone = Study(given.params.model_copy(update={"gpus": {}}), given.folder)
    assert alone.pretrain()["seconds"].tolist() == table["seconds"].tolist()  # is the same unit, and found


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_a_process_of_torchrun_that_was_killed_ends_too(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in first.items():
        monkeypatch.setenv(name, str(value))
    words = [sys.executable, "-m", "datawall.study.together", "tiny", "PretrainedPCA", "random", "100", "0"]
    start = f"import subprocess, time; subprocess.Popen({words}, start_new_session=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", start]) as torchrun:
        assert wait_until(lambda: psutil.Process(torchrun.pid).children())
        (rank,) = psutil.Process(torchrun.pid).children()
        assert wait_until(rank.net_connections)  # it waits for the second
        torchrun.kill()
    assert gone(rank.pid)


# On a Dask cluster


def test_dask_workers_must_share_the_folder_and_the_code(dask_cluster, study, monkeypatch, tmp_path):
    given = study(executor=dask_cluster.address, retries=0)
    for name in ("datawall", "numpy"):
        others = {**cluster._software(), name: "0123"}
        monkeypatch.setattr(cluster, "_software", lambda others=others: others)
        with pytest.raises(UnitsFailedError, match=rf"other code or versions, .*: {name} \S+ in place of 0123; ins"):
            run_units(given, units.succeed, FIVE[:1], "test")
        monkeypatch.undo()
    unmarked = cluster.contextmanager(lambda folder: iter([folder / "nowhere"]))
    monkeypatch.setattr(disk, "temporary_folder", unmarked)
    with pytest.raises(UnitsFailedError, match="storage that all workers share"):
        run_units(given, units.succeed, FIVE[:1], "test")
    assert not lines(tmp_path, FIVE[0])


def test_dask_workers_are_waited_for_deal_their_gpus_out_and_are_lost(study, tmp_path, monkeypatch, caplog):
    def lose_and_add():
        wait_until(lambda: lines(tmp_path, Item("slow")))
        os.killpg(started.workers[0].pid, signal.SIGKILL)
        wait_until(lambda: "no worker is left; waiting for one" in caplog.text)
        started.add_worker()

    need = lambda study, item: Need(gpus=int(item.value))  # noqa: E731
    items = [Item("pair", 2), Item("one_1", 1), Item("one_2", 1), Item("none", 0)]
    with closing(DaskCluster(tmp_path, n_workers=0)) as started:
        given = study(executor=started.address, retries=0)
        monkeypatch.setattr(cluster, "WAIT", 0.5)
        with pytest.raises(ConnectionError, match="no Dask worker came; start some"):
            run_units(given, units.tell_gpus, items, "test", need)
        assert "no worker is there yet; waiting for one, 0.5 seconds at most" in caplog.text
        monkeypatch.undo()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
        started.add_worker("--resources", "GPU=2", threads=2)
        run_units(given, units.tell_gpus_slowly, items, "test", need)
        with pytest.raises(ValueError, match=r"three 3 asks for GPU=3, and no Dask worker declares as much .*GPU=2"):
            run_units(given, units.tell_gpus, [Item("three", 3)], "test", need)
        other = threading.Thread(target=lose_and_add, daemon=True)
        other.start()
        run_units(study(executor=started.address), units.pause, [Item("slow", 2.0)], "test")
        other.join(60)
    assert "a worker is there again" in caplog.text
    assert len(lines(tmp_path, Item("slow"))) == 3  # begun, and done
    devices = {item.name: lines(tmp_path, item)[0].split(maxsplit=2)[2:] for item in items}
    assert devices["pair"] == ["5,6"]
    assert {*devices["one_1"], *devices["one_2"]} == {"5", "6"}
    assert devices["none"] == []


def test_what_a_unit_takes_of_dask_workers():
    def unit(gpus, memory_gib):
        return processes.Job((), None, Item("a"), Need(gpus, memory_gib), None, 0)

    assert cluster._resources(unit(1, 2.0), [{}]) == {}
    assert cluster._resources(unit(1, 2.0), [{}, {"GPU": 1}]) == {"GPU": 1}
    assert cluster._resources(unit(0, 2.0), [{"GPU": 1, "MEMORY": 2**31}]) == {"MEMORY": 2**31}
    with pytest.raises(ValueError, match=r"a 0 asks for GPU=1, MEMORY=2147483648, and no Dask worker"):
        cluster._resources(unit(1, 2.0), [{"GPU": 1, "MEMORY": 1e9}, {"MEMORY": 4e9}])


def written_keys(folder):
    """Dask's settings as `params/CLUSTER.md` has them, with certificates of an authority that is made for them."""
    readme = (TESTS.parent / "params" / "CLUSTER.md").read_text()
    (text,) = re.findall(r"```yaml\n(distributed:.*?)```", readme, re.S)
    keys = Security.temporary()
    folder.mkdir()
    for name, content in {"ca": keys.tls_ca_file, "cert": keys.tls_client_cert, "key": keys.tls_client_key}.items():
        (folder / f"{name}.pem").write_text(content)
        text = text.replace(f" {name}.pem", f" {folder / name}.pem")
    (folder / "distributed.yaml").write_text(text)
    return config.merge(config.config, yaml.safe_load(text))


def test_dask_over_tls_turns_others_away(study, tmp_path, monkeypatch):
    ours, theirs = written_keys(tmp_path / "ours"), written_keys(tmp_path / "theirs")
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "ours"))
    monkeypatch.setenv(forkserver.ADDRESS, "off")
    with config.set(ours):
        started = DaskCluster(tmp_path, "tls", n_workers=1)
    with closing(started):
        with config.set(ours):
            run_units(study(executor=started.address), units.succeed, FIVE, "test")
        assert [len(lines(tmp_path, item)) for item in FIVE] == [1] * 5
        with config.set({**theirs, "distributed.comm.timeouts.connect": "3s"}), pytest.raises(ConnectionError):
            run_units(study(executor=started.address), units.succeed, FIVE, "test")


def test_no_scheduler_is_said_so(study, monkeypatch):
    with config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(ConnectionError, match="no Dask"):
        run_units(study(executor="tcp://127.0.0.1:9"), units.succeed, FIVE, "test")


# The script is copied, since dask-jobqueue deletes it as soon as it is submitted.
SBATCH = 'cp "$1" "$0.$$"\nbash "$0.$$" >"$0.$$.log" 2>&1 & echo "Submitted batch job $!"'
FAKE_SLURM = {"sbatch": SBATCH, "scancel": 'kill "$@"'}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # dask-jobqueue leaves its keys open
def test_slurm_jobs_do_each_unit_once(study, tmp_path, monkeypatch):
    """With programs of Slurm's names that run a job's script here."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    for name, script in FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    given = study(executor="slurm", workers=2)
    job = {"cores": 1, "memory": "1GB", "interface": "lo", "local-directory": str(tmp_path)}
    with config.set({f"jobqueue.slurm.{name}": value for name, value in job.items()}):
        run_units(given, units.succeed, FIVE, "test")
    assert [len(lines(given.folder, item)) for item in FIVE] == [1] * 5
    gc.collect()
