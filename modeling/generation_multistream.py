"""
Stock `generate()` for models whose positions carry several token ids.

`input_ids` has shape (batch, length, streams) and `logits` is a tuple with one (batch, length, vocab_k) tensor per
stream. The public `generate()` of transformers stays as it is: the mixin overrides the hooks in which the library
assumes one vocabulary, and gives every stream its own standard `LogitsProcessorList`.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from .growing_cache import GrowingLayer, growing_cache

Scores = tuple[torch.Tensor, ...]
# index of the end of a row that has not ended
NEVER = torch.iinfo(torch.int64).max // 2


class StreamLogitsProcessor(LogitsProcessor):
    """
    Restricts any standard logits processor to one stream.

    Args:
        stream (`int`): index of the stream (CMHCA-DIRC: 0 space, 1 time; SPADE: 0 x, 1 y, 2 z).
        processor (`LogitsProcessor`): called with the (batch, length) ids and (batch, vocab) scores of that stream.
    """

    def __init__(self, stream: int, processor: LogitsProcessor):
        self.stream = stream
        self.processor = processor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.processor(input_ids, scores)


class JointLogitsProcessor(LogitsProcessor):
    """
    Base class of constraints that look at several streams at once.

    `__call__` gets all ids, (batch, length, streams), and a tuple of scores, one (batch, vocab_k) tensor per stream,
    and returns such a tuple. Joint processors run before the processors of the single streams.

    `generate()` takes rows that have finished out of the batch. A subclass that holds something for every row sets
    `keeps_rows = True`, and the batch stays as it is.
    """

    keeps_rows = False

    def __call__(self, input_ids: torch.LongTensor, scores: Scores) -> Scores:
        raise NotImplementedError(f"{self.__class__.__name__} must implement __call__")


class ExponentialTemperatureLogitsProcessor(LogitsProcessor):
    """
    Temperature that falls with the step s = 0, 1, ...: T(s) = final + (initial - final) * 100^(-s / num_steps).

    The dynamic temperature of CMHCA-DIRC: 1.05 at the first photon, 0.951 at the last.

    Args:
        prompt_length (`int`): length of `input_ids` at step 0.
        num_steps (`int`): steps after which the excess has fallen to 1 %.
    """

    def __init__(self, prompt_length: int, num_steps: int, initial: float = 1.05, final: float = 0.95):
        if num_steps <= 0 or initial <= 0 or final <= 0:
            raise ValueError(f"num_steps, initial and final must be positive, got {num_steps}, {initial} and {final}")
        self.prompt_length = prompt_length
        self.num_steps = num_steps
        self.initial = initial
        self.final = final

    def temperature(self, step: int) -> float:
        return self.final + (self.initial - self.final) * math.exp(-math.log(100.0) / self.num_steps * step)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores / self.temperature(input_ids.shape[1] - self.prompt_length)


class LinearTemperatureLogitsProcessor(LogitsProcessor):
    """Temperature that falls linearly with the step s to a floor: T(s) = max(1 - s / num_steps, floor)."""

    def __init__(self, prompt_length: int, num_steps: int, floor: float = 0.95):
        if num_steps <= 0 or floor <= 0:
            raise ValueError(f"num_steps and floor must be positive, got {num_steps} and {floor}")
        self.prompt_length = prompt_length
        self.num_steps = num_steps
        self.floor = floor

    def temperature(self, step: int) -> float:
        return max(1.0 - step / self.num_steps, self.floor)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores / self.temperature(input_ids.shape[1] - self.prompt_length)


class ForbiddenTokensLogitsProcessor(LogitsProcessor):
    """
    Never draws the given ids: special tokens (SOS, pad), pixels of dead channels.

    Args:
        token_ids: ids of the stream the processor is applied to.
    """

    def __init__(self, token_ids: Sequence[int] | torch.Tensor):
        self.token_ids = torch.as_tensor(token_ids, dtype=torch.long).flatten()
        if (self.token_ids < 0).any():
            raise ValueError(f"token ids must not be negative, got {self.token_ids.min().item()}")

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(-1, self.token_ids.to(scores.device), -torch.inf)


class MonotonicLogitsProcessor(LogitsProcessor):
    """
    Ordinary ids of the stream never decrease (hits ordered in time, showers layer by layer).

    Args:
        first_id, last_id (`int`): the ordered range of ids, both included; other ids (SOS, EOS, pad) stay as they are.
        group_size (`int`): so many neighbouring ids count as equal (all cells of a layer, where one id is a cell).
    """

    def __init__(self, first_id: int, last_id: int, group_size: int = 1):
        if not 0 <= first_id <= last_id:
            raise ValueError(f"expected 0 <= first_id <= last_id, got {first_id} and {last_id}")
        if group_size < 1:
            raise ValueError(f"`group_size` is {group_size}, expected at least 1")
        self.first_id = first_id
        self.last_id = last_id
        self.group_size = group_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        previous = input_ids[:, -1:]
        ids = torch.arange(scores.shape[-1], device=scores.device)
        ordered = (ids >= self.first_id) & (ids <= self.last_id)
        started = (previous >= self.first_id) & (previous <= self.last_id)
        lowest = previous - (previous - self.first_id) % self.group_size
        return scores.masked_fill(ordered & started & (ids < lowest), -torch.inf)


class NucleusLogitsWarper(LogitsProcessor):
    """
    The same tokens as `transformers.TopPLogitsWarper`, found without sorting indices. (Of tokens with exactly equal
    scores at the edge it removes as many; which ones, the stock warper leaves open.)

    The stock warper sorts values with their indices and scatters the result back, which costs more than a small
    network. Only the sorted *values* are needed: they give the number of tokens to remove and the value of the first
    one kept. Tokens of exactly that value are removed in the order of their ids, as a stable sort would.

    Args:
        top_p (`float`): the smallest set of most probable tokens whose probabilities add up to `top_p` is kept.
        min_tokens_to_keep (`int`).
    """

    def __init__(self, top_p: float, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1):
        self.top_p = float(top_p)
        if not 0 <= self.top_p <= 1.0:
            raise ValueError(f"`top_p` has to be a float between 0 and 1, but is {top_p}")
        if not isinstance(min_tokens_to_keep, int) or min_tokens_to_keep < 1:
            raise ValueError(f"`min_tokens_to_keep` has to be a positive integer, but is {min_tokens_to_keep}")
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ascending = _sorted_values(scores)
        cumulative = ascending.softmax(dim=-1).cumsum(dim=-1)
        # both arrays ascend, so counting is a binary search
        limit = torch.full_like(cumulative[:, :1], 1 - self.top_p)
        num_removed = torch.searchsorted(cumulative, limit, right=True)
        num_removed = num_removed.clamp_(max=scores.shape[-1] - self.min_tokens_to_keep)
        threshold = ascending.gather(-1, num_removed)
        filtered = scores.masked_fill(scores < threshold, self.filter_value)

        ties_to_remove = num_removed - torch.searchsorted(ascending, threshold)
        if (ties_to_remove > 0).any():
            tied = scores == threshold
            filtered = filtered.masked_fill(tied & (tied.cumsum(dim=-1) <= ties_to_remove), self.filter_value)
        return filtered


def _sorted_values(scores: torch.Tensor) -> torch.Tensor:
    # numpy sorts float32 values about ten times faster than torch on a CPU, which always sorts the indices too
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(scores.detach().numpy(), axis=-1))
    return scores.sort(dim=-1).values


def sample_from_scores(scores: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """
    One draw per row from softmax(scores), (batch, vocab) -> (batch,), by inverting the cumulative distribution.

    The distribution of `torch.multinomial` with one random number per row instead of one per token.

    Args:
        batch_size: if the rows are those of several batches behind each other, for the errors.

    Raises:
        ValueError: naming the row, if it holds NaN or +inf, or no token is possible.
    """
    cumulative = scores.softmax(dim=-1).cumsum_(dim=-1)
    ids = _draw(cumulative)
    _check_drawn(cumulative[:, -1], batch_size=batch_size)
    return ids.squeeze(-1)


def best_from_scores(scores: torch.Tensor) -> torch.Tensor:
    """
    The most probable token of every row, (batch, vocab) -> (batch,).

    Raises:
        ValueError: naming the row, if it holds NaN, or no token is possible.
    """
    ids = scores.argmax(dim=-1, keepdim=True)
    is_possible = scores.gather(-1, ids) > -torch.inf
    if not is_possible.all():
        row = int((~is_possible).nonzero()[0, 0])
        raise ValueError(f"scores of row {row} hold NaN, or no token is possible: nothing can be chosen")
    return ids.squeeze(-1)


def _draw(cumulative: torch.Tensor) -> torch.LongTensor:
    """Ids, (batch, 1), from the cumulative distribution. Where that is NaN, an id means nothing: see `_check_drawn`."""
    total = cumulative[:, -1:]
    # in (0, total]: the first id whose cumulative reaches the draw never has probability zero
    uniform = torch.addcmul(total, total, torch.rand(total.shape, dtype=total.dtype, device=total.device), value=-1)
    return torch.searchsorted(cumulative, uniform).clamp_(max=cumulative.shape[-1] - 1)


def _check_drawn(totals: torch.Tensor, rows: torch.Tensor | None = None, batch_size: int | None = None):
    """
    Args:
        totals: (batch,) sums of the probabilities.
        rows: their numbers in the batch, if they are some of its rows.
        batch_size: if the rows are those of several batches behind each other.
    """
    # false for NaN as well
    if not float(totals.min()) > 0:
        is_drawn = totals > 0
        row = int((~is_drawn).nonzero()[0, 0])
        row = row if rows is None else int(rows[row])
        row = row if batch_size is None else row % batch_size
        raise ValueError(f"scores of row {row} hold NaN or +inf, or no token is possible: nothing can be drawn")


def sample_from_nucleus(scores: torch.Tensor, nucleus: NucleusLogitsWarper) -> torch.Tensor:
    """
    One draw per row from softmax(nucleus(scores)), (batch, vocab) -> (batch,), without sorting most rows.

    Draws from all tokens and looks whether the drawn one is in the nucleus: it is, if the tokens less probable than it
    hold more than `1 - top_p`. That is one sum. Rows where it is not, or where rounding could decide, are cut by
    `nucleus` itself and, if the token is gone, drawn again. Accepting a draw from the whole or drawing from the nucleus
    gives the nucleus' distribution.
    """
    probs = scores.softmax(dim=-1)
    cumulative = probs.cumsum(dim=-1)
    ids = _draw(cumulative)
    drawn = probs.gather(-1, ids)
    totals = cumulative[:, -1].clone()
    # the comparison as numbers, not booleans: then both operations are vectorised, an eighth of the time of a mask; in
    # memory that is there already, because that of new tensors has to be fetched first
    is_rarer = torch.lt(probs, drawn, out=cumulative)
    tail = is_rarer.mul_(probs).sum(dim=-1, keepdim=True) + drawn
    # far above the rounding of the sums; false for NaN
    least = 1 - nucleus.top_p + 1e-4
    ids = ids.squeeze(-1)
    if not float(tail.min()) > least:
        doubtful = (~(tail > least)).squeeze(-1).nonzero().squeeze(-1)
        _check_drawn(totals[doubtful], rows=doubtful)
        cut = nucleus(None, scores[doubtful])
        redrawn = sample_from_scores(cut)
        is_kept = cut.gather(-1, ids[doubtful].unsqueeze(-1)).squeeze(-1) != nucleus.filter_value
        ids[doubtful] = torch.where(is_kept, ids[doubtful], redrawn)
    return ids


class MultiStreamLogitsProcessorList:
    """One standard `LogitsProcessorList` per stream, after the joint processors."""

    def __init__(
        self,
        joint: list[JointLogitsProcessor],
        streams: list[LogitsProcessorList],
        eos_token_ids: torch.Tensor | None,
        draw_nucleus: bool,
    ):
        self.joint = joint
        self.streams = streams
        self.eos_token_ids = eos_token_ids
        # a nucleus cut at the very end need not be made if only the draw from it is wanted
        self.nuclei: list[NucleusLogitsWarper | None] = [
            processors.pop() if draw_nucleus and processors and type(processors[-1]) is NucleusLogitsWarper else None
            for processors in streams
        ]

    def draw(self, scores: Scores) -> torch.LongTensor:
        """One id per row and stream, (batch, streams), from processed scores."""
        if len({stream_scores.shape for stream_scores in scores}) == 1 and not any(self.nuclei):
            # small vocabularies of one size: one draw instead of one per stream
            batch_size = scores[0].shape[0]
            return sample_from_scores(torch.cat(scores), batch_size).view(len(scores), batch_size).t()
        return torch.stack(
            [
                sample_from_scores(stream_scores) if nucleus is None else sample_from_nucleus(stream_scores, nucleus)
                for stream_scores, nucleus in zip(scores, self.nuclei)
            ],
            dim=-1,
        )

    def __call__(self, input_ids: torch.LongTensor, scores: Scores) -> Scores:
        for processor in self.joint:
            scores = processor(input_ids, scores)
        processed = ()
        for stream, (processors, stream_scores) in enumerate(zip(self.streams, scores)):
            stream_ids = input_ids[..., stream]
            # `LogitsProcessorList.__call__` inspects every signature at every step, for arguments that never come here
            for processor in processors:
                stream_scores = processor(stream_ids, stream_scores)
            processed += (stream_scores,)
        return processed


class MultiStreamEosCriteria(StoppingCriteria):
    """
    A row stops when its last ids are end-of-sequence ids, each stream compared with its own.

    Args:
        eos_token_ids: one id per stream.
        mode (`"any"` or `"all"`): whether one stream or all of them must have ended.
    """

    def __init__(self, eos_token_ids: torch.Tensor, mode: str = "any"):
        # the name under which the generation loop recognises an end-of-sequence criterion
        self.eos_token_id = eos_token_ids
        self.mode = mode

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        ended = input_ids[:, -1] == self.eos_token_id.to(input_ids.device)
        return ended.any(dim=-1) if self.mode == "any" else ended.all(dim=-1)


@dataclass
class GenerateMultiStreamOutput(GenerateDecoderOnlyOutput):
    """
    Args:
        sequences (`(batch, length, streams)`): prompt and generated ids.
        scores, logits (tuple over steps of tuples over streams of `(batch, vocab_k)`).
        continuous (dict of `(batch, length, ...)` tensors): values of the continuous streams, if the model has any.
        num_hits (`(batch,)`): hits of every row, if the streams are delayed against each other.
        past_key_values: `None` if rows that had finished were taken out of the batch.
    """

    continuous: dict[str, torch.Tensor] | None = None
    num_hits: torch.LongTensor | None = None


class MultiStreamGenerationMixin(GenerationMixin):
    """
    `GenerationMixin` for `input_ids` of shape (batch, length, streams).

    A model may define `make_decoder(past_key_values, **model_kwargs)`, which returns a callable that does what
    `forward` does for one more position, with less bookkeeping: in a small network that costs more than the arithmetic.
    Its output has `logits`, a tuple of (batch, vocab_k), and what `_choose_next` of the model looks at.

    The config provides `stream_bos_token_ids`, `stream_eos_token_ids` and `stream_pad_token_ids` (one per stream) and
    `num_conditioning_tokens`, the leading positions that hold continuous conditioning. `forward` returns `logits` as
    a tuple with one tensor per stream.

    Delayed streams: with `config.stream_delays` hit i of a stream with delay d stands at position `1 + d + i` from BOS,
    so that inside a hit the stream with the smaller delay is drawn first and seen by the others. A stream that has not
    begun holds its BOS id, one that is ahead at the end its EOS id. `config.max_stream_delay` may be larger than that
    of the token streams, if a continuous stream comes last.

    Differences from the stock behaviour, all of them consequences of several streams:

    * a processor passed in `logits_processor` acts on every stream; wrap it in [`StreamLogitsProcessor`] to restrict
      it, derive it from [`JointLogitsProcessor`] to see all streams;
    * `generation_config.stream_overrides`, e.g. `{"1": {"temperature": 1.1}}`, sets parameters of single streams;
    * `scores` and `logits` of the returned output are tuples (steps) of tuples (streams);
    * a row that ends gets the end-of-sequence id in every stream, then each stream's pad id;
    * rows that have ended are taken out of the batch from time to time, so that they cost nothing
      (`generation_config.drop_finished_rows = False` keeps them);
    * greedy search and sampling only.
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]
    stream_eos_mode = "any"
    # inputs of shape (batch, length, ...) that `_choose_next` gives values for and the output returns
    continuous_streams: tuple[str, ...] = ()
    # inputs that stopping criteria get as keyword arguments, beside `state`
    stopping_inputs: tuple[str, ...] = ()

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        """Without `input_ids`, every row of the conditioning tensors starts with its slots and one SOS."""
        if inputs is not None:
            if inputs.ndim != 3 or inputs.shape[-1] != self.config.num_streams:
                raise ValueError(
                    f"`input_ids` has shape {tuple(inputs.shape)}, expected (batch, length, {self.config.num_streams})"
                )
            pad = torch.tensor(self.config.stream_pad_token_ids, device=inputs.device)
            padded = (inputs[:, -1] == pad).all(dim=-1)
            if padded.any() and model_kwargs.get("past_key_values") is None:
                row = int(padded.nonzero()[0, 0])
                raise ValueError(f"`input_ids`: row {row} ends with a pad, prompts must be padded on the left")
            return inputs
        batch_size = next((value.shape[0] for value in model_kwargs.values() if isinstance(value, torch.Tensor)), 1)
        bos = torch.tensor(self.config.stream_bos_token_ids, dtype=torch.long, device=self.device)
        return bos.repeat(batch_size, self.config.num_conditioning_tokens + 1, 1)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """A position is padding when all its streams hold their pad ids."""
        pad = torch.tensor(self.config.stream_pad_token_ids, device=inputs_tensor.device)
        return (inputs_tensor != pad).any(dim=-1).long()

    def _get_logits_processor(self, generation_config: GenerationConfig, logits_processor=None, **kwargs):
        processors = list(logits_processor) if logits_processor is not None else []
        joint = [processor for processor in processors if isinstance(processor, JointLogitsProcessor)]
        single = [processor for processor in processors if not isinstance(processor, JointLogitsProcessor)]
        overrides = self._stream_overrides(generation_config)
        # stock processors that look at the prompt expect 2-D ids
        kwargs["encoder_input_ids"] = None
        eos_token_ids = self._stream_eos_token_ids(generation_config)

        streams = []
        for stream in range(self.config.num_streams):
            stream_config = copy.copy(generation_config)
            unknown = stream_config.update(**overrides.get(stream, {}))
            if unknown:
                raise ValueError(f"`stream_overrides` of stream {stream}: no parameter {next(iter(unknown))}")
            stream_config._eos_token_tensor = None if eos_token_ids is None else eos_token_ids[stream : stream + 1]
            of_stream = [p for p in single if getattr(p, "stream", stream) == stream]
            built = super()._get_logits_processor(
                generation_config=stream_config, logits_processor=LogitsProcessorList(of_stream), **kwargs
            )
            streams.append(LogitsProcessorList(_faster_nucleus(processor) for processor in built))
        wants_scores = generation_config.return_dict_in_generate and generation_config.output_scores
        return MultiStreamLogitsProcessorList(
            joint, streams, eos_token_ids, draw_nucleus=generation_config.do_sample and not wants_scores
        )

    def _get_stopping_criteria(self, generation_config: GenerationConfig, stopping_criteria=None, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        # the stock criterion would look for one id in all streams, where it may be an ordinary one
        criteria = StoppingCriteriaList(c for c in criteria if type(c) is not EosTokenCriteria)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                # its warning counts conditioning slots as positions
                criterion.max_position_embeddings = None
        eos_token_ids = self._stream_eos_token_ids(generation_config)
        if eos_token_ids is not None:
            # the last of delayed streams ends after the others
            delayed = any(getattr(self.config, "stream_delays", None) or ())
            criteria.append(MultiStreamEosCriteria(eos_token_ids, "all" if delayed else self.stream_eos_mode))
        return criteria

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if type(model_kwargs.get("past_key_values")) is DynamicCache:
            growing_cache(model_kwargs["past_key_values"])

    def _stream_overrides(self, generation_config: GenerationConfig) -> dict[int, dict]:
        """`stream_overrides` by number of the stream; JSON has the numbers as strings."""
        overrides = getattr(generation_config, "stream_overrides", None) or {}
        names = [str(stream) for stream in range(self.config.num_streams)]
        for key in overrides:
            if str(key) not in names:
                raise ValueError(f"`stream_overrides` has the stream {key!r}, expected one of {', '.join(names)}")
        return {int(key): settings for key, settings in overrides.items()}

    def _stream_eos_token_ids(self, generation_config: GenerationConfig) -> torch.Tensor | None:
        """One end-of-sequence id per stream, (streams,), or `None` if `eos_token_id` was switched off."""
        if generation_config._eos_token_tensor is None or (generation_config._eos_token_tensor < 0).any():
            return None
        return torch.tensor(self.config.stream_eos_token_ids, device=generation_config._eos_token_tensor.device)

    def _choose_next(
        self,
        input_ids: torch.LongTensor,
        step_scores: Scores,
        logits_processor: MultiStreamLogitsProcessorList,
        outputs,
        generation_config: GenerationConfig,
        state: "StreamState",
    ) -> tuple[torch.LongTensor, dict[str, torch.Tensor]]:
        """
        Draws the next position from the processed scores of all streams: ids (batch, streams), and the next value
        (batch, ...) of every continuous stream. Models with continuous streams override this.
        """
        if generation_config.do_sample:
            next_tokens = logits_processor.draw(step_scores)
        else:
            next_tokens = torch.stack([best_from_scores(scores) for scores in step_scores], dim=-1)
        eos_token_ids = logits_processor.eos_token_ids
        if state.is_delayed:
            next_tokens = state.apply_delays(next_tokens, input_ids.shape[1], eos_token_ids)
        elif eos_token_ids is not None and self.stream_eos_mode == "any":
            ended = (next_tokens == eos_token_ids).any(dim=-1, keepdim=True)
            next_tokens = torch.where(ended, eos_token_ids, next_tokens)
        return next_tokens, {}

    def _continuous(self, model_kwargs: dict) -> dict[str, torch.Tensor]:
        return {name: model_kwargs[name] for name in self.continuous_streams if name in model_kwargs}

    def _finish_sequences(
        self,
        sequences: torch.LongTensor,
        continuous: dict[str, torch.Tensor],
        generation_config: GenerationConfig,
        state: "StreamState",
    ) -> tuple[torch.LongTensor, dict[str, torch.Tensor], torch.LongTensor | None]:
        """Last touch on what all rows have become; also returns the number of hits of every row, if it is known."""
        return sequences, continuous, state.num_hits(sequences.shape[1]) if state.is_delayed else None

    def _may_drop_rows(self, logits_processor, stopping_criteria, generation_config, model_kwargs: dict) -> bool:
        """Whether nothing but the loop itself holds on to the rows of the batch."""
        cache = model_kwargs.get("past_key_values")
        processors = [*logits_processor.joint, *(p for processors in logits_processor.streams for p in processors)]
        return (
            getattr(generation_config, "drop_finished_rows", True)
            and (cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0))
            and not any(_keeps_rows(part) for part in [*processors, *stopping_criteria])
        )

    def _decodes_directly(self, input_ids: torch.LongTensor, generation_config, model_kwargs: dict) -> bool:
        """
        Whether `make_decoder` can stand in for `forward`: all rows at the same position, a plain growing cache, nothing
        recorded or hooked.
        """
        cache = model_kwargs.get("past_key_values")
        position_ids = model_kwargs.get("position_ids")
        attention_mask = model_kwargs.get("attention_mask")
        expected = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (
            hasattr(self, "make_decoder")
            and self.config._attn_implementation == "sdpa"
            and type(cache) is DynamicCache
            and all(type(layer) is GrowingLayer for layer in cache.layers)
            and (attention_mask is None or bool((attention_mask == 1).all()))
            and (position_ids is None or bool((position_ids == expected).all()))
            and not (generation_config.output_attentions or generation_config.output_hidden_states)
            and not hasattr(self, "hf_device_map")
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        )

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: MultiStreamLogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ) -> GenerateMultiStreamOutput | torch.LongTensor:
        """The library's loop for greedy search and sampling, with a tuple of logits and a row of ids per step."""
        return_dict = generation_config.return_dict_in_generate
        collected = {
            name: () if return_dict and getattr(generation_config, f"output_{name}") else None
            for name in ("scores", "logits", "attentions", "hidden_states")
        }
        collects = any(value is not None for value in collected.values())
        pad = torch.tensor(self.config.stream_pad_token_ids, device=input_ids.device)
        may_drop = streamer is None and not synced_gpus and not collects
        may_drop = may_drop and self._may_drop_rows(
            logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        state = StreamState(
            self.config, input_ids, model_kwargs.get("attention_mask"), model_kwargs.pop("num_hits", None)
        )
        num_rows = input_ids.shape[0]
        rows = torch.arange(num_rows, device=input_ids.device)
        parts = []  # (rows, ids, continuous streams, state) of the rows that were taken out
        unfinished = torch.ones(num_rows, 1, dtype=torch.bool, device=input_ids.device)
        num_unfinished = num_rows
        all_finished = False

        model_forward = (
            self.get_compiled_call(generation_config.compile_config)
            if self._valid_auto_compile_criteria(model_kwargs, generation_config)
            else self.__call__
        )
        outputs = self._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        decoder = None
        decodes_directly = self._decodes_directly(input_ids, generation_config, model_kwargs)

        # the bookkeeping of autograd is a tenth of a step, even under `no_grad`
        with torch.inference_mode() if decodes_directly and not collects else contextlib.nullcontext():
            while self._has_unfinished_sequences(all_finished, synced_gpus, device=input_ids.device):
                if outputs is None and decodes_directly:
                    if decoder is None:
                        decoder = self.make_decoder(**model_kwargs)
                    outputs = decoder(input_ids[:, -1:], **model_kwargs)
                else:
                    if outputs is None:
                        model_inputs = self.prepare_inputs_for_generation(
                            input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
                        )
                        outputs = model_forward(**model_inputs, return_dict=True)
                    model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
                if synced_gpus and all_finished:
                    outputs = None
                    continue

                step_logits = tuple(_last_position(logits, input_ids.device) for logits in outputs.logits)
                step_scores = logits_processor(input_ids, step_logits)
                for name, value in (("scores", step_scores), ("logits", step_logits)):
                    if collected[name] is not None:
                        collected[name] += (value,)
                for name in ("attentions", "hidden_states"):
                    if collected[name] is not None:
                        collected[name] += (getattr(outputs, name),)

                next_tokens, next_values = self._choose_next(
                    input_ids, step_scores, logits_processor, outputs, generation_config, state
                )
                # a row that has finished is filled up
                has_finished = num_unfinished < len(rows)
                if has_finished:
                    next_tokens = torch.where(unfinished, next_tokens, pad)
                input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=1)
                for name, values in next_values.items():
                    if has_finished:
                        mask = unfinished.view(-1, *[1] * (values.ndim - 1))
                        values = torch.where(mask, values, torch.zeros_like(values))
                    values = values.to(model_kwargs[name].dtype)
                    model_kwargs[name] = torch.cat([model_kwargs[name], values[:, None]], dim=1)
                if streamer is not None:
                    streamer.put(next_tokens.cpu())
                inputs = {name: model_kwargs[name] for name in self.stopping_inputs}
                stopped = _stopped(stopping_criteria, input_ids, collected["scores"], state=state, **inputs)
                if stopped is not None and bool((stopped & unfinished.squeeze(-1)).any()):
                    state.lengths = torch.where(stopped & unfinished.squeeze(-1), input_ids.shape[1], state.lengths)
                    unfinished = unfinished & ~stopped.unsqueeze(-1)
                    num_unfinished = int(unfinished.sum())
                    all_finished = num_unfinished == 0
                outputs = None

                # every time the batch shrinks by a quarter: the copies then cost less than the rows would
                if may_drop and 0 < num_unfinished <= 0.75 * len(rows):
                    done = (~unfinished).squeeze(-1)
                    continuous = self._continuous(model_kwargs)
                    parts.append((rows[done], input_ids[done], _select(continuous, done), state.select(done)))
                    keep = unfinished.squeeze(-1)
                    cache = model_kwargs.get("past_key_values")
                    if cache is not None:
                        cache.batch_select_indices(keep.nonzero().squeeze(-1))
                    model_kwargs = _select(model_kwargs, keep, len(rows))
                    rows, input_ids, state, unfinished = (
                        rows[keep],
                        input_ids[keep],
                        state.select(keep),
                        unfinished[keep],
                    )
                    decoder = None

        if streamer is not None:
            streamer.end()
        continuous = self._continuous(model_kwargs)
        past_key_values = model_kwargs.get("past_key_values") if not parts else None
        if parts:
            parts.append((rows, input_ids, continuous, state))
            input_ids, continuous, state = _join(parts, num_rows, pad)
        input_ids, continuous, num_hits = self._finish_sequences(
            # clones, because what was made in inference mode cannot be used in training
            input_ids.clone(),
            {name: values.clone() for name, values in continuous.items()},
            generation_config,
            state,
        )
        if not return_dict:
            return input_ids
        return GenerateMultiStreamOutput(
            sequences=input_ids,
            past_key_values=past_key_values,
            continuous=continuous or None,
            num_hits=num_hits,
            **collected,
        )


