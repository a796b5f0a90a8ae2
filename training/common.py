"""What the training scripts share: arguments, models and tokenizers by their Auto classes, optimizer, model card."""

import argparse
import dataclasses
import inspect
import json
import logging as python_logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.trainer_utils import get_last_checkpoint, has_length
from transformers.utils import logging

from hepzoo.training.data import InputError, _scalar, parse_assignments
from hepzoo.training.lion import Lion
from hepzoo.training.ranger import Ranger, check_lookahead

logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """Which model to train, from scratch or from a checkpoint, and its tokenizer."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue from: a folder or a name on the Hub."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Model family to train from scratch, for example cmhca_dirc."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Train from scratch with this configuration: a JSON file, folder or Hub name."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, name=value,... or JSON: hidden_size=128,num_hidden_layers=2."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer folder or Hub name. Default: that of the model, else the default of its family."},
    )
    tokenizer_overrides: str | None = field(
        default=None, metadata={"help": "Arguments of the family's default tokenizer, as name=value,... or JSON."}
    )
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "radam (torch.optim.RAdam), ranger (RAdam in Lookahead; --optim_args alpha=0.5,k=6), lion "
            "(published with --adam_beta1 0.95 --adam_beta2 0.98); by default --optim decides.",
            "choices": ["radam", "ranger", "lion"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa (default), eager, ..."})
    dtype: str | None = field(default=None, metadata={"help": "Type of the weights: float32 (default), bfloat16."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})

    def hub_kwargs(self) -> dict[str, Any]:
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def make_parser(dataclass_types: Sequence[type], description: str, epilog: str) -> HfArgumentParser:
    return HfArgumentParser(
        list(dataclass_types),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # an abbreviated option would silently set another one when options are added
        allow_abbrev=False,
    )


def parse_arguments(parser: HfArgumentParser, argv: list[str] | None = None) -> tuple[Any, ...]:
    """
    Flags, or a JSON or YAML file of options as the first argument, which later flags override.

    Raises:
        InputError: the file is missing or has an unknown option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        path = Path(argv.pop(0))
        options = _read_options(path)
        known = {f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind) if f.init}
        unknown = sorted(map(str, set(options) - known))
        if unknown:
            raise InputError(f"{path}: unknown option {unknown[0]}; --help lists the options")
        for action in parser._actions:
            if action.dest in options:
                action.required = False
        # a mapping is written back as JSON, the form that the option has on the command line
        parser.set_defaults(
            **{name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}
        )
    try:
        return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise InputError(str(error).strip().splitlines()[0]) from error


def _read_options(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not valid: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path}: expected a mapping of options, got {type(options).__name__}")
    return {name: _scalar(value) for name, value in options.items()}


def prepare_run(training_args: TrainingArguments) -> None:
    """Logging, and defaults of `TrainingArguments` that these models need."""
    python_logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    level = training_args.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    ours = python_logging.INFO if training_args.should_log else python_logging.WARNING
    python_logging.getLogger("hepzoo").setLevel(ours)
    if not training_args.should_log:
        import datasets

        datasets.disable_progress_bars()
    if training_args.hub_token is not None:
        # Trainer pickles its arguments into training_args.bin, which --push_to_hub publishes
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if training_args.label_names is None:
        # Trainer takes every forward argument with "label" in its name for one that a batch must have
        training_args.label_names = ["labels"]


