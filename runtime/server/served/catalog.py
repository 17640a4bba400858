"""The model names of a server: the backbone and its adapters.

As in vLLM, an adapter is a model: ``model: "math"`` is the backbone with the adapter ``math``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from eoracc.errors import ApiError, RequestError
from eoracc.runtime.request import AdapterChoice, adapter_weights
from eoracc.runtime.server.api.errors import bad_request

__all__ = [
    "Catalog",
]


_LONGEST_NAME = 64
"""Most characters of an unknown name that an error repeats."""


def _check_name(name: str, adapters: Iterable[str]) -> None:
    """Check the name of the backbone.

    Raises:
      ApiError: the name is empty, not printable, or that of an adapter.
    """
    if not name or not name.isprintable():
        raise ApiError("the model's name must be printable text: give it with --model-name")
    if name in set(adapters):
        raise ApiError(
            f"'{name}' is the name of the backbone and of an adapter: give the backbone another "
            "one with --model-name"
        )


class Catalog:
    """Names that ``/v1/models`` lists and that a request may give as ``model``."""

    def __init__(
        self,
        backbone: str,
        adapters: Iterable[str],
        *,
        context_length: int,
        created: int,
        explain_missing: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        """List an artifact.

        Args:
          backbone: name of the model without an adapter.
          adapters: names of its adapters.
          context_length: most tokens of a prompt and its answer.
          created: seconds since 1970.
          explain_missing: says why an adapter is not listed, if there is more to say than that.

        Raises:
          ApiError: the backbone has the name of an adapter.
        """
        self.backbone = backbone
        self.adapters = tuple(adapters)
        self._explain_missing = explain_missing
        _check_name(backbone, self.adapters)
        self._cards = {
            name: {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "eoracc",
                "root": backbone,
                "parent": None if name == backbone else backbone,
                "max_model_len": context_length,
            }
            for name in (backbone, *self.adapters)
        }

    def as_dict(self) -> dict[str, Any]:
        """The body of ``GET /v1/models``."""
        return {"object": "list", "data": list(self._cards.values())}

    def card(self, name: str) -> dict[str, Any]:
        """The body of ``GET /v1/models/{name}``.

        Raises:
          ApiError: 404.
        """
        if name not in self._cards:
            self._check_folder(name, HTTPStatus.NOT_FOUND, "model")
            known = ", ".join(f"'{served}'" for served in self._cards)
            raise ApiError(
                f"the model {name[:_LONGEST_NAME]!r} is not served here: ask for one of {known}",
                status=HTTPStatus.NOT_FOUND,
                param="model",
                code="model_not_found",
            )
        return self._cards[name]

    def resolve(
        self, model: str | None, weights: Mapping[str, float] | None
    ) -> tuple[str, AdapterChoice]:
        """The name of the model in the answer, and the adapter to generate with.

        Args:
          model: name in the request; None for the backbone.
          weights: of adapters to sum.

        Raises:
          ApiError: 404 for an unknown name, 400 for adapters that cannot be summed.
        """
        name = self.backbone if model is None else model
        self.card(name)
        if not weights:
            return name, None if name == self.backbone else name
        if name != self.backbone:
            raise bad_request(
                f"adapters: go with the model '{self.backbone}', not with an adapter", "adapters"
            )
        for adapter in weights:
            if adapter not in self.adapters:
                self._check_folder(adapter, HTTPStatus.BAD_REQUEST, "adapters")
                raise bad_request(
                    f"adapters: there is no adapter {adapter[:_LONGEST_NAME]!r} here",
                    "adapters",
                    "model_not_found",
                )
        try:
            adapter_weights(weights)
        except RequestError as error:
            raise bad_request(f"adapters: {error}", "adapters") from None
        return name, dict(weights)

    def _check_folder(self, adapter: str, status: HTTPStatus, param: str) -> None:
        """Raise ApiError if only the changed folder of the artifact has ``adapter``."""
        text = self._explain_missing(adapter)
        if text is not None:
            raise ApiError(
                text,
                status=status,
                param=param,
                code="artifact_changed",
            )
