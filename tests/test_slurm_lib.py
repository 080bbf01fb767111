"""Shell functions of the job scripts, with substitutes for Slurm's commands. `tests/slurm` runs them on a cluster."""

import signal
from pathlib import Path

import pytest

from tests.runs import ROOT
from tests.slurm_commands import run, write_command

USER_ERROR = """
from pipeline.common.errors import UserError, exit_cleanly
def main():
    raise UserError("no such file")
exit_cleanly(main)
"""


@pytest.mark.parametrize("killed", ["", "1"], ids=["all ranks fail", "others are killed"])
def test_finish_ends_job_after_user_error_of_one_rank(tmp_path: Path, killed: str) -> None:
    (tmp_path / "main.py").write_text(USER_ERROR)
    script = """set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh
status=0; on_one_rank python main.py || status=$?; finish "$status" """
    result = run(tmp_path, script, KILLED=killed)
    assert (result.returncode, result.stderr) == (2, "error: no such file\n")
    assert not (tmp_path / "log").exists() and not list(tmp_path.glob("slurm-x-7.*"))


def test_finish_requeues_killed_rank_without_user_error(tmp_path: Path) -> None:
    """A requeue may end the job script at once, so the message comes first."""
    script = """set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh
status=0; on_one_rank true || status=$?; finish "$status" """
    (tmp_path / "slurm-x-7.user_error").touch()  # left by an earlier start of the job
    result = run(tmp_path, script, KILLED="1")
    assert (tmp_path / "log").read_text() == "requeued\n"
    assert result.returncode == -signal.SIGKILL and result.stderr == "job 7 ended with status 137: requeue\n"


@pytest.mark.parametrize("unavailable", ["2", "8"], ids=["at first", "until the requeue"])
def test_finish_requeues_although_controller_does_not_answer_at_first(tmp_path: Path, unavailable: str) -> None:
    script = "set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh; finish 75"
    result = run(tmp_path, script, UNAVAILABLE=unavailable, SCONTROL_RETRY_SECONDS="0")
    assert result.returncode == -signal.SIGKILL and (tmp_path / "log").read_text() == "requeued\n", result.stderr
    assert (tmp_path / "failures").read_text() == f"{unavailable}\n"


def test_finish_gives_up_if_controller_never_answers(tmp_path: Path) -> None:
    script = "set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh; finish 75"
    result = run(tmp_path, script, UNAVAILABLE="100", SCONTROL_RETRY_SECONDS="0")
    assert result.returncode == 75 and "could not be requeued; submit it again" in result.stderr


@pytest.mark.parametrize(("answer", "exports"), [("yes", 0), ("no", 1)])
def test_evaluate_keeps_export_of_begun_evaluation(tmp_path: Path, answer: str, exports: int) -> None:
    """The interpreter is a probe that answers --can_resume; tests of the evaluation check the answers."""
    for name in ("hf", "checkpoint-6", "generations.partial"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "bin").mkdir()
    probe = """#!/bin/bash\necho "$*" >>calls\ncase "$*" in *--can_resume) echo "$ANSWER" ;; esac\n"""
    (tmp_path / "bin" / "python").write_text(probe)
    (tmp_path / "bin" / "python").chmod(0o755)
    script = "bash slurm/evaluate.sh --batch_size 4"
    result = run(tmp_path, script, ANSWER=answer, RUN="run", DATA="data.jsonl")
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text()
    evaluation = "-m pipeline.evaluation --model run/hf --data data.jsonl --output run --batch_size 4"
    assert f"{evaluation} --can_resume\n" in calls and f"{evaluation} --allow_stale true\n" in calls
    assert calls.count("-m pipeline.export") == exports


@pytest.mark.parametrize(
    ("variables", "status"), [({}, 2), ({"SLURM_GPUS_ON_NODE": "1"}, 0), ({"DS_ACCELERATOR": "cpu"}, 0)]
)
def test_need_gpus_refuses_cpus_of_a_node_with_gpus(tmp_path: Path, variables: dict[str, str], status: int) -> None:
    (tmp_path / "nvidia0").touch()
    script = 'set -euo pipefail; unset DS_ACCELERATOR; eval "$SET"; SRUN_ARGS=(); source slurm/lib.sh; need_gpus'
    setting = "; ".join(f"export {name}={value}" for name, value in variables.items())
    result = run(tmp_path, script, GPU_DEVICES=f"{tmp_path}/nvidia[0-9]*", SET=setting)
    assert result.returncode == status, result.stderr
    assert ("submit with --gpus-per-node" in result.stderr) == bool(status)


