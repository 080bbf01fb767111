"""Run job scripts with substitutes for Slurm's commands."""

import os
import subprocess
from pathlib import Path

from tests.runs import ENVIRONMENT, ROOT

COMMANDS = {
    # If UNAVAILABLE is set, the controller does not answer that many times.
    "scontrol": """failures=$(cat failures 2>/dev/null || echo 0)
if [[ $* != "show hostnames"* ]] && [ "$failures" -lt "${UNAVAILABLE:-0}" ]; then
  echo $((failures + 1)) >failures; echo "Unable to contact slurm controller" >&2; exit 1
fi
case "$*" in
  "show hostnames"*) seq -f "node%g" "${NODES:-1}" ;;
  *"show job"*) echo "JobId=7 JobState=RUNNING ExitCode=0:0" ;;
  requeue*) echo requeued >>log; kill -KILL $PPID ;;
esac""",
    # Prints a job id. If REFUSED is set, refuses the script of this name.
    "sbatch": """number=$(($(wc -l <submitted 2>/dev/null || echo 0) + 101))
for word in "$@"; do case $word in slurm/${REFUSED:-none}.sh) echo refused >&2; exit 1 ;; esac; done
echo "$* | RUN=${RUN:-} DATA=${DATA:-} CHOICE=${CHOICE:-} DERIVE=${DERIVE:-}" >>submitted
echo $number""",
    "scancel": 'echo "$*" >>cancelled',
    # If KILLED is set, a rank is killed after the waiting time, and the job step has its status.
    "srun": """while [ "${1#-}" != "$1" ]; do shift; done
"$@"
status=$?
if [ "${KILLED:-}" ]; then exit 137; fi
exit $status""",
}


def run(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` as a job of one node with two CPUs."""
    for name, text in COMMANDS.items():
        command = folder / "bin" / name
        if not command.exists():
            command.parent.mkdir(exist_ok=True)
            command.write_text(f"#!/bin/bash\n{text}\n")
            command.chmod(0o755)
    if not (folder / "slurm").exists():
        (folder / "slurm").symlink_to(ROOT / "slurm")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_ON_NODE": "2"}
    path = os.pathsep.join([str(folder / "bin"), ENVIRONMENT["PATH"]])
    environment = {**ENVIRONMENT, **job, "SLURM_JOB_NUM_NODES": "1", "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


def write_command(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / "bin" / name).chmod(0o755)
