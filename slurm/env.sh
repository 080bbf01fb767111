# shellcheck shell=bash disable=SC2034
# The one place for what differs between clusters. Every job script sources it, in the root of the repository.

# Software: modules, then the virtual environment.
# module load cuda/12.8 gcc/13
if [ -e .venv/bin/activate ]; then source .venv/bin/activate; fi

# More arguments for every srun. A container in place of the virtual environment, with pyxis:
# SRUN_ARGS=(--container-image="$PWD/solar.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# or its binding of ranks to cores:
# SRUN_ARGS=(--cpu-bind=cores)
SRUN_ARGS=()

# Network: the interface between nodes, where NCCL or gloo picks another one by itself (`ip addr` lists them).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO

# How srun starts the MPI ranks of preprocessing; `srun --mpi=list` shows what there is.
MPI_TYPE=pmix

# Caches and hub access of the compute nodes.
# export HF_HOME=/scratch/$USER/huggingface HF_HUB_OFFLINE=1
