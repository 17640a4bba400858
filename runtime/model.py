"""An artifact that generates and scores text, with any of its adapters."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

from eoracc.errors import BackendError, PromptTooLongError, RequestError
from eoracc.runtime.artifact.authenticity import Authenticity
from eoracc.runtime.artifact.manifest import Manifest, opening
from eoracc.runtime.backends import Backend, BackendChoice, open_backend
from eoracc.runtime.decode.continuation import Continuation, Listener, complete
from eoracc.runtime.decode.sampling import LogitsError
from eoracc.runtime.decode.scheduler import PREFILL_CHUNK, Scheduler
from eoracc.runtime.decode.scoring import Targets, score_targets
from eoracc.runtime.decode.text import Tokenizer
from eoracc.runtime.folder_watch import FolderWatch
from eoracc.runtime.memory import release_heap
from eoracc.runtime.request import (
    AdapterChoice,
    ChatOptions,
    Completion,
    ContinuationScore,
    Piece,
    Prompt,
    Request,
    RequestOptions,
    Score,
    adapter_weights,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LoadOptions", "Model", "TrustOptions", "load"]

_MAX_ROWS = 8
_MOST_THREADS = 1024


class Model:
    """An artifact in memory. Threads may share it: every call has a cache of its own.

    Attributes:
      folder: the artifact.
      manifest: of the artifact, verified.
      tokenizer: between text and tokens.
      bank: the loaded adapters.
      context_length: most tokens of a prompt and its answer together.
      threads: that one operator uses on the CPU.
      backend: that runs the model.
      device: description of the CPU or GPU that it runs on.
      fallback_reason: why ONNX Runtime runs an artifact that has TensorRT engines, where
        :func:`load` made that choice; else None.
      library_note: why the native library is not the artifact's own; None if it is, or equal.
      folder_watch: tells whether the folder still holds what was loaded.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        adapters: Sequence[str] | None = None,
        backend: BackendChoice = "auto",
        trust: bool = False,
        own_memory: bool = False,
    ) -> None:
        """Open a verified artifact; :func:`load` verifies it first.

        Args:
          folder: the artifact.
          manifest: of the artifact.
          threads: that one operator uses; None for one for each processor available to the process.
          adapters: names of the adapters to load; None for all.
          backend: see :func:`load`.
          trust: see :func:`load`.
          own_memory: see :func:`load`.

        Raises:
          BackendError: a package, a driver or a GPU is missing, the backend rejects the model, or
            ``threads`` is out of range.
          ArtifactError: an adapter is damaged or unknown, or the artifact has not been built for
            the backend.
        """
        self.folder = folder
        self.manifest = manifest
        self.folder_watch = FolderWatch(folder, manifest)
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise BackendError(f"threads {threads}: must be from 1 to {_MOST_THREADS:,}")
        # By default, ONNX Runtime may take one of a virtual machine's two processors for the
        # hyperthread of the other and leave it idle.
        self.threads = threads or _processors()
        opened = open_backend(
            folder,
            manifest,
            backend,
            threads=self.threads,
            adapters=adapters,
            trust=trust,
            own_memory=own_memory,
        )
        self.backend: Backend = opened.backend
        self.device = opened.device
        self.fallback_reason = opened.fallback_reason
        self.library_note = opened.library_note
        self._decoder = opened.decoder
        self._device_bytes = opened.device_bytes
        self.bank = opened.decoder.bank
        self.context_length = opened.decoder.context_length
        self.tokenizer = Tokenizer(folder)

    # --- text -------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that a request may ask for."""
        return self.bank.names

    @property
    def has_chat_template(self) -> bool:
        """Whether the artifact has a chat template."""
        return self.tokenizer.has_chat_template

    def device_bytes(self) -> int | None:
        """Growth of the GPU memory in use since loading, in bytes; None without a GPU.

        Counts all processes, without the memory of CUDA itself.
        """
        return self._device_bytes()

    def encode(
        self, prompt: Prompt, *, chat: bool = False, chat_options: ChatOptions | None = None
    ) -> list[int]:
        """Tokens of a prompt, see :meth:`Tokenizer.encode_prompt`."""
        return self.tokenizer.encode_prompt(prompt, chat=chat, options=chat_options)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out."""
        return self.tokenizer.decode(tokens)

    # --- generation -------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        **options: Unpack[RequestOptions],
    ) -> Iterator[Piece]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[RequestOptions],
    ) -> Completion: ...

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        stream: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Completion | Iterator[Piece]:
        """Continue one text.

        Args:
          prompt: text, tokens or the messages of a chat.
          max_new_tokens: most tokens to generate.
          stream: yield pieces as they are generated; their texts add up to the completion's.
          **options: of a :class:`Request`, which describes them.

        Raises:
          RequestError: a value is out of range, the adapter is unknown, or the prompt too long.
          BackendError: a run fails.
        """
        request = Request(prompt=prompt, max_new_tokens=max_new_tokens, **options)
        if stream:
            return self.stream(request)
        return self.generate_batch([request])[0]

    def generate_batch(
        self, requests: Sequence[Request], *, max_rows: int = _MAX_ROWS
    ) -> list[Completion]:
        """Continue many texts, ``max_rows`` at a time, each with its own options and adapter.

        Returns:
          A completion for each request, the same as from a call of its own.

        Raises:
          RequestError: a request cannot be served; then none is.
          BackendError: a run fails.
        """
        scheduler = self.scheduler(max_rows=max_rows)
        events: list[list[Piece | Exception]] = [[] for _ in requests]
        prompts = []
        try:
            for request, own_events in zip(requests, events, strict=True):
                continuation = self.prepare(request, own_events.append)
                prompts.append(len(continuation.prompt))
                scheduler.add(continuation)
            while scheduler.step():
                pass
        finally:
            scheduler.close()
        return [
            complete(_pieces(own_events), length)
            for own_events, length in zip(events, prompts, strict=True)
        ]

    def stream(self, request: Request) -> Iterator[Piece]:
        """Continue one text piece by piece; no further than the caller iterates.

        Raises:
          RequestError: the request cannot be served; raised by the call, not by the first piece.
          BackendError: a run fails.
        """
        scheduler = self.scheduler(max_rows=1)
        events: list[Piece | Exception] = []
        scheduler.add(self.prepare(request, events.append))
        pieces = self._pieces_of(scheduler, events)
        # A generator that is never started runs no ``finally``.
        weakref.finalize(pieces, scheduler.close).atexit = False
        return pieces

    def _pieces_of(self, scheduler: Scheduler, events: list[Piece | Exception]) -> Iterator[Piece]:
        try:
            more = True
            while more:
                more = scheduler.step()
                yield from _pieces(events)
                events.clear()
        finally:
            scheduler.close()

    def prepare(
        self, request: Request, listener: Listener, *, max_tokens: int | None = None
    ) -> Continuation:
        """Prepare a request for :meth:`Scheduler.add`, which releases its adapter at the end.

        Args:
          request: prompt and options.
          listener: called with each piece.
          max_tokens: most tokens of prompt and answer together; None for the model's context.

        Raises:
          RequestError: the prompt is empty or too long, or an adapter or a token unknown.
          ArtifactError: the request is a chat and the artifact has no chat template.
        """
        room = self.context_length if max_tokens is None else max_tokens
        prompt = self.tokenizer.encode_prompt(
            request.prompt, chat=request.chat, options=request.chat_options, limit=room - 1
        )
        if not prompt:
            raise RequestError("the prompt is empty: give some text")
        if len(prompt) >= room:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, the model takes {room}, "
                "its answer included: shorten it"
            )
        self._check_tokens(prompt)
        self._check_named_tokens("stop_token_ids", request.stop_token_ids)
        self._check_named_tokens("logit_bias", request.logit_bias)
        return Continuation(
            request,
            self.tokenizer,
            prompt=prompt,
            limit=min(request.max_new_tokens, room - len(prompt)),
            bad_words=self.tokenizer.encode_words(request.bad_words),
            place=self._acquire(request.adapter),
            listener=listener,
        )

    def scheduler(self, *, max_rows: int, chunk: int = PREFILL_CHUNK) -> Scheduler:
        """A scheduler that serves ``max_rows`` requests at a time."""
        return Scheduler(self._decoder, max_rows=max_rows, chunk=chunk)

    # --- scores -----------------------------------------------------------------------------------

    def score(self, text: str | Sequence[int], *, adapter: AdapterChoice = None) -> Score:
        """Log-probability of each token of a text.

        Args:
          text: a text or its tokens, at most as many as the context.
          adapter: a name, or weights by name, or None.

        Raises:
          RequestError: the text is empty or too long, or the adapter unknown.
          BackendError: a run fails.
        """
        tokens = self.encode(text) if isinstance(text, str) else list(text)
        self._check_tokens(tokens)
        if len(tokens) < 2:
            if not tokens:
                raise RequestError("the text is empty: give some text")
            return Score(tuple(tokens), ())
        ((logprobs, _),) = self._score([(tokens[:-1], tokens[1:])], adapter)
        return Score(tuple(tokens), tuple(logprobs.tolist()))

    def score_continuations(
        self,
        pairs: Sequence[tuple[str | Sequence[int], str | Sequence[int]]],
        *,
        adapter: AdapterChoice = None,
    ) -> list[ContinuationScore]:
        """Log-probability of each continuation after its context, in batches.

        A pair of texts is tokenized as one text and split where the tokens of the context end. An
        empty context becomes BOS, or EOS in a model without BOS.

        Args:
          pairs: context and continuation, each a text or tokens.
          adapter: a name, or weights by name, or None.

        Raises:
          RequestError: a continuation is empty, a pair too long, or the adapter unknown.
          BackendError: a run fails.
        """
        queries = []
        for index, pair in enumerate(pairs):
            context, continuation = self.split(*pair)
            if not continuation:
                raise RequestError(f"pair {index}: its continuation is empty")
            whole = [*context, *continuation]
            try:
                self._check_tokens(whole)
            except RequestError as error:
                raise RequestError(f"pair {index}: {error}") from None
            queries.append((whole[:-1], continuation))
        return [
            ContinuationScore(tuple(targets), tuple(logprobs.tolist()), bool(greedy.all()))
            for (_, targets), (logprobs, greedy) in zip(
                queries, self._score(queries, adapter), strict=True
            )
        ]

    def split(
        self, context: str | Sequence[int], continuation: str | Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Tokens of a context, at least one, and of its continuation."""
        if isinstance(context, str) and isinstance(continuation, str) and context:
            # Blanks between the two belong to the first word of the continuation.
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            if stripped:
                whole, own = self.encode(stripped + continuation), self.encode(stripped)
                return whole[: len(own)], whole[len(own) :]
            context = ""
        first = self.encode(context) if isinstance(context, str) and context else []
        if not isinstance(context, str):
            first = list(context)
        if isinstance(continuation, str):
            following = self.tokenizer.encode(continuation, special=False)
        else:
            following = list(continuation)
        return first or [self.tokenizer.beginning], following

    def _score(
        self, queries: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: AdapterChoice
    ) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        place = self._acquire(adapter)
        try:
            return score_targets(
                self._decoder,
                [Targets(tuple(inputs), tuple(targets), place) for inputs, targets in queries],
            )
        except LogitsError as error:
            raise error.of(adapter) from None
        finally:
            self.bank.release(adapter)

    def _acquire(self, adapter: AdapterChoice) -> int:
        """The place of ``adapter`` in the bank, reserved until the bank releases it.

        Raises:
          RequestError: an adapter is unknown; the text says so if only the changed folder has it.
        """
        for name, _ in adapter_weights(adapter):
            if name not in self.bank.names and (text := self.folder_watch.explain_missing(name)):
                raise RequestError(text)
        return self.bank.acquire(adapter)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        # The last token of a scored text is predicted and never an input.
        if len(tokens) > self.context_length + 1:
            raise RequestError(
                f"the text has {len(tokens)} tokens, the model takes {self.context_length}: "
                "score it in windows"
            )
        vocabulary = self._decoder.vocabulary
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise RequestError(f"a token is not in 0..{vocabulary - 1}, the model's vocabulary")

    def _check_named_tokens(self, name: str, tokens: Iterable[int]) -> None:
        vocabulary = self._decoder.vocabulary
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"{name}: there is no token {token}: the model has 0 to {vocabulary - 1}"
                )


