#!/usr/bin/env bash
# Smoke test of the train and cpu images: a plan, and two training steps of the quickstart with its
# captions as bytes, on the first GPU if there is one, and a checkpoint of them.
# In the image: docker run --rm IMAGE dsr-smoke
set -euo pipefail
configs=${DSR_CONFIGS:-/opt/dsr-scale/configs}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

dsr-scale --version
python3 << 'PYTHON'
import torch

print(f"torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
if torch.cuda.is_available():
    import flash_attn

    print(f"flash-attn {flash_attn.__version__}")
PYTHON

settings=("directory=$work/run" 'encoders.text={kind: bytes}' training.steps=2
    training.global_batch_images=4 training.microbatch_images=4 data.max_samples=16
    grid.every_steps=null tracking.wandb=off tracking.log_every_steps=1
    tracking.norms_every_steps=null training.schedule.warmup_steps=0
    training.schedule.decay=constant training.schedule.decay_start_step=0)
dsr-scale plan "$configs/quickstart.yaml" "${settings[@]}" > "$work/plan"
dsr-scale train "$configs/quickstart.yaml" "${settings[@]}"
dsr-scale checkpoint verify "$work/run"
[[ -f $work/run/checkpoints/step_00000002/run_state.json ]] || {
    echo "smoke: no checkpoint of step 2" >&2
    exit 1
}
echo "smoke test passed"