class StreamState:
    """
    Where the rows of a batch with delayed streams stand.

    Args:
        config: with `stream_delays` and what [`MultiStreamGenerationMixin`] needs.
        input_ids (`(batch, length, streams)`), attention_mask (`(batch, length)`): the prompt; padded on the left.
        num_hits (`(batch,)`): exact number of hits of every row.

    Attributes:
        end (`(batch,)`): index of the first hit that will not be produced, `NEVER` as long as it is unknown.
        pads (`(batch,)`): padded positions in front of the row.
        lengths (`(batch,)`): positions of the row, padding in front included, `NEVER` as long as it goes on.
        num_before: positions in front of hit 0, padding excluded.
        has_given_ends: whether `num_hits` was given, so that every end is known.
        first_full_length: the position from which on every stream of every row has begun.
        votes, is_stopped (`(batch,)`): for a stopping criterion: how often in a row it said stop, whether it set `end`.
    """

    row_attributes = ("end", "pads", "lengths", "votes", "is_stopped")

    def __init__(
        self,
        config,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        num_hits: torch.LongTensor | None = None,
    ):
        # read once, because the reading of a config costs as much as a small operation
        self.num_before = config.num_conditioning_tokens + 1
        delays = getattr(config, "stream_delays", None) or (0,) * config.num_streams
        self.is_delayed = any(delays) or getattr(config, "max_stream_delay", 0) > 0
        device = input_ids.device
        self.delays = torch.tensor(delays, device=device)
        self.max_delay = getattr(config, "max_stream_delay", max(delays))
        self.begin_ids = torch.tensor(config.stream_bos_token_ids, device=device)
        self.end_ids = torch.tensor(config.stream_eos_token_ids, device=device)
        self.end = torch.full(input_ids.shape[:1], NEVER, device=device) if num_hits is None else num_hits.clone()
        self.has_given_ends = num_hits is not None
        self.lengths = torch.full_like(self.end, NEVER)
        self.votes = torch.zeros_like(self.end)
        self.is_stopped = torch.zeros_like(self.end, dtype=torch.bool)
        self.pads = torch.zeros_like(self.end)
        if attention_mask is not None and attention_mask.ndim == 2:
            self.pads = (attention_mask == 0).sum(dim=-1)
        self.first_full_length = int(self.pads.max()) + self.num_before + self.max_delay
        if num_hits is not None:
            self._check_prompt(input_ids)

    def _check_prompt(self, input_ids: torch.LongTensor):
        """No row may hold hits behind its last one."""
        length = input_ids.shape[1]
        hit = self.first_hit(torch.arange(length, device=input_ids.device).unsqueeze(-1)).t()
        too_many = (hit.unsqueeze(-1) - self.delays >= self.end[:, None, None]) & (input_ids != self.end_ids)
        if too_many.any():
            row = int(too_many.nonzero()[0, 0])
            raise ValueError(f"`num_hits`: row {row} is {self.end[row].item()}, but its prompt holds more hits")

    def first_hit(self, length: int | torch.LongTensor) -> torch.LongTensor:
        """Index of the hit that a stream without delay has at position `length`, (batch,)."""
        return length - self.num_before - self.pads

    def apply_delays(
        self, next_tokens: torch.LongTensor, length: int, eos_token_ids: torch.LongTensor | None
    ) -> torch.LongTensor:
        """
        The drawn ids of position `length`, (batch, streams), with BOS ids where a stream has not begun and EOS ids
        where it is past the last hit; a drawn EOS ends the row at that hit.
        """
        hit = self.first_hit(length).unsqueeze(-1) - self.delays
        if eos_token_ids is not None:
            ends = torch.where((next_tokens == eos_token_ids) & (hit >= 0), hit, NEVER)
            self.end = torch.minimum(self.end, ends.amin(dim=-1))
        if length < self.first_full_length:
            next_tokens = torch.where(hit < 0, self.begin_ids, next_tokens)
        return torch.where(hit >= self.end.unsqueeze(-1), self.end_ids, next_tokens)

    def num_hits(self, length: int) -> torch.LongTensor:
        """Complete hits of every row of sequences of this length, (batch,)."""
        complete = self.first_hit(self.lengths.clamp(max=length)) - self.max_delay
        return torch.minimum(self.end, complete).clamp(min=0)

    def select(self, rows: torch.Tensor) -> "StreamState":
        selected = copy.copy(self)
        for name in self.row_attributes:
            setattr(selected, name, getattr(self, name)[rows])
        return selected


