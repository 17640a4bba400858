"""Grams of output gradients against autograd on the whole model at once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typing_extensions import override

from eoracc.compiler.eager import output_gradients
from eoracc.compiler.eager.model import load_eager, module_rows, positions
from eoracc.compiler.eager.output_gradients import draw_labels, output_gradient_grams
from eoracc.compiler.kept.interval import SaveInterval
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ModelError
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from eoracc.passes.progress import Phase

Float = np.ndarray[Any, np.dtype[np.float64]]

ROLES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
EMBEDDING = "model.embed_tokens"
NAMES = [f"model.layers.{block}.{role}" for block in range(2) for role in ROLES]


def windows(rows: int = 6, length: int = 12) -> Windows:
    """Random tokens, one window cut short, and windows that count for more than others."""
    rng = np.random.default_rng(3)
    mask = np.ones((rows, length), np.int64)
    mask[0, length - 3 :] = 0
    return Windows(
        rng.integers(3, VOCABULARY, (rows, length)),
        mask,
        rng.uniform(0.5, 2.0, rows).astype(np.float32),
    )


def measure(
    model: PreTrainedModel,
    text: Windows,
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    progress: SilentProgress | None = None,
    **options: object,
) -> dict[str, NDArray[np.float32]]:
    settings: dict[str, Any] = {"labels": "text", "draws": 1, "seed": 0, "precision": "float32"}
    output_gradient_grams(
        model,
        names,
        text,
        folder=folder,
        **{"key": "key", **settings, **options},
        progress=progress or SilentProgress(),
    )
    return {name: load_file(folder / f"{name}.safetensors")["output_gram"] for name in names}


def all_at_once(folder: Path, text: Windows, labels: NDArray[np.int64]) -> dict[str, Float]:
    """The same by one backward pass through the whole model; labels ``[S, L]``, -1 for none."""
    model: Any = load_eager(folder, {})
    modules = dict(model.named_modules())
    places = {name: module_rows(modules, model.config, name) for name in NAMES}
    outputs: dict[Any, torch.Tensor] = {}

    def hook(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[module] = output

    for module in {module for place in places.values() for module, _ in place}:
        module.register_forward_hook(hook)
    mask = text.attention_mask
    embedded = model.get_input_embeddings()(torch.from_numpy(text.input_ids)).detach()
    logits = model(
        inputs_embeds=embedded.requires_grad_(),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions(mask)),
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(labels).flatten(), ignore_index=-1, reduction="sum"
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert embedded.grad is not None
    weights = mask.astype(np.float64)
    if text.weights is not None:
        weights *= text.weights[:, None]
    flat = weights.reshape(-1)
    found = {}
    for name, place in places.items():
        parts = [outputs[module].grad[..., rows] for module, rows in place]  # type: ignore[index]
        rows = torch.cat(parts, -1).flatten(0, 1).double().numpy()
        found[name] = (rows * flat[:, None]).T @ rows / flat.sum()
    entering = embedded.grad.flatten(0, 1).double().numpy()
    return found | {EMBEDDING: (entering * flat[:, None]).T @ entering / flat.sum()}


def squares(folder: Path, name: str) -> NDArray[np.float32]:
    return load_file(folder / f"{name}.safetensors")["token_weights"]


def labels_of_text(text: Windows) -> NDArray[np.int64]:
    labels = np.full_like(text.input_ids, -1)
    labels[:, :-1] = np.where(text.attention_mask[:, 1:] == 1, text.input_ids[:, 1:], -1)
    return labels


def assert_equal(actual: NDArray[np.float32], expected: Float, *, sums: int) -> None:
    """Within what ``sums`` float32 terms in a row round to; and not because both are nothing."""
    scale = np.abs(expected).max()
    assert scale > 1e-6
    assert np.abs(actual - expected).max() <= sums * float(np.finfo(np.float32).eps) * scale


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_one_backward_pass_through_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "model")
    text = windows()
    found = measure(load_eager(folder, {}), text, tmp_path / "grams", embedding=EMBEDDING)
    found[EMBEDDING] = load_file(tmp_path / "grams" / f"{EMBEDDING}.safetensors")["output_gram"]
    expected = all_at_once(folder, text, labels_of_text(text))
    for name in (*NAMES, EMBEDDING):
        # Two blocks of products 88 wide at most, and the head's.
        assert_equal(found[name], expected[name], sums=3 * VOCABULARY)
        # The squares of the same gradients: their mean is the trace.
        tokens = squares(tmp_path / "grams", name)
        assert text.weights is not None
        counts = (text.attention_mask * text.weights[:, None]).reshape(-1).astype(np.float64)
        mean = tokens @ counts / counts.sum()
        assert mean == pytest.approx(np.trace(expected[name]), rel=1e-4)
        assert tokens.std() > 0.1 * tokens.mean()
        assert not tokens.reshape(6, 12)[0, 9:].any()
    kept = {path.name for path in (tmp_path / "grams").iterdir()}
    assert kept == {"state.json", *(f"{name}.safetensors" for name in (*NAMES, EMBEDDING))}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def drawn_labels(folder: Path, text: Windows, *, draws: int, seed: int) -> NDArray[np.int64]:
    """``[draws, S, L]``, -1 for padding."""
    model: Any = load_eager(folder, {})
    found = []
    for window, (ids, mask) in enumerate(zip(text.input_ids, text.attention_mask, strict=True)):
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids)[None]).logits[0]
        uniform = np.random.default_rng([seed, window]).random((draws, len(ids)))
        labels, _ = draw_labels(logits, uniform)
        found.append(np.where(mask == 1, labels.numpy(), -1))
    return np.stack(found, axis=1)


def test_labels_drawn_from_the_model_and_the_mean_over_draws(llama: Path, tmp_path: Path) -> None:
    text = windows()
    found = measure(load_eager(llama, {}), text, tmp_path, labels="model", draws=2, seed=9)
    drawn = drawn_labels(llama, text, draws=2, seed=9)
    assert text.weights is not None
    counts = (text.attention_mask * text.weights[:, None]).reshape(-1).astype(np.float64)
    assert (drawn[0] != drawn[1]).mean() > 0.5
    first, second = (all_at_once(llama, text, labels) for labels in drawn)
    for name in NAMES:
        mean = (first[name] + second[name]) / 2
        assert_equal(found[name], mean, sums=3 * VOCABULARY)
        trace = squares(tmp_path, name) @ counts / counts.sum()
        assert trace == pytest.approx(np.trace(mean), rel=1e-4)


def test_drawn_labels_give_the_fisher_information(llama: Path, tmp_path: Path) -> None:
    """Its definition: every label's gradient, weighted by its probability."""
    text = Windows(windows().input_ids[1:2, :4], np.ones((1, 4), np.int64))
    name = "model.layers.0.self_attn.q_proj"
    model: Any = load_eager(llama, {})
    with torch.inference_mode():
        odds = model(torch.from_numpy(text.input_ids)).logits[0].double().softmax(-1).numpy()
    fisher = np.zeros((96, 96))
    for place in range(4):
        for label in range(VOCABULARY):
            labels = np.full((1, 4), -1)
            labels[0, place] = label
            fisher += odds[place, label] * all_at_once(llama, text, labels)[name]
    draws = 1000
    found = measure(model, text, tmp_path, names=[name], labels="model", draws=draws)[name]
    off = np.linalg.norm(found - fisher) / np.linalg.norm(fisher)
    # A mean of independent outer products: its error falls with the root of their number.
    assert off < 5 / np.sqrt(draws)
    assert off < 0.2


