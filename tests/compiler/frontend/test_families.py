from __future__ import annotations

import re
from pathlib import Path

import pytest

from eoracc.compiler.frontend.families import REFUSED, SUPPORTED, check_family
from eoracc.errors import ModelError
from tests.tiny_models import FAMILIES, OTHER_FAMILIES

_PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table below ``heading``, without its head."""
    section = (
        _PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_the_supported_families() -> None:
    shown = {kind.strip("`"): models for kind, models, _ in _rows("Supported")}
    assert shown == dict(SUPPORTED)
    assert list(shown) == sorted(shown)


def test_the_page_lists_the_refused_families() -> None:
    shown = {
        kind: reason for kinds, reason in _rows("Refused") for kind in re.findall(r"`(.*?)`", kinds)
    }
    assert shown == dict(REFUSED)
    assert not shown.keys() & SUPPORTED.keys()


def test_every_supported_family_has_a_checkpoint_in_the_tests() -> None:
    tested = {model_type for model_type, _ in (*FAMILIES.values(), *OTHER_FAMILIES.values())}
    assert tested == SUPPORTED.keys()


@pytest.mark.parametrize(
    ("model_type", "fields", "match"),
    [
        (
            "mixtral",
            {},
            r"model_type 'mixtral' is not supported: it is a mixture of experts.*famil",
        ),
        ("gpt2", {}, r"model_type 'gpt2' is not supported: its position embeddings are learned"),
        # Not in the table: the configuration tells.
        (
            "afmoe",
            {"num_experts": 8},
            "model_type 'afmoe' is not supported: it is a mixture of experts",
        ),
        (
            "gemma3",
            {"text_config": {}},
            "model_type 'gemma3' is not supported: it holds more than a text model",
        ),
        (
            "bitnet",
            {},
            r"model_type 'bitnet' is not supported; supported are \d+ families .* Llama",
        ),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "architecture LlamaForSequenceClassification of model_type 'llama' is not supported",
        ),
        (
            "llama",
            {"architectures": ["Eagle3LlamaForCausalLM"]},
            "architecture Eagle3LlamaForCausalLM of model_type 'llama' is not supported",
        ),
    ],
)
def test_others_are_refused_in_one_sentence(
    model_type: str, fields: dict[str, object], match: str
) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        check_family(Path("folder"), {"model_type": model_type, **fields})
    assert str(caught.value).startswith("folder: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("gemma3_text", "use_bidirectional_attention"),
        ("phi", "qk_layernorm"),
        ("stablelm", "qk_layernorm"),
        ("stablelm", "use_parallel_residual"),
    ],
)
def test_switch_that_makes_another_model_is_named(model_type: str, field: str) -> None:
    check_family(Path("folder"), {"model_type": model_type, field: False})
    with pytest.raises(ModelError, match=f"^folder/config.json: {field} is true, and this variant"):
        check_family(Path("folder"), {"model_type": model_type, field: True})


def test_a_config_without_architectures_is_let_in() -> None:
    check_family(Path("folder"), {"model_type": "llama"})