@pytest.mark.parametrize(("answers", "status"), [("answers.jsonl", 2), ("", 0)])
def test_compare_runs_models_on_gpus_only(tmp_path: Path, answers: str, status: int) -> None:
    """Without ANSWERS, no model runs."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").touch()
    variables = {"OUTPUT": "study", "ANSWERS": answers, "GPU_DEVICES": f"{tmp_path}/nvidia[0-9]*"}
    write_command(tmp_path, "python", "true")
    result = run(tmp_path, "unset DS_ACCELERATOR; bash slurm/compare.sh", **variables)
    assert result.returncode == status, result.stderr
    assert ("submit with --gpus-per-node" in result.stderr) == bool(status)


def test_train_adds_chosen_arguments(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/bash\necho "$*" >>calls\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "sft.args").write_text("--training.learning_rate\n1e-05\n")
    script = "bash slurm/train.sh --seed 2"
    result = run(tmp_path, script, RECIPE="recipe.yaml", CHOICE="sft.args", DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr
    expected = "pipeline/train.py --config recipe.yaml --seed 2 --training.learning_rate 1e-05\n"
    assert expected in (tmp_path / "calls").read_text()
    result = run(tmp_path, script, RECIPE="recipe.yaml", CHOICE="none.args", DS_ACCELERATOR="cpu")
    assert result.returncode == 2 and "none.args: no such file; slurm/choose.sh writes it" in result.stderr


NO_GPUS = "NumTasks=1 CPUs/Task=1 NtasksPerN:B:S:C=0:0:*:* JOB_GRES=(null) MinMemoryCPU=1G"
ALL_SET = "ArrayJobId=3 ArrayTaskId=1 NumTasks=4 NtasksPerN:B:S:C=4:0:*:* JOB_GRES=gpu:2 MinMemoryCPU=1G"


@pytest.mark.parametrize(
    ("facts", "kept"), [(NO_GPUS, []), (ALL_SET, ["array 3_1", "gpus 2", "tasks 4", "per node 4"]), ("", None)]
)
def test_lib_drops_variables_of_job_in_which_sbatch_was_called(
    tmp_path: Path, facts: str, kept: list[str] | None
) -> None:
    """Without an answer of the controller, they stay."""
    write_command(
        tmp_path, "scontrol", f'[[ $* == *"show job"* ]] && {{ [ "{facts}" ] && echo "JobId=7 {facts}"; exit; }}'
    )
    inherited = {"ARRAY_JOB_ID": "3", "ARRAY_TASK_ID": "1", "GPUS_ON_NODE": "2", "NTASKS": "4", "NTASKS_PER_NODE": "4"}
    script = """set -euo pipefail; SRUN_ARGS=(); source <(sed '/^drop_variables_of_other_job$/q' slurm/lib.sh)
