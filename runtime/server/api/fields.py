"""Fields of requests that no model of :mod:`schemas` reads, and what becomes of them.

A field that could change the answer is refused by its name, unless its value asks for nothing. An
unknown field is refused too, since it may be a known one misspelt.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eoracc.errors import ApiError
from eoracc.runtime.server.api.errors import bad_request

__all__ = [
    "CHAT_FIELDS",
    "COMPLETION_FIELDS",
    "MESSAGE_FIELDS",
    "PART_FIELDS",
    "REQUEST_FIELDS",
    "STREAM_FIELDS",
    "UnreadFields",
]

_LONGEST_NAME = 64
"""Most characters of a field's name that an error repeats."""


@dataclass(frozen=True)
class UnreadFields:
    """Treatment of the fields of an object that its model does not read.

    Attributes:
      harmless: fields that cannot change the answer; every value is accepted.
      neutral: unsupported fields, with the values besides null that ask for nothing.
      instead: fields, known or not, with what to use in their place.
    """

    harmless: frozenset[str] = frozenset()
    neutral: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)

    def check(self, given: Mapping[str, Any], *, known: Iterable[str], parent: str = "") -> None:
        """Check the fields that the model of an object does not read.

        Args:
          given: their values by name.
          known: fields that the model reads, for suggestions.
          parent: path of the object in the request, such as ``messages.0``.

        Raises:
          ApiError: a field is unsupported or unknown, and its value is not neutral; it names it.
        """
        for name, value in given.items():
            if value is None or name in self.harmless:
                continue
            accepted = self.neutral.get(name, ())
            if not any(_is_same(value, neutral) for neutral in accepted):
                raise self._refusal(name, accepted, known, parent)

    def properties(self) -> dict[str, Any]:
        """The fields in the form of a JSON schema."""
        harmless = {
            name: {"description": "Accepted; has no effect."} for name in sorted(self.harmless)
        }
        neutral = {
            name: {"description": "Not supported.", "enum": [None, *values]}
            for name, values in self.neutral.items()
        }
        return harmless | neutral

    def _refusal(
        self, name: str, accepted: Sequence[Any], known: Iterable[str], parent: str
    ) -> ApiError:
        shown = _shown(name)
        path = f"{parent}.{shown}" if parent else shown
        supported = name in self.neutral or name in self.instead
        problem = "is not supported" if supported else "is not a field of this request"
        way_out = self.instead.get(name)
        if way_out is None and supported:
            values = " or ".join(json.dumps(value) for value in accepted)
            way_out = f"leave it out or set it to {values}" if values else "leave it out"
        elif way_out is None:
            close = difflib.get_close_matches(shown, list(known), n=1)
            way_out = f"use '{close[0]}', or leave it out" if close else "leave it out"
        code = "unsupported" if supported else "unknown_parameter"
        return bad_request(f"{path}: {problem}: {way_out}", path, code)


def _is_same(value: object, neutral: object) -> bool:
    """Equality of JSON, where true is not 1 and a member of null is none."""
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    return isinstance(value, bool) is isinstance(neutral, bool) and value == neutral


def _shown(name: str) -> str:
    """A client's name for a field, printable and short."""
    text = ascii(name)[1:-1]
    return text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "..."


_USE_MAX_TOKENS = "use max_tokens"
_USE_TEMPLATE = "give chat_template_kwargs what the chat template knows instead"
_NO_STRUCTURE = "answers cannot be constrained to a form, leave it out"

