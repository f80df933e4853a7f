"""train.sbatch with several GPUs and several nodes: each task knows its place, has a folder, hears of a stop, and all
end as the run does."""

import signal
import socket
import subprocess
import time

import pytest
from stand_ins import PATIENCE_SECONDS, Desk, bash

TWO = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n1,n2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
    "OMP_NUM_THREADS": "",
}


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.clear()


def tasks_of(desk):
    return [call for call in (desk.folder / "calls").read_text().splitlines() if call.startswith("srun ")]


def test_the_gpus_of_one_node_are_the_processes_of_one_task(desk):
    desk.start(SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="32", OMP_NUM_THREADS="")
    seen = desk.seen()

    assert (seen["JOB_GPUS"], seen["OMP_NUM_THREADS"]) == ("4", "8")
    assert not {"JOB_NODES", "JOB_NODE_RANK", "JOB_RENDEZVOUS"} & seen.keys()
    (task,) = tasks_of(desk)
    assert task.startswith(
        "srun --nodes=1 --ntasks=1 --cpus-per-task=32 --input=none --kill-on-bad-exit=1 --export=ALL"
    )


@pytest.mark.parametrize("gpus", [{}, {"SLURM_GPUS_ON_NODE": "1"}, {"SLURM_GPUS_ON_NODE": "0"}])
def test_with_one_node_and_one_gpu_nothing_is_said_of_others(desk, gpus):
    """Nor is what another job was given that this one was submitted from."""
    desk.start(**gpus, SLURM_JOB_NUM_NODES="1", JOB_NODES="4", JOB_NODE_RANK="2")

    assert not {"JOB_GPUS", "JOB_NODES", "JOB_NODE_RANK", "JOB_RENDEZVOUS"} & desk.seen().keys()
    assert "bash -c" not in tasks_of(desk)[0]


def test_fewer_processes_than_gpus_can_be_asked_for(desk):
    desk.start(SLURM_GPUS_ON_NODE="4", JOB_GPUS="2", SLURM_CPUS_PER_TASK="32", OMP_NUM_THREADS="")

    assert (desk.seen()["JOB_GPUS"], desk.seen()["OMP_NUM_THREADS"]) == ("2", "16")


def test_each_node_has_a_task_that_knows_which_it_is_and_where_all_meet(desk):
    done = desk.start("--set", "a.b='c d'", **TWO)
    first, second = desk.seen(0), desk.seen(1)

    assert done.code == 0, done.said
    for seen in (first, second):
        assert (seen["JOB_NODES"], seen["JOB_GPUS"], seen["OMP_NUM_THREADS"]) == ("2", "4", "8")
        assert seen["JOB_RENDEZVOUS"] == f"{socket.gethostname()}:29507"  # n1 is no name of this network
        assert seen["JOB_GRACE_SECONDS"] == "120"
    assert (first["JOB_NODE_RANK"], second["JOB_NODE_RANK"]) == ("0", "1")
    assert (desk.folder / "arguments").read_text().splitlines()[-2:] == ["--set", "a.b='c d'"]
    _folders, task = tasks_of(desk)
    words = task.split(" ")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=180"} <= {*words}


def test_a_name_of_the_first_node_that_the_network_knows_is_taken(desk):
    desk.start(**TWO | {"SLURM_JOB_NODELIST": "localhost,n2", "SLURM_JOB_ID": "4007"})

    assert desk.seen(1)["JOB_RENDEZVOUS"] == "localhost:29507"


def test_where_they_meet_can_be_chosen(desk):
    desk.start(**TWO, JOB_RENDEZVOUS="n1-ib:2000")

    assert desk.seen(1)["JOB_RENDEZVOUS"] == "n1-ib:2000"


def test_each_node_has_a_folder_of_its_own_below_the_same_path_and_nothing_of_it_is_left(desk):
    """The path may lie on a disk that all nodes see."""
    desk.behave('touch "$JOB_WORKDIR/file" && mkdir -p "$HF_HOME" && exit 0')
    done = desk.start(**TWO)
    first, second = desk.seen(0), desk.seen(1)
    scratch = f"{desk.folder}/scratch/qlora-job-7"

    assert done.code == 0, done.said
    for name in ("JOB_WORKDIR", "TMPDIR"):
        assert (first[name], second[name]) == (scratch, f"{scratch}/node-1")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "JOB_OUTCOME_FILE"):
        assert second[name] == first[name].replace(scratch, f"{scratch}/node-1"), name
    assert list((desk.folder / "scratch").iterdir()) == []


def test_a_work_folder_of_the_user_s_own_is_not_shared_by_nodes(desk):
    desk.start(**TWO, JOB_WORKDIR="/big")

    assert [desk.seen(n)["JOB_WORKDIR"] for n in range(2)] == ["/big", "/big/node-1"]


def test_without_room_for_a_folder_on_each_node_nothing_is_started(desk):
    (desk.folder / "refuse-mkdir").touch()
    done = desk.start(**TWO)

    assert done.code == 74
    assert "cannot be made on each node" in done.said
    assert not (desk.folder / "environment0").exists()
    assert done.requeued == ["7"]


