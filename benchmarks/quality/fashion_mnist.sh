#!/usr/bin/env bash
# The release of Fashion-MNIST, in three runs (about 4 hours of two cores), and the last of them with two other
# objectives: ECT's last stage with a fresh teacher, and with a stored one. They are kept in runs/releases.
# Needs .venv (`make test` sets it up).
#     bash benchmarks/quality/fashion_mnist.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=benchmarks/yardstick
results=benchmarks/results
releases=runs/releases

train() {  # name, epochs, learning rate, averages, then options
  .venv/bin/udddm-train --config fashion-mnist --run-dir "runs/$1" \
    --set train.epochs="$2" --set train.learning_rate="$3" --set train.ema="$4" --set train.ema_warmup=false \
    --set evaluate.every_steps=938 --set evaluate.count=1000 --set evaluate.features=features:fashion_mnist \
    --set sample.every_steps=0 "${@:5}"
}
release() {
  .venv/bin/python benchmarks/quality/release.py "runs/$1" "$2"
}

ict="objective={name: ict, pretrain: 0, ict: {s0: 640, s1: 640}}"
ect="objective={name: ect, pretrain: 0, ect: {q: 256, stages: 1, length: 1}}"
stored="objective={name: ect, pretrain: 0, ect: {q: 256, stages: 1, length: 2}}"

# 1. The preset: 10 epochs of ECT.
.venv/bin/udddm-train --config fashion-mnist
release fashion-mnist $releases/tuning

# 2. 12 epochs of iCT at 640 levels.
train second 12 3.0e-4 "[0.999, 0.9997]" --workers 2 --set train.init_from=$releases/tuning --set "$ict"
release second $releases/continued

# 3. 5 epochs of the same, up to sigma 80; beside it the two others, each on a core.
third=(5 2.0e-4 "[0.9998, 0.9995, 0.9999]" --set schedule.sigma_max=80 --set train.init_from=$releases/continued)
train third "${third[@]}" --set "$ict" &
ict_run=$!
train third-ect "${third[@]}" --set "$ect"
wait "$ict_run"
train third-stored "${third[@]}" --set "$stored"
release third $releases/consistency
.venv/bin/python benchmarks/quality/epochs.py runs/third runs/third-ect runs/third-stored \
  --json $results/fashion-mnist-third.json | tee $results/fashion-mnist-third.txt

# Where one evaluation starts from.
for model in tuning continued consistency; do
  .venv/bin/python benchmarks/quality/start_level.py $releases/$model \
    --json $results/start-level-$model.json
done | tee $results/start-level.txt
