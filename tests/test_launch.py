"""The launchers: what they would run, what they do when it is preempted, and how they refuse what cannot be."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ("local_cluster.sh", "tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch")
COMMAND = ("python", "-m", "svg_jax.train", "--workdir=gs://bucket/run", "--config.model.axes_dims=(4, 2, 2)")
WORKLOAD = ("--cluster", "c", "--workload", "w", "--tpu-type", "v4-8")
SLICE = ("--name", "run", "--zone", "us-west4-a", "--type", "v5litepod-256")


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def dry_run(script: str, *arguments: str) -> list[list[str]]:
    """The words of each command that the script would run."""
    result = launch(script, *arguments)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install -e '.[test]'"
    result = subprocess.run([shellcheck, str(LAUNCH / script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local_cluster.sh", [], "how many processes?"),
        ("local_cluster.sh", ["two", "--", "true"], "N is 'two'"),
        ("local_cluster.sh", ["2"], "which command?"),
        ("local_cluster.sh", ["2", "--devices", "0", "--", "true"], "--devices is '0'"),
        ("local_cluster.sh", ["2", "--devices", "08", "--", "true"], "--devices is '08'"),
        ("local_cluster.sh", ["02", "--", "true"], "N is '02'"),
        ("local_cluster.sh", ["2", "--device", "2", "--", "true"], "unknown option --device"),
        ("local_cluster.sh", ["2", "true"], "'true' comes where -- was expected"),
        ("tpu_vm.sh", [], "what to do?"),
        ("tpu_vm.sh", ["start", *SLICE], "unknown action 'start'"),
        ("tpu_vm.sh", ["run", "--name", "a", "--type", "v4-8", "--", "true"], "needs --name and --zone"),
        ("tpu_vm.sh", ["run", "--name", "a", "--zone", "b", "--", "true"], "needs --type"),
        ("tpu_vm.sh", ["run", "--name", "a", "--zone", "b", "--type", "v9-8", "--", "true"], "'v9-8' is not known"),
        ("tpu_vm.sh", ["run", *SLICE, "--slices", "0", "--", "true"], "--slices is '0'"),
        ("tpu_vm.sh", ["run", *SLICE, "--restarts", "08", "--", "true"], "--restarts is '08'"),
        ("tpu_vm.sh", ["run", *SLICE, "--spot", "--reserved", "--", "true"], "exclude each other"),
        ("tpu_vm.sh", ["run", *SLICE], "which command?"),
        ("gke_xpk.sh", ["--cluster", "c"], "--cluster, --workload and --tpu-type are needed"),
        ("gke_xpk.sh", ["--cluster", "c", "--workload", "w", "--tpu-type", "v4-8"], "which command?"),
        ("gke_xpk.sh", [*WORKLOAD, "--max-restarts", "08", "--", "true"], "--max-restarts is '08'"),
        ("gke_xpk.sh", ["--cluster"], "--cluster needs a value"),
        ("slurm.sbatch", [], "which command?"),
        ("slurm.sbatch", ["true"], "no Slurm job"),
    ],
)
def test_bad_arguments_end_in_one_sentence(script: str, arguments: list[str], message: str) -> None:
    result = launch(script, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_help_says_what_every_option_is(script: str) -> None:
    result = launch(script, "--help")
    assert result.returncode == 0
    assert f"launch/{script}" in result.stdout
    assert "--dry-run" in result.stdout


def test_local_cluster_numbers_the_processes() -> None:
    lines = dry_run("local_cluster.sh", "3", "--devices", "2", "--dry-run", "--", *COMMAND)
    for index, words in enumerate(lines):
        settings = dict(word.split("=", 1) for word in words[:5])
        assert settings["JAX_PROCESS_ID"] == str(index)
        assert settings["JAX_NUM_PROCESSES"] == "3"
        assert settings["JAX_NUM_CPU_DEVICES"] == "2"
        assert settings["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:PORT"
        assert tuple(words[5:]) == COMMAND
    assert len(lines) == 3


def test_local_cluster_says_which_died_and_how_and_starts_again(tmp_path: Path) -> None:
    """The second process fails the first time; the first one would wait for ever."""
    command = (
        f'[ "$JAX_PROCESS_ID" = 0 ] && [ ! -e {tmp_path}/again ] && sleep 600;'
        f'[ "$JAX_PROCESS_ID" = 1 ] && [ ! -e {tmp_path}/again ] && {{ touch {tmp_path}/again; exit 5; }}; exit 0'
    )
    result = launch("local_cluster.sh", "2", "--grace", "0", "--restarts", "1", "--", "bash", "-c", command)
    assert result.returncode == 0
    assert "process 1 of 2 ended with exit code 5" in result.stderr
    assert "starting again (1 of 1)" in result.stderr
    (tmp_path / "again").unlink()
    result = launch("local_cluster.sh", "2", "--grace", "0", "--", "bash", "-c", command)
    assert result.returncode == 5


def test_local_cluster_tells_a_preemption_from_a_failure() -> None:
    result = launch("local_cluster.sh", "2", "--", "bash", "-c", "exit 75")
    assert result.returncode == 75
    result = launch("local_cluster.sh", "2", "--", "bash", "-c", 'exit "$((75 + JAX_PROCESS_ID))"')
    assert result.returncode == 76


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("5", "ended with exit code 5"),
        ("137", "was killed by SIGKILL"),
        ("200", "ended with exit code 200"),
        ("255", "ended with exit code 255"),
    ],
)
def test_local_cluster_takes_only_signals_for_signals(code: str, how: str) -> None:
    result = launch("local_cluster.sh", "1", "--", "bash", "-c", f"exit {code}")
    assert result.returncode == int(code)
    assert result.stderr == f"process 0 of 1 {how}\n"


@pytest.mark.parametrize("slices", [1, 2])
def test_tpu_vm_asks_installs_runs_and_resumes(slices: int) -> None:
    lines = dry_run("tpu_vm.sh", "run", *SLICE, "--spot", "--slices", str(slices), "--dry-run", "--", *COMMAND)
    assert all(words[:3] == ["gcloud", "compute", "tpus"] for words in lines)
    assert all("--zone=us-west4-a" in words for words in lines)
    verbs = [tuple(words[3:5]) for words in lines]
    queued, vm = "queued-resources", "tpu-vm"
    prepare = [(queued, "create"), (queued, "describe"), *[(vm, "scp")] * slices, *[(vm, "ssh")] * 2 * slices]
    watch = [(vm, "ssh"), (vm, "ssh")]  # the log, and the exit code
    again = [(queued, "describe"), (queued, "delete")]
    assert verbs == [(queued, "describe"), *prepare, *watch, *again, *prepare, *watch]

    create = next(words for words in lines if words[4] == "create")
    assert {"--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    nodes = {"--node-count=2", "--node-prefix=run"} if slices == 2 else {"--node-id=run"}
    assert nodes <= set(create)
    (start, *_) = [words[-2] for words in lines if "setsid" in words[-2]]
    script = shlex.split(start.split("bash -c ")[1])[0]  # what bash gets on the worker
    assert shlex.split(script.split("; ")[1]) == list(COMMAND)


def fake(folder: Path, name: str, script: str) -> None:
    """A program of this name that writes its arguments down."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/calls\n{script}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_tpu_vm_goes_on_after_a_preemption_and_ends_with_the_code_of_the_run(tmp_path: Path) -> None:
    """A queued resource that comes, is preempted during the run, and comes again."""
    fake(tmp_path, "sleep", "")
    fake(tmp_path, "git", "")
    fake(
        tmp_path,
        "gcloud",
        f"""
        cd {tmp_path}
        case "$*" in
          *"queued-resources create"*) echo ACTIVE >state ;;
          *"queued-resources delete"*) rm state ;;
          *"queued-resources describe"*) cat state 2>/dev/null || {{ echo NOT_FOUND >&2; exit 1; }} ;;
          *"cat svg_jax_run/run.exit"*)
            if [ -e preempted ]; then echo 3; else touch preempted; echo SUSPENDED >state; exit 255; fi ;;
        esac""",
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=path)
    assert result.returncode == 3
    assert "the first worker does not answer: going on in 30 s" in result.stderr
    done = [line for line in calls(tmp_path) if "queued-resources" in line or "setsid" in line]
    words = [next(word for word in ("create", "delete", "describe", "setsid") if word in line) for line in done]
    assert [word for word in words if word != "describe"] == ["create", "setsid", "delete", "create", "setsid"]


