"""Read rank, world size and rendezvous address from the launcher. Needs no torch, so that errors are reported early."""

import os
import re
import socket
import subprocess

from pipeline.common.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Rank, world size, local rank and number of local ranks, as set by each MPI launcher.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray PALS
)


def set_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, whichever launcher is used.

    Call it before anything reads the rank. torchrun and the DeepSpeed launcher set the variables themselves. mpirun and
    srun have variables of their own, which are translated. Without a launcher, this process is the only rank.

    Raises:
        UserError: The launcher's variables are incomplete.
    """
    env = os.environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        ranks = _mpi_ranks() or _slurm_ranks() or dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
        env.update({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"} | ranks)
    if "LOCAL_SIZE" in env:  # DeepSpeed's name for it
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])
    if env.get("WORLD_SIZE") == "1":
        env.setdefault("LOCAL_RANK", "0")
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")  # any free port
    missing = [name for name in LAUNCHER_VARIABLES if name not in env]
    if missing:
        raise UserError(f"the launcher has not set {' and '.join(missing)}; set them in every process, or use torchrun")


def _mpi_ranks() -> dict[str, str] | None:
    """Return the launcher's variables of a process that mpirun started, or None for any other process.

    Like DeepSpeed, it takes the rendezvous address from rank 0 by MPI, unless MASTER_ADDR and MASTER_PORT are set.
    Unlike DeepSpeed, it also takes a free port from rank 0, so that two runs can share a machine. Collective then.

    Raises:
        UserError: The MPI launcher has set no local ranks.
    """
    env = os.environ
    names = next((names for names in MPI_VARIABLES if all(name in env for name in names)), None)
    if names is None:
        if "PMI_SIZE" in env and env["PMI_SIZE"] != "1" and "SLURM_STEP_NUM_TASKS" not in env:
            raise UserError(
                "the MPI launcher has not set local ranks; set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                "and MASTER_PORT in every process, or use torchrun"
            )
        return None
    ranks = dict(
        zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), (env[name] for name in names), strict=True)
    )
    if ranks["WORLD_SIZE"] != "1" and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        ranks["MASTER_ADDR"], ranks["MASTER_PORT"] = _mpi_rendezvous(ranks)
    return ranks


def _mpi_rendezvous(ranks: dict[str, str]) -> tuple[str, str]:
    """Return an address and a free port of rank 0. Collective: all ranks of MPI_COMM_WORLD must call it.

    Raises:
        UserError: MPI does not connect the processes that mpirun started.
    """
    from mpi4py import MPI  # initializes MPI

    world = MPI.COMM_WORLD
    if str(world.Get_size()) != ranks["WORLD_SIZE"]:
        raise UserError(
            f"mpirun has started {ranks['WORLD_SIZE']} processes, but mpi4py connects {world.Get_size()}; use the "
            "mpirun that mpi4py was built for, or set MASTER_ADDR and MASTER_PORT"
        )
    one_node = ranks["LOCAL_WORLD_SIZE"] == ranks["WORLD_SIZE"]
    local = ("127.0.0.1" if one_node else _address(), str(free_port())) if ranks["RANK"] == "0" else None
    address, port = world.bcast(local)
    MPI.Finalize()  # mpirun reports a process that exits without it, as `exit_now` does
    return address, port


def _address() -> str:
    """Return the first IP address of this host, as DeepSpeed's MPI discovery does."""
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return listed[0] if listed else socket.gethostbyname(socket.gethostname())


def _slurm_ranks() -> dict[str, str] | None:
    """Return the launcher's variables of a process that srun started as one rank, or None for any other process.

    Raises:
        UserError: There are several ranks, and MASTER_ADDR or MASTER_PORT is not set.
    """
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return None
    ranks = env["SLURM_STEP_NUM_TASKS"]
    if ranks != "1" and ("MASTER_ADDR" not in env or "MASTER_PORT" not in env):
        raise UserError("MASTER_ADDR and MASTER_PORT are not set; launch with slurm/train.sh, or set them as it does")
    tasks_per_node = [
        int(count)
        for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # e.g. 8(x3),4
        for _ in range(int(nodes or 1))
    ]
    local_ranks = str(tasks_per_node[int(env["SLURM_NODEID"])])
    variables = {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "WORLD_SIZE": ranks}
    return {**variables, "LOCAL_WORLD_SIZE": local_ranks}


def free_port() -> int:
    """Return a TCP port that is currently free on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