SAVES = (
    "trap 'stop=1' USR2; touch $DESK/up$JOB_NODE_RANK; until [[ -n ${stop:-} ]]; do read -r -t 0.1 <> <(:); done; "
    "touch $DESK/saved$JOB_NODE_RANK; exit 75"
)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_request_to_stop_reaches_the_job_on_every_node(desk, number):
    desk.behave(SAVES)
    running = desk.begin(**TWO)
    end = time.monotonic() + PATIENCE_SECONDS
    while not all((desk.folder / f"up{n}").exists() for n in range(2)):
        assert time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(number)

    assert running.wait(PATIENCE_SECONDS) == 75
    assert all((desk.folder / f"saved{n}").exists() for n in range(2))
    assert desk.calls() == ["scontrol requeue 7"]
    assert list((desk.folder / "scratch").iterdir()) == []


@pytest.mark.parametrize(("first", "second"), [(0, 70), (75, 81), (81, 70), (70, 137)])
def test_the_exit_code_is_that_of_the_run_which_the_first_node_has(desk, first, second):
    """srun's is the highest of all. The other node is gone first, on a disk that both see."""
    gone = "until [[ ! -e $JOB_WORKDIR/node-1 && -e $DESK/gone ]]; do sleep 0.02; done"
    say = f'echo \'{{"state": "ended", "code": {first}, "reason": "x"}}\' > "$JOB_OUTCOME_FILE"'
    desk.behave(f"[[ $JOB_NODE_RANK == 1 ]] && {{ touch $DESK/gone; exit {second}; }}; {gone}; {say}; exit {first}")

    assert desk.start(**TWO).code == first


def test_where_the_first_node_left_no_word_the_exit_code_is_srun_s(desk):
    desk.behave('[[ $JOB_NODE_RANK == 1 ]] && exit 69; echo \'{"state": "running"}\' > "$JOB_OUTCOME_FILE"; exit 1')

    assert desk.start(**TWO).code == 69


@pytest.mark.parametrize(
    ("reason", "node"), [("no GPU is visible", "n1"), ("rank 3: sick", "n1"), ("rank 5: sick", "n2")]
)
def test_after_82_the_node_of_the_process_that_is_named_is_avoided(desk, reason, node):
    desk.behave("exit 82", outcome={"state": "ended", "code": 82, "reason": reason})
    desk.nodes("n1", "n2", "n3")
    done = desk.start(**TWO)

    assert done.calls[-1] == f"scontrol update JobId=7 ExcNodeList={node}"


def test_as_many_nodes_are_left_as_the_job_needs(desk):
    desk.behave("exit 82", outcome={"state": "ended", "code": 82, "reason": "rank 5: sick"})
    done = desk.start(**TWO)

    assert done.calls[-1] == "scontrol requeue 7"
    assert "n2 is not excluded: without it fewer than 2 nodes are left in gpu" in done.said


def test_in_a_container_of_apptainer_each_node_has_its_own_home(desk):
    desk.behave('printf "%s\\n" "$@" > "$DESK/arguments$JOB_NODE_RANK"; exit 0')
    done = desk.start(**TWO, QLORA_RUNTIME="apptainer", QLORA_IMAGE="/x.sif")
    scratch = f"{desk.folder}/scratch/qlora-job-7"

    assert done.code == 0, done.said
    for node, folder in enumerate([scratch, f"{scratch}/node-1"]):
        words = (desk.folder / f"arguments{node}").read_text().splitlines()
        assert words[words.index("--home") + 1] == f"{folder}:/work"
    seen = desk.seen()  # of whichever wrote it last
    assert seen["APPTAINERENV_JOB_NODE_RANK"] == seen["JOB_NODE_RANK"]
    assert (seen["APPTAINERENV_JOB_NODES"], seen["APPTAINERENV_JOB_OUTCOME_FILE"]) == ("2", "/work/outcome.json")


def test_in_a_container_of_pyxis_the_task_s_own_folder_is_below_the_image_s():
    words = bash(
        "QLORA_RUNTIME=pyxis QLORA_IMAGE=x JOB_WORKDIR= nodes=2 scratch=/s state=/p recipe_folder=/p;"
        "settle_environment; "
        'build_command run r.yaml; spread; printf \'%s\\0\' "${launch[@]}" "${program[@]}"'
    ).split("\0")[:-1]

    assert any(word.startswith("--container-mounts=/s:/work,") for word in words)
    after = words[words.index("node") :]
    assert after == ["node", "/work", "", "/opt/venv/bin/python", "/app/entrypoint.py", "run", "r.yaml"]


def test_the_task_of_a_node_needs_nothing_but_its_own_text():
    """In a container there is no other."""
    words = bash("scratch=/s own_work=; program=(true); spread; printf '%s\\0' \"${program[@]}\"").split("\0")[:-1]
    done = subprocess.run(words, env={"SLURM_NODEID": "0", "PATH": "/usr/bin:/bin"}, capture_output=True, check=True)

    assert done.stdout + done.stderr == b""