REQUEST_FIELDS = UnreadFields(
    harmless=frozenset(
        {
            # Identify the client or help a scheduler, a cache or a log.
            "cache_prompt",
            "cache_salt",
            "id_slot",
            "keep_alive",
            "metadata",
            "priority",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "request_id",
            "rid",
            "safety_identifier",
            "user",
            # Details of what is refused when it is asked for itself.
            "dry_allowed_length",
            "dry_base",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
            "dynatemp_exponent",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "mirostat_eta",
            "mirostat_tau",
            "n_discard",
            "n_keep",
            "parallel_tool_calls",
            "parse_tool_calls",
            "spaces_between_special_tokens",
            "xtc_threshold",
        }
    ),
    neutral={
        # OpenAI
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
        # vLLM and SGLang
        "add_generation_prompt": (True,),
        "allowed_token_ids": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "custom_logit_processor": (),
        "documents": ([],),
        "ebnf": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_json_object": (False,),
        "guided_regex": (),
        "include_reasoning": (True,),
        "kv_transfer_params": (),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "lora_path": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "no_stop_trim": (False,),
        "prompt_embeds": (),
        "prompt_logprobs": (),
        "regex": (),
        "return_hidden_states": (False,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "separate_reasoning": (False,),
        "skip_special_tokens": (True,),
        "stop_regex": ([],),
        "structural_tag": (),
        "structured_outputs": ({},),
        "thinking_token_budget": (),
        "truncation_side": ("left",),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
        # llama.cpp and Ollama
        "dry_multiplier": (0,),
        "dynatemp_range": (0,),
        "format": ("",),
        "grammar": ("",),
        "grammar_lazy": (False,),
        "grammar_triggers": ([],),
        "image_data": ([],),
        "json_schema": (),
        "lora": ([],),
        "min_keep": (0, 1),
        "mirostat": (0,),
        "n_indent": (0,),
        "n_predict": (),
        "n_probs": (0,),
        "options": ({},),
        "penalize_nl": (True,),
        "post_sampling_probs": (False,),
        "preserved_tokens": ([],),
        "raw": (False,),
        "reasoning_budget": (-1,),
        "reasoning_format": ("none",),
        "repeat_last_n": (-1,),
        "response_fields": ([],),
        "return_progress": (False,),
        "return_tokens": (False,),
        "samplers": (),
        "system_prompt": ("",),
        "t_max_predict_ms": (0, -1),
        "template": ("",),
        "tfs_z": (1,),
        "think": (),
        "thinking_forced_open": (False,),
        "timings_per_token": (False,),
        "top_a": (0,),
        "top_n_sigma": (-1, 0),
        "typ_p": (1,),
        "typical_p": (1,),
        "xtc_probability": (0,),
        # text-generation-inference
        "decoder_input_details": (False,),
        "details": (False,),
        "no_repeat_ngram_size": (0,),
        "num_beams": (1,),
        "return_full_text": (False,),
        "top_n_tokens": (0,),
        "watermark": (False,),
    },
    instead={
        "do_sample": "use temperature, which is 0 for greedy decoding",
        "ebnf": _NO_STRUCTURE,
        "enable_thinking": _USE_TEMPLATE,
        "grammar": _NO_STRUCTURE,
        "guided_choice": _NO_STRUCTURE,
        "guided_grammar": _NO_STRUCTURE,
        "guided_json": _NO_STRUCTURE,
        "guided_json_object": _NO_STRUCTURE,
        "guided_regex": _NO_STRUCTURE,
        "json_schema": _NO_STRUCTURE,
        "extra_body": "give its fields in the request itself",
        "inputs": "use prompt or messages",
        "max_completion_tokens": _USE_MAX_TOKENS,
        "max_length": _USE_MAX_TOKENS,
        "max_new_tokens": _USE_MAX_TOKENS,
        "max_output_tokens": _USE_MAX_TOKENS,
        "min_length": "use min_tokens",
        "min_new_tokens": "use min_tokens",
        "messages": "send it to /v1/chat/completions",
        "n_predict": _USE_MAX_TOKENS,
        "num_predict": _USE_MAX_TOKENS,
        "num_return_sequences": "use n",
        "parameters": "give its fields in the request itself",
        "options": "give its fields in the request itself",
        "prompt": "send it to /v1/completions",
        "reasoning_effort": _USE_TEMPLATE,
        "regex": _NO_STRUCTURE,
        "return_full_text": "use echo with /v1/completions",
        "stop_sequences": "use stop",
        "stop_words": "use stop",
        "structural_tag": _NO_STRUCTURE,
        "structured_outputs": _NO_STRUCTURE,
        "system": "send a message with the role system",
        "system_prompt": "send a message with the role system",
        "think": _USE_TEMPLATE,
        "top_logprobs": "use logprobs with a number of alternatives",
    },
)
"""Of a request for a completion, of either kind."""

COMPLETION_FIELDS = replace(
    REQUEST_FIELDS, neutral={**REQUEST_FIELDS.neutral, "add_special_tokens": (True,)}
)
"""Of ``/v1/completions``, which adds what the tokenizer adds to a text."""

CHAT_FIELDS = replace(
    REQUEST_FIELDS, neutral={**REQUEST_FIELDS.neutral, "add_special_tokens": (False,)}
)
"""Of ``/v1/chat/completions``, where the chat template adds all of them."""

STREAM_FIELDS = UnreadFields(
    harmless=frozenset({"include_obfuscation"}),  # pads events, and leaves the answer
    neutral={"continuous_usage_stats": (False,)},
)
"""Of ``stream_options``."""

MESSAGE_FIELDS = UnreadFields(
    neutral={
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "prefix": (False,),
        "reasoning": ("",),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    },
    instead={"reasoning": "use reasoning_content"},
)
"""Of a message. A client returns the answers that it got, empty fields included."""

PART_FIELDS = UnreadFields(harmless=frozenset({"cache_control", "prompt_cache_breakpoint"}))
"""Of a part of a message's content."""