def fake_worker(folder: Path, events: str) -> str:
    """The path with a gcloud for which the slice is there, and `folder` is the home of its first worker.

    What is to run there runs, but for installing, COMMAND, `pkill` and `tail`; SIGTERM ends the run with 75.

    Args:
        folder: Where the programs and the files of the worker stand.
        events: What happens while a terminal follows the run: its n-th time in $n.
    """
    (folder / "svg_jax_run").mkdir()
    (folder / "svg_jax_run" / "run.exit").write_text("0\n")  # of an earlier run
    for name in ("sleep", "git", "pgrep"):
        fake(folder, name, "")
    fake(
        folder,
        "gcloud",
        f"""
        cd {folder}
        for word; do case $word in --command=*) command=${{word#--command=}} ;; esac; done
        case "$*" in
          *"queued-resources describe"*) echo ACTIVE ;;
          *uv*) ;;
          *setsid*) bash -c "${{command%%(setsid*}} true" ;;
          *tail*) n=$(grep -c tail calls); {events} ;;
          *pkill*) echo 75 >svg_jax_run/run.exit ;;
          *ssh*) bash -c "$command" ;;
        esac""",
    )
    return f"{folder}:{os.environ['PATH']}"


def test_tpu_vm_stop_ends_a_run_that_a_terminal_follows(tmp_path: Path) -> None:
    """Stopped from another terminal; the same line then goes on with it, to its end."""
    stop = f"bash {LAUNCH / 'tpu_vm.sh'} stop --name run --zone us-west4-a"
    path = fake_worker(tmp_path, f"if ((n == 1)); then {stop}; else echo 0 >svg_jax_run/run.exit; fi")
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=path)
    assert result.returncode == 75
    assert result.stderr == "the run was stopped: the same line goes on with it\n"
    assert sum("setsid" in call for call in calls(tmp_path)) == 1
    assert (tmp_path / "svg_jax_run" / "run.stopped").exists()
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=path)
    assert result.returncode == 0
    assert not (tmp_path / "svg_jax_run" / "run.stopped").exists()


