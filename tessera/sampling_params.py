"""Sampling parameters: how the tokens of one request are chosen, with every value checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.errors import RequestError

MAX_SEQUENCES_PER_REQUEST = 128
MAX_TOP_LOGPROBS = 64
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 4096
MIN_TEMPERATURE = 1e-5
MAX_LOGIT_BIASES = 4096
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen; names, meanings and defaults are vLLM's.

    Raises RequestError, naming the field, when a value is impossible.
    """

    n: int = 1
    """Sequences to generate from the prompt; the i-th uses `seed + i`."""
    temperature: float = 1.0
    """Divides the logits; below 1e-5, as at 0, the most likely token is taken (greedy)."""
    top_k: int = 0
    """Sample among the k most likely tokens only; 0 or -1: among all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token already in prompt or output less likely (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as it is already in the output."""
    seed: int | None = None
    """Same seed, same text, whatever else is in the batch; None: drawn from the engine's seed."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids, -100 to 100."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text; a single string is accepted too."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end the sequence."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: until the context is full."""
    min_tokens: int = 0
    """Tokens to generate before an end token or stop string counts."""
    logprobs: int | None = None
    """Return each token's log-probability and this many of the most likely ones. They are those of the
    model itself: before penalties, bias, temperature and truncation."""
    prompt_logprobs: int | None = None
    """The same for every prompt token."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        _normalise(self)
        _check_sampling(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether tokens already seen change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _normalise(params: SamplingParams) -> None:
    """Bring the spellings vLLM takes (`stop="x"`, None for no stops, top_k=-1) into one form."""
    stop: object = params.stop
    if isinstance(stop, str):
        object.__setattr__(params, "stop", [stop])
    elif stop is None:
        object.__setattr__(params, "stop", [])
    elif not isinstance(stop, list):
        raise RequestError(f"stop must be a string or a list of strings, got {stop!r:.60}", param="stop")
    ids: object = params.stop_token_ids
    if ids is None:
        object.__setattr__(params, "stop_token_ids", [])
    elif not isinstance(ids, list):
        raise RequestError(f"stop_token_ids must be a list of token ids, got {ids!r:.60}", param="stop_token_ids")
    if params.top_k == -1:
        object.__setattr__(params, "top_k", 0)


def _check_sampling(params: SamplingParams) -> None:
    _check_int("n", params.n, 1, MAX_SEQUENCES_PER_REQUEST)
    _check_float("temperature", params.temperature, 0.0, 100.0)
    _check_int("top_k", params.top_k, 0, 2**31 - 1)
    _check_float("top_p", params.top_p, 0.0, 1.0, open_low=True)
    _check_float("min_p", params.min_p, 0.0, 1.0)
    _check_float("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    _check_float("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_float("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if params.seed is not None:
        _check_int("seed", params.seed, -(2**63), MAX_SEED)
    if params.max_tokens is not None:
        _check_int("max_tokens", params.max_tokens, 0, 2**31 - 1)
    _check_int("min_tokens", params.min_tokens, 0, 2**31 - 1)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}", param="min_tokens"
        )
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None:
            _check_int(name, value, 0, MAX_TOP_LOGPROBS)
    _check_stops(params)
    _check_logit_bias(params.logit_bias)


def _check_logit_bias(biases: object) -> None:
    if biases is None:
        return
    if not isinstance(biases, dict) or len(biases) > MAX_LOGIT_BIASES:
        raise RequestError(
            f"logit_bias must map token ids to numbers, at most {MAX_LOGIT_BIASES}, got {biases!r:.60}",
            param="logit_bias",
        )
    for token_id, bias in biases.items():
        _check_token_id("logit_bias", token_id)
        _check_float("logit_bias", bias, -100.0, 100.0)


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOP_STRINGS or len(params.stop_token_ids) > MAX_STOP_STRINGS:
        raise RequestError(
            f"{len(params.stop)} stop strings and {len(params.stop_token_ids)} stop token ids were given, "
            f"at most {MAX_STOP_STRINGS} of each are taken",
            param="stop",
        )
    if sum(len(text) for text in params.stop if isinstance(text, str)) > MAX_STOP_CHARACTERS:
        raise RequestError(f"stop has more than {MAX_STOP_CHARACTERS} characters in all its strings", param="stop")
    for text in params.stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop must be strings of 1 to {MAX_STOP_CHARACTERS} characters, got {text!r:.60}", param="stop"
            )
    for token_id in params.stop_token_ids:
        _check_token_id("stop_token_ids", token_id)


def _check_token_id(name: str, value: object) -> None:
    try:
        _check_int(name, value, 0, 2**31 - 1)
    except RequestError as error:
        raise RequestError(f"a token id of {error.message}", param=name) from None


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r:.60}", param=name)


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low <= value <= high) or (open_low and value == low):  # type: ignore[operator]
        above = "above" if open_low else "from"
        raise RequestError(f"{name} must be a number {above} {low:g} to {high:g}, got {value!r:.60}", param=name)
