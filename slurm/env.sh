# shellcheck shell=bash disable=SC2034
# Settings that differ between clusters; the only file to edit. Every job script sources it from the repository root.

# Software: modules first, then the virtual environment.
# module load gcc/13 python/3.11
if [ -e .venv/bin/activate ]; then source .venv/bin/activate; fi

# Additional arguments for every srun. To run in a container with pyxis instead of the virtual environment:
# SRUN_ARGS=(--container-image="$PWD/solar.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# To bind ranks to cores:
# SRUN_ARGS=(--cpu-bind=cores)
SRUN_ARGS=()

# Network: set the interface between nodes if NCCL or gloo selects the wrong one (`ip addr` lists them).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO

# MPI plugin for the ranks of preprocessing; `srun --mpi=list` shows what is available.
MPI_TYPE=pmix

# Hugging Face cache, and offline mode if compute nodes have no internet access.
# export HF_HOME=/scratch/$USER/huggingface HF_HUB_OFFLINE=1
