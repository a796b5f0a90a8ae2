#!/usr/bin/env bash
# From simulated tracks to generated tracks, in the folder given as the first argument. Called by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-demo}
STEPS=${STEPS:-400}
TRACKS=${TRACKS:-1000}
POINT="--momentum 6 --theta 30"

rm -rf "$OUT"
mkdir -p "$OUT"

echo "== 1. simulate pions and kaons of 6 GeV/c at 30 degrees in the hpDIRC"
hepzoo simulate dirc --output "$OUT/data" --split train --n_tracks 16000 --method MixPiK $POINT --seed 1
hepzoo simulate dirc --output "$OUT/data" --split test --n_tracks 4000 --method MixPiK $POINT --seed 2

echo "== 2. train a small CMHCA-DIRC with one expert per species"
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    training/run_clm.py training/configs/cmhca_dirc_small.yaml \
    --train_file "$OUT/data/train-*.parquet" --tokenizer_kwargs on_invalid=drop_tracks \
    --max_steps "$STEPS" --output_dir "$OUT/model"

echo "== 3. load it back and generate"
python - "$OUT/model" <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hepzoo  # noqa: F401

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(0)
ids = model.generate(kinematics=torch.tensor([[6.0, 30.0], [6.0, 30.0]]), class_ids=torch.tensor([0, 1]))
for species, track in zip(("pion", "kaon"), ids):
    hits = tokenizer.decode(track)
    print(f"one {species}: {len(hits['leadTime'])} photons, the first at {min(hits['leadTime']):.2f} ns")
PYTHON
hepzoo generate --model "$OUT/model" --n_tracks "$TRACKS" --method MixPiK $POINT --output "$OUT/generated"

echo "== 4. compare generated with simulated tracks"
hepzoo evaluate dirc --real "$OUT/data/test-*.parquet" --generated "$OUT/generated" --output "$OUT/report.json"

echo "== 5. draw"
for kind in hits time yield; do
    hepzoo plot dirc --real "$OUT/data/test-*.parquet" --generated "$OUT/generated" $POINT --kind "$kind" \
        --output "$OUT/plots"
done
echo "pictures: $OUT/plots"
