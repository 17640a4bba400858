from __future__ import annotations

import sys

import pytest

from eoracc.errors import BackendError
from eoracc.runtime.packages import import_package


@pytest.mark.parametrize(
    ("package", "extra"), [("tensorrt_rtx", "tensorrt-rtx"), ("tensorrt", "tensorrt")]
)
def test_missing_package_says_how_to_install_it(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError) as raised:
        import_package(package)
    name = package.replace("_", "-")
    assert str(raised.value) == f"{name} is not installed: pip install 'eoracc[{extra}]'"