echo "${SLURM_ARRAY_JOB_ID:+array ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"; echo "${SLURM_GPUS_ON_NODE:+gpus 2}"
echo "${SLURM_NTASKS:+tasks 4}"; echo "${SLURM_NTASKS_PER_NODE:+per node 4}" """
    result = run(tmp_path, script, **{f"SLURM_{name}": value for name, value in inherited.items()})
    assert result.returncode == 0, result.stderr
    expected = ["array 3_1", "gpus 2", "tasks 4", "per node 4"] if kept is None else kept
    assert [line for line in result.stdout.splitlines() if line] == expected


def test_steps_do_not_inherit_options_of_job(tmp_path: Path) -> None:
    names = "NTASKS_PER_GPU CPUS_PER_GPU GPUS TRES_PER_TASK EXPORT_ENV NTASKS_PER_NODE GPUS_PER_TASK CPUS_PER_TASK "
    names += "MEM_PER_CPU MEM_PER_GPU MEM_PER_NODE"
    script = "set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh; on_one_rank env"
    result = run(tmp_path, script, **{f"SLURM_{name}": "1" for name in names.split()})
    assert result.returncode == 0 and "SLURM_JOB_ID=7" in result.stdout, result.stderr
    assert not [name for name in names.split() if f"SLURM_{name}=" in result.stdout]


def test_step_on_one_node_asks_for_gpus_of_that_node(tmp_path: Path) -> None:
    """Slurm refuses a step on one node that asks for the total of the job (`sbatch --gpus=4`)."""
    write_command(tmp_path, "srun", 'echo "$*" >>steps')
    script = "set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh; on_one_rank true"
    for gpus, flag in ((None, ""), ("2", " --gpus-per-node=2")):
        result = run(tmp_path, script, SLURM_GPUS="4", **({} if gpus is None else {"SLURM_GPUS_ON_NODE": gpus}))
        assert result.returncode == 0, result.stderr
        step = (tmp_path / "steps").read_text().splitlines()[-1]
        assert step.endswith(f"--nodes=1 --ntasks=1 --mpi=none{flag} --cpus-per-task=2 true")


@pytest.mark.parametrize(("cpus", "per_rank"), [("8,4", "2"), ("4(x2),8", "2"), ("8(x3)", "4"), ("8,1", "1")])
def test_ranks_get_the_cpus_of_the_node_with_the_fewest(tmp_path: Path, cpus: str, per_rank: str) -> None:
    write_command(tmp_path, "srun", 'echo "$*" >>steps')
    script = "set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh; on_all_ranks true"
    variables = {"SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": cpus, "SLURM_GPUS_ON_NODE": "2"}
    result = run(tmp_path, script, **variables)
    assert result.returncode == 0, result.stderr
    step = (tmp_path / "steps").read_text().splitlines()[-1]
    assert f"--cpus-per-task={per_rank} " in step and ("--overcommit" in step) is (cpus == "8,1")


@pytest.mark.parametrize(("arguments", "unlimited"), [("--dry_run", True), ("", False)])
def test_train_lets_rank_0_of_dry_run_take_its_time(tmp_path: Path, arguments: str, unlimited: bool) -> None:
    write_command(tmp_path, "srun", 'echo "$*" >>steps')
    (tmp_path / "recipe.yaml").touch()
    result = run(tmp_path, f"bash slurm/train.sh {arguments}", RECIPE="recipe.yaml", DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr
    (step,) = (tmp_path / "steps").read_text().splitlines()
    assert ("--wait=60 --wait=0" in step) is unlimited


@pytest.mark.parametrize(
    ("available", "mpi", "ranks"),
    [("pmix pmix_v4", "pmix", 4), ("pmix_v4", "pmix_v4", 4), ("pmix", "pmix_v4", 4), ("cray_shasta", "cray_shasta", 4),
     ("pmi2", "pmix", 1), ("cray_shasta", "cray", 1)],
)  # fmt: skip
def test_prepare_packs_all_inputs_on_available_ranks(tmp_path: Path, available: str, mpi: str, ranks: int) -> None:
    write_command(tmp_path, "srun", f'[ "$1" != --mpi=list ] || echo "{available} none"\necho "$*" >>steps')
    write_command(tmp_path, "python", "")
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").touch()
    (tmp_path / "slurm").mkdir()
    for script in (ROOT / "slurm").glob("*.sh"):
        text = script.read_text().replace("MPI_TYPE=pmix\n", f"MPI_TYPE={mpi}\n")
        (tmp_path / "slurm" / script.name).write_text(text)
    variables = {"INPUT": "a.jsonl\nb.jsonl c.jsonl", "TOKENIZER": "t", "SHARDS": "s", "SLURM_NTASKS": "4"}
    result = run(tmp_path, "bash slurm/prepare.sh", **variables)
    assert result.returncode == 0, result.stderr
    step = (tmp_path / "steps").read_text().splitlines()[-1]
    assert "--input a.jsonl b.jsonl c.jsonl --tokenizer t" in step
    assert f"--ntasks={ranks} " in step and f"--mpi={mpi if ranks > 1 else 'none'} " in step


def test_submit_passes_environment_and_arguments_of_several_lines(tmp_path: Path) -> None:
    script = """set -euo pipefail; source slurm/chain.sh; submit train"""
    result = run(tmp_path, script, TRAIN_ARGS="--model.path m\n  --seed 2\n", TRAIN_FLAGS="--nodes=2\n--mem=0")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "submitted").read_text().splitlines()
    assert line.startswith("--parsable --export=ALL --nodes=2 --mem=0 slurm/train.sh --model.path m --seed 2 |")


def test_first_of_many_nodes_is_the_rendezvous(tmp_path: Path) -> None:
    """Reading one line of a long list and closing the pipe would end the job by SIGPIPE."""
    script = "set -euo pipefail; SRUN_ARGS=(); source slurm/lib.sh; echo $MASTER_ADDR"
    result = run(tmp_path, script, NODES="100000")
    assert (result.returncode, result.stdout) == (0, "node1\n"), result.stderr