def _last_position(logits: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(batch, length, vocab), or (batch, vocab) of a decoder, to float32 (batch, vocab)."""
    if logits.ndim == 3:
        logits = logits[:, -1]
    if logits.dtype == torch.float32 and logits.device == device:
        # saves the library from looking at every argument, at every step
        return logits
    return logits.to(dtype=torch.float32, device=device)


def _stopped(
    criteria: StoppingCriteriaList, input_ids: torch.LongTensor, scores: tuple | None, **kwargs
) -> torch.BoolTensor | None:
    """
    `criteria(input_ids, scores, **kwargs)`, (batch,), where the maximum length is a comparison of two integers; `None`
    if no criterion had anything to say.
    """
    stopped = None
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            too_long = input_ids.shape[1] >= criterion.max_length
            says_stop = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device) if too_long else None
        else:
            says_stop = criterion(input_ids, scores, **kwargs)
        if says_stop is not None:
            stopped = says_stop if stopped is None else stopped | says_stop
    return stopped


def _select(values: dict, rows: torch.BoolTensor, num_rows: int | None = None) -> dict:
    """The given rows of all tensors that have one entry per row (a batch of one has no rows to leave out)."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and num_rows in (None, value.shape[0]) else value
        for name, value in values.items()
    }


def _join(parts: list[tuple], num_rows: int, pad: torch.LongTensor) -> tuple[torch.LongTensor, dict, StreamState]:
    """The rows that were taken out at different lengths, and those that were left, as one batch in the first order."""
    _, ids, continuous, state = parts[-1]
    sequences = pad.repeat(num_rows, ids.shape[1], 1)
    joined = {name: values.new_zeros(num_rows, *values.shape[1:]) for name, values in continuous.items()}
    order = torch.cat([rows for rows, *_ in parts]).argsort()
    for rows, part_ids, part_continuous, _ in parts:
        sequences[rows, : part_ids.shape[1]] = part_ids
        for name, values in part_continuous.items():
            joined[name][rows, : values.shape[1]] = values
    state = copy.copy(state)
    for name in state.row_attributes:
        setattr(state, name, torch.cat([getattr(part[-1], name) for part in parts])[order])
    return sequences, joined, state


def _keeps_rows(part) -> bool:
    """Whether a logits processor or stopping criterion might hold something for every row: one from elsewhere."""
    inner = getattr(part, "processor", part)
    if isinstance(inner, PrefixConstrainedLogitsProcessor):
        # its function is asked with the number of the row
        return True
    package = __name__.rpartition(".")[0]
    return getattr(inner, "keeps_rows", not type(inner).__module__.startswith(("transformers.", package)))


def _faster_nucleus(processor: LogitsProcessor) -> LogitsProcessor:
    if type(processor) is TopPLogitsWarper:
        return NucleusLogitsWarper(processor.top_p, processor.filter_value, processor.min_tokens_to_keep)
    return processor