def test_tpu_vm_stop_holds_in_the_pause_before_a_restart_too(tmp_path: Path) -> None:
    path = fake_worker(tmp_path, "echo 75 >svg_jax_run/run.exit")
    fake(tmp_path, "sleep", f"echo stopped >{tmp_path}/svg_jax_run/run.stopped")
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=path)
    assert result.returncode == 75
    assert sum("setsid" in call for call in calls(tmp_path)) == 1


def test_tpu_vm_pauses_before_it_starts_a_preempted_run_again(tmp_path: Path) -> None:
    """A notice of maintenance that stands: the run ends with 75 as soon as it has started, three times."""
    path = fake_worker(tmp_path, "echo $((n > 3 ? 0 : 75)) >svg_jax_run/run.exit")
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=path)
    assert result.returncode == 0
    assert result.stderr == "the run was preempted: going on in 30 s\n" * 3
    words = [call.split()[0] if "setsid" not in call else "start" for call in calls(tmp_path)]
    assert [word for word in words if word in ("start", "sleep")] == ["start", *["sleep", "start"] * 3]


@pytest.mark.parametrize(
    ("describe", "create", "message"),
    [
        ("UNAUTHENTICATED: no login", "", "error: cannot ask for the state of slice run"),
        ("NOT_FOUND: no slice", "RESOURCE_EXHAUSTED: no quota", "error: cannot create slice run"),
    ],
)
def test_tpu_vm_ends_when_gcloud_refuses(tmp_path: Path, describe: str, create: str, message: str) -> None:
    fake(tmp_path, "sleep", "")
    fake(
        tmp_path,
        "gcloud",
        f"""case "$*" in *describe*) echo "{describe}" ;; *create*) echo "{create}" ;; esac >&2; exit 1""",
    )
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2
    assert result.stderr == f"{create or describe}\n{message} (gcloud's message stands above)\n"
    assert not any("sleep" in call for call in calls(tmp_path))


