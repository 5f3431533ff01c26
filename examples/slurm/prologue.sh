#!/bin/bash
# A prologue to copy and change: CORD_PROLOGUE=my-site.sh. Every node reads it before anything else, inside the container
# if there is one; what all ranks shall have is exported here.

# module load cuda/13.0
# source /apps/python/3.12/activate

# Interfaces: by default NCCL and gloo choose, which fails where a node has several networks or a virtual one (docker0).
# `ip -brief address` lists them. NCCL takes beginnings of names, gloo takes one name.
# export NCCL_SOCKET_IFNAME=eth GLOO_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5

# Caches on the node's own disk: many nodes that compile into one home directory wait for each other.
# export TRITON_CACHE_DIR=$TMPDIR/triton TORCHINDUCTOR_CACHE_DIR=$TMPDIR/inductor

# ulimit -l unlimited