def find_last_checkpoint(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: `--resume_from_checkpoint`, else the last one in the output folder.

    `--resume_from_checkpoint false` starts anew.

    Raises:
        InputError: the checkpoint does not exist.
    """
    wish = training_args.resume_from_checkpoint
    if isinstance(wish, str) and wish.lower() in ("true", "false"):
        wish = wish.lower() == "true"
    if wish is False:
        return None
    if isinstance(wish, str):
        if not os.path.isfile(os.path.join(wish, "trainer_state.json")):
            raise InputError(f"--resume_from_checkpoint: {wish} is not a checkpoint folder of a training run")
        return wish
    folder = training_args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if last is None and wish is True:
        raise InputError(f"--resume_from_checkpoint: no checkpoint in {folder}")
    if last is not None:
        logger.warning(f"resuming from {last}; --resume_from_checkpoint false starts anew")
    return last


def run_script(main: Callable[[], int | None], name: str) -> None:
    """Runs a script's `main`; wrong input ends it with one line and exit status 2."""
    try:
        status = main()
    except InputError as error:
        # that of a worker process has the traceback in front
        line = str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        print(f"{name}: error: {line}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)


# ---------------------------------------------------------------------------------------------------------------------
# Model and tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def load_config_and_tokenizer(
    model_args: ModelArguments, default_tokenizer: type | None = None, **overrides: Any
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """
    Configuration and tokenizer of the model to train, made to agree.

    From scratch (`--model_type`) the configuration follows the tokenizer in what both know (vocabulary sizes,
    conditioning, length), and a default tokenizer follows `--config_overrides`.

    Args:
        default_tokenizer: class for a family that none is registered for.
        overrides: configuration values of the script, weaker than `--config_overrides`.

    Raises:
        InputError: unknown model, unreadable files, or a tokenizer that does not fit the model.
    """
    sources = [name for name in ("model_name_or_path", "config_name", "model_type") if getattr(model_args, name)]
    if not sources:
        raise InputError("set --model_name_or_path, --config_name or --model_type")
    source = sources[0]
    name = getattr(model_args, source)
    overrides = {**overrides, **parse_assignments(model_args.config_overrides, "config_overrides")}

    def build(**more) -> PreTrainedConfig:
        try:
            if source == "model_type":
                return AutoConfig.for_model(name, **{**more, **overrides})
            return AutoConfig.from_pretrained(name, **model_args.hub_kwargs(), **overrides)
        except (ValueError, OSError, TypeError, KeyError, StrictDataclassError) as error:
            raise InputError(f"--{source} {name}: {_one_line(error)}") from error

    config = build()
    known = type(config)().to_dict()
    unknown = sorted(key for key in overrides if key not in known and not hasattr(type(config), key))
    if unknown:
        raise InputError(f"--config_overrides: {type(config).__name__} has no {unknown[0]}")

    tokenizer = load_tokenizer(model_args, config, default_tokenizer)
    if source == "model_type":
        shared = {key: value for key, value in _tokenizer_facts(tokenizer).items() if key in known}
        config = build(**shared)
    check_agreement(config, tokenizer)
    return config, tokenizer


def load_tokenizer(
    model_args: ModelArguments, config: PreTrainedConfig, default_tokenizer: type | None = None
) -> PreTrainedTokenizerBase:
    """
    `--tokenizer_name`, else the tokenizer saved with the model, else the family's own built for `config`.

    Raises:
        InputError: it cannot be loaded or built.
    """
    overrides = parse_assignments(model_args.tokenizer_overrides, "tokenizer_overrides")
    for option in ("tokenizer_name", "model_name_or_path", "config_name"):
        name = getattr(model_args, option)
        if name is None:
            continue
        is_local = os.path.exists(name)
        if is_local and not os.path.isfile(os.path.join(name, "tokenizer_config.json")) and option != "tokenizer_name":
            continue
        try:
            return AutoTokenizer.from_pretrained(name, **model_args.hub_kwargs(), **overrides)
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise InputError(f"--{option} {name}: no tokenizer: {_one_line(error)}") from error
    try:
        tokenizer_class = default_tokenizer or TOKENIZER_MAPPING[type(config)]
    except KeyError:
        raise InputError(f"{config.model_type} has no default tokenizer, set --tokenizer_name") from None
    if isinstance(tokenizer_class, tuple):
        tokenizer_class = next(kind for kind in tokenizer_class if kind is not None)
    try:
        if hasattr(tokenizer_class, "from_model_config"):
            return tokenizer_class.from_model_config(config, **overrides)
        arguments = inspect.signature(tokenizer_class.__init__).parameters
        shared = {key: getattr(config, key) for key in arguments if hasattr(config, key)}
        if hasattr(config, "max_position_embeddings"):
            shared["model_max_length"] = config.max_position_embeddings
        return tokenizer_class(**{**shared, **overrides})
    except (ValueError, TypeError) as error:
        raise InputError(f"cannot build the default tokenizer of {config.model_type}: {_one_line(error)}") from error


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration may have to follow, under the names it has there."""
    facts = {key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, (int, float, str, list))}
    facts["vocab_size"] = tokenizer.vocab_size
    facts["max_position_embeddings"] = tokenizer.model_max_length
    return {
        key: value for key, value in facts.items() if key != "name_or_path" and not key.endswith(("_token", "_side"))
    }


def check_agreement(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        InputError: a quantity that the configuration and the tokenizer share differs.
    """
    facts = _tokenizer_facts(tokenizer)
    longest = facts.pop("max_position_embeddings")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "num_streams"):
        facts[name] = getattr(tokenizer, name, None)
    known = config.to_dict()
    for name, value in facts.items():
        if value is None or (name not in known and name != "num_streams") or getattr(config, name, None) is None:
            continue
        ours = json.loads(json.dumps(getattr(config, name)))
        if ours != json.loads(json.dumps(value)):
            raise InputError(f"the tokenizer does not fit the model: {name} is {value}, the model has {ours}")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise InputError(
            f"the tokenizer does not fit the model: model_max_length is {longest}, the model has {limit} positions"
        )


def load_model(
    auto_class: Any,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    freeze_backbone: bool = False,
    **changes: Any,
) -> Any:
    """
    The model of `auto_class`, with fresh weights unless `--model_name_or_path` is given.

    Args:
        freeze_backbone: train only what the checkpoint did not have (heads, cls token) and the heads.
        changes: configuration values of the script, stronger than `config` and `--config_overrides`.

    Raises:
        InputError: it cannot be loaded.
    """
    kwargs: dict[str, Any] = {}
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    dtype = getattr(torch, model_args.dtype or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--dtype {model_args.dtype}: expected float32, bfloat16 or float16")
    if freeze_backbone and model_args.model_name_or_path is None:
        raise InputError("--freeze_backbone: fresh weights need training, set --model_name_or_path")
    try:
        if changes:
            config.update(changes)
        if model_args.model_name_or_path is None:
            return auto_class.from_config(config, dtype=dtype, trust_remote_code=model_args.trust_remote_code, **kwargs)
        model_class = auto_class._model_mapping.get(type(config), None)
        if model_class is None:
            # code of the checkpoint
            model_class, kwargs["config"] = auto_class, config
        else:
            # The class reads the stored configuration itself: a head on a generator may have to change it, for
            # example when it averages experts.
            kwargs.update({**parse_assignments(model_args.config_overrides, "config_overrides"), **changes})
        model, info = model_class.from_pretrained(
            model_args.model_name_or_path, dtype=dtype, output_loading_info=True, **model_args.hub_kwargs(), **kwargs
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"cannot make the {config.model_type} model: {_one_line(error)}") from error
    if freeze_backbone:
        prefix = model.base_model_prefix + "."
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(prefix) or name in info["missing_keys"])
    return model


def optimizer_arguments(model_args: ModelArguments, training_args: TrainingArguments) -> tuple[type, dict] | None:
    """
    `optimizer_cls_and_kwargs` of `Trainer` for `--optimizer`; None leaves the choice to `--optim`.

    Raises:
        InputError: `--optim_args` are not those of Ranger.
    """
    if model_args.optimizer is None:
        return None
    kwargs = {
        "lr": training_args.learning_rate,
        "betas": (training_args.adam_beta1, training_args.adam_beta2),
        "eps": training_args.adam_epsilon,
    }
    if model_args.optimizer == "radam":
        return torch.optim.RAdam, kwargs
    if model_args.optimizer == "lion":
        return Lion, {"lr": kwargs["lr"], "betas": kwargs["betas"]}
    lookahead = parse_assignments(training_args.optim_args, "optim_args")
    unknown = sorted(set(lookahead) - {"alpha", "k"})
    if unknown:
        raise InputError(f"--optim_args: unknown argument {unknown[0]} of ranger, expected alpha or k")
    try:
        check_lookahead(**lookahead)
    except ValueError as error:
        raise InputError(f"--optim_args: {error}") from None
    return Ranger, {**kwargs, **lookahead}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------------------
# Model card
# ---------------------------------------------------------------------------------------------------------------------

CARD = """---
{metadata}
---

# {name}

A `{model_class}` ({parameters:.3g} million parameters) of the {model_type} family, trained with
`training/{script}` of hepzoo.

```python
import hepzoo
from transformers import {auto_class}, {processor_class}

model = {auto_class}.from_pretrained("{repository}")
{processor} = {processor_class}.from_pretrained("{repository}")
```

## Training

Data: {data}.

| setting | value |
| --- | --- |
{settings}

## Results

{results}
"""


class PhysicsTrainer(Trainer):
    """`Trainer` whose model card says how the model was trained. `card` holds what it cannot know itself."""

    card: dict[str, Any] = {}
    # used instead of `data_collator` for validation and test data
    evaluation_collator: Callable | None = None

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        training_collator = self.data_collator
        if not is_training and self.evaluation_collator is not None:
            self.data_collator = self.evaluation_collator
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = training_collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Multi-stream models compute the loss without the logits; those of large vocabularies cost more than the rest.
        if prediction_loss_only and getattr(self.model, "loss_type", None) == "multi_stream":
            inputs = {**inputs, "logits_to_keep": 1}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def init_hf_repo(self, *args, **kwargs):
        """
        As that of `Trainer`.

        Raises:
            InputError: the repository cannot be made.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        # its bases are OSError and the errors of the HTTP client, which depends on the version
        except (ValueError, *HfHubHTTPError.__bases__) as error:
            raise InputError(f"--push_to_hub: {_one_line(error)}") from error

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # Trainer uploads weights and configuration of a checkpoint, but not the code that they need
        if self.is_world_process_zero():
            for path in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, **kwargs):
        """Writes `README.md` into the output folder. Extra metadata of the card: `license`, `tags`."""
        if not self.is_world_process_zero():
            return
        from huggingface_hub import ModelCardData

        args, model = self.args, self.accelerator.unwrap_model(self.model)
        # where uploads go to, with its owner
        repository = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        start = model.config.name_or_path or None
        is_local = start is not None and os.path.exists(start)
        metrics = self.card.get("metrics", {})
        data = self.card.get("data", "not stated")
        metadata = ModelCardData(
            library_name="transformers",
            license=kwargs.get("license", "apache-2.0"),
            tags=sorted({"physics", "hepzoo", model.config.model_type, *(kwargs.get("tags") or ())}),
            datasets=self.card.get("datasets"),
            base_model=None if is_local else start,
            pipeline_tag=self.card.get("pipeline_tag"),
        )
        settings = {
            "starting weights": f"`{Path(start).name if is_local else start}`" if start else None,
            "training records": self.card.get("train_samples"),
            "steps": self.state.global_step,
            "batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "optimizer": type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__,
            "learning rate": f"{args.learning_rate:g} ({args.lr_scheduler_type.value})",
            "gradient clipping": f"{args.max_grad_norm:g}",
            "seed": args.seed,
        }
        rows = [f"| {name} | {value} |" for name, value in settings.items() if value is not None]
        results = [
            f"| {name.removeprefix('eval_').removeprefix('test_')} | {value:.4g} |"
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not name.endswith(("_runtime", "_per_second", "epoch", "_samples"))
        ]
        header = ["| measure | validation |", "| --- | --- |"]
        text = CARD.format(
            metadata=metadata.to_yaml(),
            name=repository.split("/")[-1],
            repository=repository,
            model_class=type(model).__name__,
            model_type=model.config.model_type,
            parameters=model.num_parameters() / 1e6,
            script=self.card.get("script", ""),
            auto_class=self.card.get("auto_class", "AutoModel"),
            processor_class=self.card.get("processor_class", "AutoTokenizer"),
            processor="feature_extractor" if "processor_class" in self.card else "tokenizer",
            data=data,
            settings="\n".join(rows),
            results="\n".join(header + results) if results else "Not evaluated.",
        )
        Path(args.output_dir, "README.md").write_text(text, encoding="utf-8")


def binary_scores(logits: np.ndarray) -> np.ndarray:
    """(..., 1 or 2) logits to one number each, positive for class 1: the logit, or log p(1) - log p(0)."""
    return logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]


def write_parquet(columns: dict[str, Any], path: Path) -> Path:
    """Writes columns (arrays or lists, one entry per row) to `path`, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values if isinstance(values, np.ndarray) else list(values)) for name, values in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        pq.write_table(pa.table(arrays), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def describe_data(data_args: Any) -> str:
    """Names of the training data without folders, for the card."""
    if data_args.train_file is not None:
        names = [data_args.train_file] if isinstance(data_args.train_file, str) else data_args.train_file
        return ", ".join(f"`{Path(name).name}`" for name in names)
    return f"`{data_args.dataset_name}`" if data_args.dataset_name else "not stated"


def train_and_evaluate(trainer: PhysicsTrainer, checkpoint: str | None) -> None:
    """
    Training and validation as the arguments of `trainer` ask for, with model, metrics and state in the output folder.

    Args:
        checkpoint: that training resumes from.
    """
    if trainer.args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        # a stream does not know its length
        if has_length(trainer.train_dataset):
            metrics["train_samples"] = trainer.card["train_samples"] = len(trainer.train_dataset)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if trainer.args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(trainer.eval_dataset)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.card["metrics"] = metrics


def finish(trainer: Trainer, training_args: TrainingArguments) -> None:
    """Card, upload if asked for, and the end of the process group."""
    if training_args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    if training_args.world_size > 1:
        # The destructor of a gloo group waits for its threads while it holds Python's lock. Such a thread may still
        # need the lock to release the tensors of the last collective: let it have it before.
        trainer.accelerator.wait_for_everyone()
        time.sleep(0.2)
    trainer.accelerator.end_training()
