"""
Train track finding in TPC events (arXiv:2508.14087): a head of prototypes on the block outputs of a backbone.

Events are rows of E [ADC counts], x, y, z [cm] and the track_id of every point. As published, the pre-trained backbone
is frozen and the head is trained; `--no_freeze_backbone` trains both. `find_tracks.py` then finds tracks. With
`--config_overrides joint_head=true` the head also learns the particles of the tracks and the noise of the points, from
the columns pid and noise.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import transformers
from transformers import AutoModelForInstanceSegmentation, EvalPrediction, TrainingArguments

import hepzoo  # noqa: F401 - registers the families
from hepzoo.training.common import ModelArguments, make_parser, parse_arguments, run_script
from hepzoo.training.data import DataTrainingArguments
from hepzoo.training.tpc_data import TpcArguments
from hepzoo.training.tpc_heads import CacheArguments, train_head

EXAMPLES = """
examples:
  the head of the published model on a pre-trained backbone
    accelerate launch training/run_tracking.py training/configs/fm4npp_tracking.yaml --model_name_or_path runs/npp \\
        --train_file data/tpc/train --validation_file data/tpc/validation --output_dir runs/tracking

  a small head on the CPU; the outputs of the backbone are kept in memory
    accelerate launch training/run_tracking.py training/configs/fm4npp_tracking_small.yaml \\
        --model_name_or_path runs/npp --cache_block_outputs 4 \\
        --train_file data/tpc/train --validation_file data/tpc/validation --output_dir runs/tracking

  the same on a backbone that was never trained, for comparison
    accelerate launch training/run_tracking.py training/configs/fm4npp_tracking_small.yaml \\
        --model_type fm4npp --paper_size m1 --feature_extractor_name runs/npp \\
        --train_file data/tpc/train --validation_file data/tpc/validation --output_dir runs/tracking_random

  continue an interrupted run: the same command again
"""


@dataclass
class HeadArguments:
    """What is trained."""

    freeze_backbone: bool = field(default=True, metadata={"help": "Train the head only."})


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, TpcArguments, HeadArguments, CacheArguments, DataTrainingArguments, TrainingArguments),
        description="Train track finding in TPC events. Options are flags or come from a JSON or YAML file given as "
        "the first argument, which flags override.",
        epilog=EXAMPLES,
    )


def tracking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Adjusted Rand index (mean over events, and pooled), efficiency, purity and fake rate of assignments."""
    from hepzoo.evaluation.tracking import adjusted_rand_index, contingency, match_tracks

    labels = prediction.label_ids
    # a joint head has others too
    true, found = np.asarray(labels[0] if isinstance(labels, tuple) else labels), np.asarray(prediction.predictions)
    is_point = true != -100
    table = contingency(np.nonzero(is_point)[0], true[is_point], found[is_point], len(true))
    per_event, pooled = adjusted_rand_index(table)
    matches = match_tracks(table)
    return {
        "ari": float(np.nanmean(per_event)),
        "ari_pooled": pooled,
        "efficiency": float(np.mean(matches.true_found)) if len(matches.true_id) else 0.0,
        "purity": float(np.mean(matches.found_purity)) if len(matches.found_id) else 0.0,
        "fake_rate": float(np.mean(~matches.found_passes)) if len(matches.found_id) else 0.0,
    }


def assign_tracks(model: Any):
    """`preprocess_logits_for_metrics` of `Trainer`: class and mask logits to the track of every point."""

    def reduce(logits, labels):
        class_logits, mask_logits = logits[:2]
        outputs = transformers.utils.ModelOutput(class_logits=class_logits, mask_logits=mask_logits)
        return model.assign_tracks(outputs)

    return reduce


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    model_args, tpc_args, head_args, cache_args, data_args, training_args = parse_arguments(build_parser(), argv)
    return train_head(
        AutoModelForInstanceSegmentation,
        "tracks",
        "run_tracking.py",
        head_args.freeze_backbone,
        model_args,
        tpc_args,
        cache_args,
        data_args,
        training_args,
        tracking_metrics,
        assign_tracks,
    )


if __name__ == "__main__":
    run_script(main, "run_tracking.py")
