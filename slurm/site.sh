# Everything that one cluster wants to know, and the only file to edit for it; nothing is on by default.
# The pipeline sources it before sbatch, and every job sources it in its batch shell ($root: the code that runs).
# No keys here: this file is copied into the directory of every pipeline, which refuses to submit with one. They belong
# into the shell that submits, whose environment jobs inherit, or into the tool's own login file (`wandb login`).

# ---- for sbatch: these variables are its own; options on its command line overrule them ----------------------------
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=abc123
# export SBATCH_QOS=normal
# export SBATCH_RESERVATION=training
# export SBATCH_CONSTRAINT=h100

# ---- software -------------------------------------------------------------------------------------------------------
# module load cuda
# python=/path/to/environment/bin/python    # default: the Python that submitted, or .venv/bin/python of the repository

# Arguments of srun, one per element. A container starts here, never around the batch script, which needs scontrol:
# srun_arguments=(--container-image=/images/llamita.sqsh --container-mounts="/scratch:/scratch,$root:$root")

# ---- disks and network ----------------------------------------------------------------------------------------------
# Node-local disk for compiled kernels and temporary files (default /tmp):
# export LLAMITA_LOCAL=/scratch/local

# Name the interfaces of this cluster; do not copy these from another one.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# ---- limits ---------------------------------------------------------------------------------------------------------
# How often a job may start again in all (default 50):
# export LLAMITA_MAX_RESTARTS=50
