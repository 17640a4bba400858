from __future__ import annotations

import numpy as np
import pytest

from eoracc.passes.gram_warnings import ENOUGH_TOKENS_PER_COLUMN, gram_warnings, warn_of_gram
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.solvers.gram import Gram, accumulate_gram
from tests.passes.groups import correlated, make_group, ones

WIDTH = 32


def warned(inputs: np.ndarray, *, damping: float | None = None, root: bool = True) -> list[str]:
    """Codes of the warnings on the Gram of ``inputs``, after solvers have used it."""
    gram = accumulate_gram([(inputs.astype(np.float32), ones(len(inputs)))], WIDTH)
    if root:
        assert gram.root.shape == (WIDTH, WIDTH)
    if damping is not None:
        gram.feedback(damping=damping)
    return [warning.code for warning in gram_warnings(gram)]


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return correlated(np.random.default_rng(0), 20 * WIDTH, WIDTH)


def test_a_healthy_gram_has_no_warning(text: np.ndarray) -> None:
    assert warned(text, damping=0.01) == []
    assert warned(text[: ENOUGH_TOKENS_PER_COLUMN * WIDTH], damping=0.01) == []
    # Scales of channels say nothing: a few of a model are a thousand times the others.
    assert warned(text * np.geomspace(1, 1000, WIDTH), damping=0.01) == []


@pytest.mark.parametrize(
    ("tokens", "word"), [(ENOUGH_TOKENS_PER_COLUMN * WIDTH - 1, "noisy"), (WIDTH - 1, "singular")]
)
def test_too_few_tokens(text: np.ndarray, tokens: int, word: str) -> None:
    gram = accumulate_gram([(text[:tokens], ones(tokens))], WIDTH)
    (warning,) = gram_warnings(gram)
    assert warning.code == "few_tokens"
    assert word in warning.message
    assert warning.figures == {"tokens": tokens, "columns": WIDTH}
    # Singular as well, but that has been said.
    assert warned(text[:tokens], damping=0.01) == ["few_tokens"]


def test_a_sum_of_weights_may_miss_the_number_of_tokens(text: np.ndarray) -> None:
    enough = ENOUGH_TOKENS_PER_COLUMN * WIDTH
    gram = accumulate_gram([(text[:enough], ones(enough) * np.float32(1 - 2.0**-20))], WIDTH)
    assert gram.tokens < enough
    assert list(gram_warnings(gram)) == []


def test_text_that_repeats_itself(text: np.ndarray) -> None:
    assert warned(np.tile(text[:8], (20, 1)), damping=0.01) == ["rank_deficient"]
    # Only where a root was taken: an eigendecomposition is not worth a warning.
    assert warned(np.tile(text[:8], (20, 1)), damping=0.01, root=False) == []


def test_dead_channels(text: np.ndarray) -> None:
    some = text.copy()
    some[:, [3, 7]] = 0
    gram = accumulate_gram([(some, ones(len(some)))], WIDTH)
    assert gram.root.shape == (WIDTH, WIDTH)
    (warning,) = gram_warnings(gram)  # the rank is what is left
    assert (warning.code, warning.figures) == ("dead_channels", {"dead": 2, "columns": WIDTH})


def test_damping_that_does_not_do(text: np.ndarray) -> None:
    singular = np.tile(text[:8], (20, 1))
    gram = accumulate_gram([(singular, ones(len(singular)))], WIDTH)
    made = gram.feedback(damping=1e-30)
    (warning,) = gram_warnings(gram)
    assert warning.code == "ill_conditioned"
    # Rounding decides whether the factorization fails or ends in pivots of nothing but rounding.
    assert made.damping > 1e-30 or made.least_share < WIDTH * 2.0**-24


def test_a_channel_that_others_determine(text: np.ndarray) -> None:
    double = text.copy()
    double[:, 5] = double[:, 4] * np.float32(1 + 1e-6)
    assert warned(double, damping=1e-9, root=False) == ["ill_conditioned"]
    assert warned(double, damping=0.01, root=False) == []


def test_linears_that_no_pass_has_changed_have_no_warning(text: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    names = ("model.layers.0.mlp.down_proj", "lm_head")
    weights = {name: rng.standard_normal((8, WIDTH)).astype(np.float32) for name in names}
    group = make_group(weights, text[:40])
    QuantizeGptq(bits=4, group_size=16, embedding_bits=None).call(group)
    warn_of_gram(group)
    warn_of_gram(group)
    assert [len(linear.record.warnings) for linear in group.linears] == [1, 0]
    group.gram = None
    warn_of_gram(group)


def test_zero_input() -> None:
    gram = Gram(np.zeros((WIDTH, WIDTH)), 1000.0)
    assert not gram.root.any()
    assert [warning.code for warning in gram_warnings(gram)] == ["dead_channels"]
