#!/bin/sh
# `resfuse gpu-plan` on a machine on which nothing of ours is installed:
#
#     sh tools/gpu_plan/run.sh --part first --carried KERNELS --archive OUT/gpu-plan.tar.xz
#
# The packages are linked under the names they are imported by (pip takes 6 s), and the caches lie
# in one folder, the same on every machine: paths stand in some of Triton's files.
set -u
here=$(cd "$(dirname "$0")/../.." && pwd)
scratch=${RESFUSE_SCRATCH:-/tmp/resfuse-gpu}
mkdir -p "$scratch/packages/resfuse" || exit 2
for package in bench kernels resnet_ref tools; do
    ln -sfn "$here/$package" "$scratch/packages/resfuse/$package" || exit 2
done
export PYTHONPATH="$scratch/packages${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
export RESFUSE_CACHE_DIR="${RESFUSE_CACHE_DIR:-$scratch/resfuse}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"
export RESFUSE_QUIET_S="${RESFUSE_QUIET_S:-0}"  # others' processors are never at rest
export PYTHONUNBUFFERED=1
mkdir -p "$TRITON_CACHE_DIR" "$RESFUSE_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" || exit 2
cd "$here" || exit 2  # results/ and the commit are found from here
exec "${PYTHON:-python3}" -m resfuse.bench gpu-plan "$@"  # signals go straight to it
