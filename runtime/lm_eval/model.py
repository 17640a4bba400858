"""Artifacts as a model of lm-eval, the language model evaluation harness. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM  # noqa: TID253 - this is what lm-eval imports
from lm_eval.api.registry import register_model  # noqa: TID253
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: TID253
from lm_eval.utils import (  # noqa: TID253
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import override

from eoracc.errors import RequestError
from eoracc.runtime.model import load
from eoracc.runtime.request import ChatOptions, Request

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from eoracc.runtime.request import AdapterChoice, ContinuationScore

__all__ = ["EoraccLM"]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
"""Generation arguments that are fields of a request under the same name."""

_Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Key in the cache of results (two texts, or None), tokens of context and of continuation."""


@register_model("eoracc")
class EoraccLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An artifact, on its own or with one of its adapters.

    Attributes:
      max_length: most tokens of context and continuation; longer texts lose their beginning.
      max_gen_toks: number of new tokens if a task does not give it.
      batch_size: number of texts run together.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: AdapterChoice = None,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        threads: int | None = None,
        trust: bool = False,
        digest: str | None = None,
        public_key: str | None = None,
        device: str | None = None,  # noqa: ARG002 - lm-eval gives it to every model
        max_batch_size: int | None = None,
    ) -> None:
        """Open the artifact; these are the ``--model_args``.

        Args:
          pretrained: the artifact's folder.
          adapter: name of an adapter; None, or ``none``, for the backbone alone.
          batch_size: number of texts run together.
          max_length: most tokens of a text; None for the model's context.
          max_gen_toks: number of new tokens if a task does not give it.
          threads: that one operator uses; None for one for each processor available to the process.
          trust: execute code that the artifact brings, see :func:`eoracc.runtime.load`.
          digest: likewise.
          public_key: likewise.
          device: ignored; lm-eval passes cuda:0 by default.
          max_batch_size: used if ``batch_size`` is ``auto``.

        Raises:
          ArtifactError: ``pretrained`` is damaged, no artifact, not the one asked for, or not
            trusted.
          RequestError: the adapter is unknown, or an argument is out of range.
          BackendError: ONNX Runtime is missing or rejects the model.
        """
        super().__init__()
        self.model = load(
            Path(pretrained), threads=threads, trust=trust, digest=digest, public_key=public_key
        )
        self.model.bank.check(adapter)
        self._adapter = adapter
        longest = self.model.context_length
        self.max_length = longest if max_length is None else max_length
        if not 1 < self.max_length <= longest:
            raise RequestError(
                f"max_length={max_length}: must be at least 2 and at most {longest}, "
                "which is what the model takes"
            )
        self.max_gen_toks = max_gen_toks
        self.batch_size = _batch_size(batch_size, max_batch_size)

    @property
    @override
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self.model.tokenizer.ends)

    @property
    @override
    def prefix_token_id(self) -> int:
        """The token of an empty context: BOS, or EOS if there is no BOS."""
        return self.model.tokenizer.beginning

    @property
    @override
    def tokenizer_name(self) -> str:
        """Identifies the artifact in caches of requests."""
        return f"{self.model.folder.resolve().name}-{self.model.manifest.digest[:16]}"

    @override
    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Tokens of ``string``, with BOS if the tokenizer adds it.

        A text that spells BOS out, as chat templates do, gets no second BOS by default.
        """
        tokenizer = self.model.tokenizer
        tokens = tokenizer.encode(string, special=add_special_tokens is not False)
        doubled = tokens[:2] == [tokenizer.begin] * 2
        return tokens[1:] if doubled and add_special_tokens is None else tokens

    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Longest first: texts of a batch have similar lengths, so that padding costs little.
        order = sorted(
            (index for index, request in enumerate(requests) if request[2]),
            key=lambda index: -len(requests[index][1]) - len(requests[index][2]),
        )
        progress = tqdm(total=len(order), disable=disable_tqdm, desc="Scoring continuations")
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores = self._score([requests[index] for index in batch])
            for index, score in zip(batch, scores, strict=True):
                results[index] = score.logprob, score.greedy
                texts = requests[index][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[index])
            progress.update(len(batch))
        progress.close()
        return results

    def _score(self, requests: Sequence[_Pair]) -> list[ContinuationScore]:
        pairs = []
        for _, context, continuation in requests:
            # The last token is only predicted and never an input, so that one more fits.
            kept = (context + continuation)[-(self.max_length + 1) :]
            if len(kept) <= len(continuation):
                raise RequestError(
                    f"a continuation has {len(continuation)} tokens, the model takes "
                    f"{self.max_length}: raise max_length or leave the task out"
                )
            pairs.append((kept[: -len(continuation)], continuation))
        return self.model.score_continuations(pairs, adapter=self._adapter)

    @override
    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict each token once.

        Args:
          requests: with one text each.
          disable_tqdm: do not show progress.
        """
        pairs: list[_Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @override
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string.

        Args:
          requests: with a text and lm-eval's generation arguments each.
          disable_tqdm: do not show progress.
        """
        texts: list[str] = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            completions = self.model.generate_batch(
                [self._request(*request.args) for request in batch]
            )
            for request, completion in zip(batch, completions, strict=True):
                texts.append(completion.text)
                self.cache_hook.add_partial("generate_until", request.args, completion.text)
            progress.update(len(batch))
        progress.close()
        return texts

    def _request(self, context: str, arguments: Mapping[str, Any]) -> Request:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        stop = [string for string in kwargs.pop("until", None) or () if string]
        new_tokens = kwargs.pop("max_gen_toks")
        kwargs.pop("do_sample", None)  # implied by temperature
        if unknown := kwargs.keys() - set(_SAMPLING):
            raise RequestError(
                f"generation argument '{min(unknown)}': is none of "
                f"{', '.join(('until', 'max_gen_toks', 'do_sample', *_SAMPLING))}"
            )
        room = self.max_length - new_tokens
        if room < 1:
            raise RequestError(
                f"max_gen_toks={new_tokens}: the model takes {self.max_length} tokens, the prompt "
                "included: lower it"
            )
        return Request(
            prompt=self.tok_encode(context)[-room:],
            adapter=self._adapter,
            max_new_tokens=new_tokens,
            stop=stop,
            **kwargs,
        )

    @override
    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, ready for an answer.

        Args:
          chat_history: the messages.
          add_generation_prompt: begin the answer; else the last message is its beginning.
        """
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return self.model.tokenizer.chat.render(chat_history, options)

    @override
    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the chat template of that name, or of the default one."""
        if not chat_template or not self.model.has_chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        return self.model.tokenizer.chat.source(ChatOptions(template=name))


def _batch_size(batch_size: int | str, largest: int | None) -> int:
    if isinstance(batch_size, str) and batch_size.startswith("auto"):
        return largest or 8
    size = int(batch_size)
    if size < 1:
        raise RequestError(f"batch_size={batch_size}: must be 1 or more")
    return size
