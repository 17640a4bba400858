"""A package that is missing skips a test, and is an error where all packages must be there."""

from __future__ import annotations

import pytest

from tests.optional import REQUIRE_ALL, require

MISSING = "eoracc_no_such_package"


@pytest.mark.parametrize("value", ["", "1"])
def test_installed_package_is_enough(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE_ALL, value)
    require("numpy")


def test_missing_package_is_the_reason_of_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRE_ALL, raising=False)
    with pytest.raises(pytest.skip.Exception, match=rf"^{MISSING} is not installed: make setup"):
        require(MISSING)


def test_missing_package_is_an_error_where_all_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(REQUIRE_ALL, "1")
    with pytest.raises(ModuleNotFoundError, match=rf"^{MISSING} is not installed"):
        require(MISSING)