def test_tpu_vm_ends_when_the_slice_fails_again_and_again(tmp_path: Path) -> None:
    fake(tmp_path, "sleep", "")
    fake(tmp_path, "gcloud", 'case "$*" in *describe*) echo FAILED ;; esac')
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: slice run was made 3 times and failed")
    assert sum(" create " in call for call in calls(tmp_path)) == 3


@pytest.mark.parametrize(("broken", "code"), [(9, 0), (99, 2)])
def test_tpu_vm_bears_with_a_network_that_fails_for_a_while(tmp_path: Path, broken: int, code: int) -> None:
    """The network fails after a preemption: `describe` fails `broken` times in a row."""
    path = fake_worker(tmp_path, "echo $((n == 1 ? 75 : 0)) >svg_jax_run/run.exit")
    (tmp_path / "gcloud").rename(tmp_path / "working")
    (tmp_path / "gcloud").write_text(f"""#!/bin/bash
        case "$*" in *describe*)
          echo >>{tmp_path}/asked
          n=$(wc -l <{tmp_path}/asked)
          ((n == 1 || n > 1 + {broken})) || {{ echo "UNAVAILABLE: no network" >&2; exit 1; }} ;;
        esac
        exec {tmp_path}/working "$@" """)
    (tmp_path / "gcloud").chmod(0o755)
    result = launch("tpu_vm.sh", "run", *SLICE, "--", *COMMAND, PATH=path)
    assert result.returncode == code
    assert result.stderr.count("UNAVAILABLE") == min(broken, 11)
    assert ("error: cannot ask for the state of slice run" in result.stderr) == (code == 2)


def test_gke_restarts_a_preempted_run() -> None:
    (words,) = dry_run(
        "gke_xpk.sh", "--cluster", "c", "--workload", "w", "--tpu-type", "v5litepod-256", "--num-slices", "2",
        "--docker-image", "image", "--project", "p", "--dry-run", "--", *COMMAND,
    )  # fmt: skip
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--cluster=c", "--workload=w", "--tpu-type=v5litepod-256", "--num-slices=2", "--docker-image=image",
        "--max-restarts=10", "--restart-on-user-code-failure", "--termination-grace-period-seconds=120", "--project=p",
    } <= set(words)  # fmt: skip
    assert shlex.split(words[-1].removeprefix("--command=")) == ["exec", *COMMAND]  # so that SIGTERM reaches it


def test_gke_installs_the_working_tree_where_no_image_is_given() -> None:
    (words,) = dry_run("gke_xpk.sh", *WORKLOAD, "--dry-run", "--", *COMMAND)
    assert f"--script-dir={LAUNCH.parent}" in words
    assert words[-1].startswith("--command=pip install -e '.[tpu]' && exec python -m svg_jax.train")


def test_slurm_runs_one_process_a_gpu() -> None:
    result = launch("slurm.sbatch", "--dry-run", *COMMAND)
    options = {line.removeprefix("#SBATCH ") for line in result.stdout.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@120"} <= options
    srun, requeue = (line for line in result.stdout.splitlines() if not line.startswith("#SBATCH"))
    assert shlex.split(srun) == ["srun", "--kill-on-bad-exit=0", "--label", *COMMAND]
    assert requeue.startswith("scontrol requeue JOB")


@pytest.mark.parametrize(
    ("code", "restarted", "requeued"), [(0, 0, False), (75, 9, True), (69, 2, True), (69, 3, False)]
)
def test_slurm_queues_a_preempted_run_again(tmp_path: Path, code: int, restarted: int, requeued: bool) -> None:
    fake(tmp_path, "srun", f"exit {code}")
    fake(tmp_path, "scontrol", "")
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = launch("slurm.sbatch", "true", PATH=path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarted))
    assert result.returncode == code
    assert ("scontrol requeue 7" in calls(tmp_path)) == requeued


def test_slurm_refuses_a_number_of_restarts_that_is_none() -> None:
    result = launch("slurm.sbatch", "--dry-run", "true", RESTARTS="08")
    assert result.returncode == 2
    assert result.stderr == "error: RESTARTS is '08': it must be a whole number from 0 on\n"
