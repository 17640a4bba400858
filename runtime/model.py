"""Text generation with ONNX Runtime GenAI."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eoracc.runtime.backend import import_backend, read_decoder
from eoracc.runtime.errors import ArtifactError, BackendError
from eoracc.runtime.manifest import Manifest, verify_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Model", "load"]


class Model:
    """An artifact that generates text.

    Attributes:
      folder: the artifact.
      manifest: what it says of itself, verified.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        """Open a verified artifact; :func:`load` is the way in.

        Args:
          folder: the artifact.
          manifest: what it says of itself.
          threads: of one operator; None for one a processor that this process may use.

        Raises:
          BackendError: onnxruntime-genai is missing or refuses the artifact.
        """
        self.folder = folder
        self.manifest = manifest
        self._context_length = read_decoder(folder).context_length
        self._genai = import_backend("onnxruntime_genai")
        try:
            config = self._genai.Config(str(folder))
            # Left to itself, ONNX Runtime may take one of a virtual machine's two processors for
            # the sibling of the other, and leave it idle.
            session = {"intra_op_num_threads": threads or _processors()}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model = self._genai.Model(config)
            self._tokenizer = self._genai.Tokenizer(self._model)
        except Exception as error:
            raise _refused(folder, error) from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the artifact knows how its model wants to be talked to."""
        if (self.folder / "chat_template.jinja").is_file():
            return True
        config = self.folder / "tokenizer_config.json"
        return config.is_file() and bool(
            json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        )

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Tokens of ``prompt``, as the user's turn of a chat where ``chat`` is set.

        The tokens begin with BOS where the tokenizer begins a text with it; a chat template says
        for itself what it begins with.

        Raises:
          ArtifactError: ``chat`` without a chat template.
        """
        if chat:
            if not self.has_chat_template:
                raise ArtifactError(f"{self.folder}: has no chat template: use --no-chat")
            messages = json.dumps([{"role": "user", "content": prompt}])
            prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        # genai leaves special tokens out unless it is told, and Gemma is lost without its BOS.
        self._tokenizer.update_options(add_special_tokens="false" if chat else "true")
        return [int(token) for token in self._tokenizer.encode(prompt)]

    def generate_tokens(
        self,
        tokens: list[int],
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continue ``tokens`` until the text ends, ``max_new_tokens`` are made or no room is left.

        The token that ends the text is not part of it.

        Args:
          tokens: at least one.
          max_new_tokens: upper bound.
          temperature: 0 takes the most likely token every time.
          top_p: smallest share of probability that is sampled from.
          seed: makes sampling repeatable.

        Raises:
          ArtifactError: there is nothing to continue, or no room for more.
          BackendError: onnxruntime-genai fails.
        """
        if not tokens:
            raise ArtifactError(f"{self.folder}: the prompt is empty: give some text")
        if len(tokens) >= self._context_length:
            raise ArtifactError(
                f"{self.folder}: the prompt has {len(tokens)} tokens, the model takes "
                f"{self._context_length}, its answer included: shorten it"
            )
        if max_new_tokens <= 0:
            return
        options: dict[str, Any] = {
            "do_sample": temperature > 0,
            "max_length": min(len(tokens) + max_new_tokens, self._context_length),
        }
        if temperature > 0:
            # Probability is what top_p cuts; a further cut by count would hide its effect.
            options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
            if seed is not None:
                options["random_seed"] = seed
        try:
            parameters = self._genai.GeneratorParams(self._model)
            parameters.set_search_options(**options)
            generator = self._genai.Generator(self._model, parameters)
            generator.append_tokens(tokens)
            ends = set(self._tokenizer.eos_token_ids)
            while not generator.is_done():
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if token not in ends:
                    yield token
        except RuntimeError as error:
            raise _refused(self.folder, error) from error

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        chat: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Stream the continuation of ``prompt``; see :meth:`encode`, :meth:`generate_tokens`."""
        stream = self._tokenizer.create_stream()
        for token in self.generate_tokens(
            self.encode(prompt, chat=chat),
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ):
            text = stream.decode(token)
            if text:
                yield text


def load(path: Path | str, *, threads: int | None = None) -> Model:
    """Verify the artifact in ``path`` byte by byte, then open it.

    Args:
      path: the artifact's folder.
      threads: of one operator; None for one a processor that this process may use.

    Raises:
      ArtifactError: it is damaged or no artifact.
      BackendError: onnxruntime-genai is missing or refuses it.
    """
    folder = Path(path)
    return Model(folder, verify_manifest(folder), threads=threads)


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refused(folder: Path, error: Exception) -> BackendError:
    reason = re.sub(r"\s+", " ", str(error)).strip()
    return BackendError(f"{folder}: ONNX Runtime GenAI fails: {reason}")
