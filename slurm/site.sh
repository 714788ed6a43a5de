# What is true of one cluster only; sourced by run.sbatch in the batch shell. Nothing is on by default.
# Partition, account and quality of service belong to the command line of sbatch, or to configs/launcher/slurm.yaml.

# Software of the cluster, and another Python than .venv/bin/python of the repository:
# module load cuda
# python=/path/to/environment/bin/python

# Node-local disk for compiled kernels and temporary files (default /tmp):
# export LLAMITA_LOCAL=/scratch/local

# Network: name the interfaces of this cluster. Do not copy these from another one.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Arguments of srun, one per element; a container, for example:
# srun_arguments=(--container-image=/images/llamita.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# How often a job may start again in all (default 50):
# export LLAMITA_MAX_RESTARTS=50