def test_does_not_depend_on_batches_and_chunks(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = windows()
    found = measure(load_eager(llama, {}), text, tmp_path / "a", labels="model")
    monkeypatch.setattr(output_gradients, "_BATCH", 5)
    monkeypatch.setattr(output_gradients, "_CHUNK", 7)
    again = measure(load_eager(llama, {}), text, tmp_path / "b", labels="model")
    for name in NAMES:
        assert_equal(again[name], found[name].astype(np.float64), sums=3 * VOCABULARY)


def test_bfloat16_is_within_its_rounding(llama: Path, tmp_path: Path) -> None:
    text = windows()
    exact = measure(load_eager(llama, {}), text, tmp_path / "a")
    rounded = measure(load_eager(llama, {}), text, tmp_path / "b", precision="bfloat16")
    for name in NAMES:
        off = np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name])
        # Some thirty roundings to eight bits on the way, twice over.
        assert 0 < off < 60 * 2**-8


class _Interrupted(SilentProgress):
    """Fails at a step, as a killed build would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    @contextmanager
    @override
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        yield self

    def advance(self, note: str = "") -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt(note)

    def skip(self) -> None:
        raise AssertionError("nothing was done before")


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_goes_on_where_it_was_interrupted(
    step: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveInterval, "is_due", True)
    text = windows()
    whole = measure(load_eager(llama, {}), text, tmp_path / "whole", labels="model")
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        measure(load_eager(llama, {}), text, folder, labels="model", progress=_Interrupted(step))
    kept = {path.name: path.read_bytes() for path in folder.glob("model.*")}
    assert len(kept) == max(0, step - 2) * len(ROLES)
    model: Any = load_eager(llama, {})
    monkeypatch.setattr(
        output_gradients._Run, "_kept_inputs", lambda *_: pytest.fail("went forward again")
    )
    again = measure(model, text, folder, labels="model")
    for name in NAMES:
        np.testing.assert_array_equal(again[name], whole[name])


def test_another_key_begins_anew(llama: Path, tmp_path: Path) -> None:
    first = measure(load_eager(llama, {}), windows(), tmp_path)
    other = Windows(windows().input_ids[::-1].copy(), windows().attention_mask)
    stale = measure(load_eager(llama, {}), other, tmp_path)
    fresh = measure(load_eager(llama, {}), other, tmp_path, key="another")
    for name in NAMES:
        np.testing.assert_array_equal(stale[name], first[name])
        assert not np.allclose(fresh[name], first[name], rtol=1e-2)


def test_a_damaged_checkpoint_is_told(llama: Path, tmp_path: Path) -> None:
    model: Any = load_eager(llama, {})
    model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\..*NaN or Inf.*damaged"):
        measure(model, windows(), tmp_path)


def test_a_name_that_the_model_does_not_have(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no list of blocks 'transformer\.h'"):
        measure(load_eager(llama, {}), windows(), tmp_path, names=["transformer.h.0.mlp.fc"])


def test_blocks_that_give_more_than_hidden_states_are_refused(llama: Path, tmp_path: Path) -> None:
    model: Any = load_eager(llama, {})
    last = model.model.layers[-1]
    compute = last.forward
    last.forward = lambda *args, **kwargs: (compute(*args, **kwargs), None)
    with pytest.raises(ModelError, match="give more than one tensor"):
        measure(model, windows(), tmp_path)


def test_a_model_that_cannot_leave_logits_out_is_refused(llama: Path, tmp_path: Path) -> None:
    model: Any = load_eager(llama, {})
    model.forward = lambda input_ids: input_ids
    with pytest.raises(ModelError, match="takes no 'logits_to_keep'"):
        measure(model, windows(), tmp_path)


def test_leaves_the_model_as_it_was(llama: Path, tmp_path: Path) -> None:
    model: Any = load_eager(llama, {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, windows(), tmp_path)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
