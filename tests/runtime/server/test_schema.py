"""Requests made from the server's own OpenAPI schema, by schemathesis: no answer surprises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import CHECKS, load_all_checks

from tests.runtime.server.child import KEY, ServerProcess

HEADERS = {"Authorization": f"Bearer {KEY}"}
EXAMPLES = 25
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
OPERATIONS = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
)
# The schema knows neither the context's length nor the tokens and adapters of a model.
NOT_PROMISED = ("positive_data_acceptance",)


@pytest.fixture(scope="module")
def schema(server: ServerProcess) -> Any:  # noqa: ANN401 - of schemathesis
    load_all_checks()
    return schemathesis.openapi.from_url(f"{server.root}/openapi.json", headers=HEADERS)


def test_every_operation_is_tried(schema: Any) -> None:  # noqa: ANN401
    found = {(made.ok().method.upper(), made.ok().path) for made in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, POSITIVE) for operation in OPERATIONS]
    + [(*operation, NEGATIVE) for operation in OPERATIONS if operation[0] == "POST"],
)
def test_answers_are_what_the_schema_says(
    schema: Any,  # noqa: ANN401
    server: ServerProcess,
    method: str,
    path: str,
    mode: schemathesis.GenerationMode,
) -> None:
    operation = schema[path][method]
    excluded = CHECKS.get_by_names(NOT_PROMISED)
    statuses = Counter[int]()

    @seed(0)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:  # noqa: ANN401
        if isinstance(case.body, dict) and case.body.get("max_tokens") is None:
            case.body.setdefault("max_tokens", 2)  # a whole context takes seconds
        response = case.call(headers=HEADERS, timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response, excluded_checks=excluded)

    ask()
    assert not [line for line in server.lines if "Traceback" in line]
    if mode is POSITIVE and path != "/v1/models/{name}":
        assert statuses[200]