class TrustOptions(TypedDict, total=False):
    """The options of :func:`load` that say which artifact is meant and what it may execute."""

    trust: bool
    digest: str | None
    public_key: Path | str | None


class LoadOptions(TrustOptions, total=False):
    """The options of :func:`load`, which describes them."""

    threads: int | None
    adapters: Sequence[str] | None
    backend: BackendChoice
    own_memory: bool


def load(
    path: Path | str,
    *,
    threads: int | None = None,
    adapters: Sequence[str] | None = None,
    backend: BackendChoice = "auto",
    trust: bool = False,
    digest: str | None = None,
    public_key: Path | str | None = None,
    own_memory: bool = False,
) -> Model:
    """Verify every byte of the artifact in ``path``, then open it.

    The folder is locked against changes until everything is open.

    Args:
      path: the artifact's folder.
      threads: that one operator uses on the CPU; None for one for each processor available to the
        process.
      adapters: names of the adapters to load; None for all.
      backend: that runs the model. ``auto`` chooses the artifact's TensorRT engines where this
        machine can run them, else ONNX Runtime; :attr:`Model.backend` is the choice.
      trust: execute code that the artifact brings: its engines, and its native library where it
        differs from the installed one. Without it only installed code runs.
      digest: sha256 that manifest.json must have; None for any.
      public_key: PEM file of the ed25519 key that must have signed manifest.json; None for none.
      own_memory: on Linux, copy the weights that ONNX Runtime maps, so that a tool that overwrites
        the files in place cannot change or end the model. All weights are in memory then, also
        those that are never read. What eoracc itself does to a folder never overwrites a file.

    Raises:
      ArtifactError: the folder is damaged or no artifact, not the one asked for, an adapter is
        unknown, the artifact has not been built for the backend or for this GPU, or only code that
        it brings could run it and is not trusted.
      ConfigError: ``digest`` is no sha256, or ``public_key`` no key.
      BackendError: a package, a driver or a GPU is missing, or the backend rejects the model.
    """
    folder = Path(path)
    authenticity = Authenticity(digest, None if public_key is None else Path(public_key))
    with opening(folder, authenticity) as manifest:
        model = Model(
            folder,
            manifest,
            threads=threads,
            adapters=adapters,
            backend=backend,
            trust=trust,
            own_memory=own_memory,
        )
    # Parsing the graph and the tokenizer has left free pages, which would stay for good.
    release_heap()
    return model


def _pieces(events: Sequence[Piece | Exception]) -> Iterator[Piece]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


def _processors() -> int:
    """Number of processors available to the process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
