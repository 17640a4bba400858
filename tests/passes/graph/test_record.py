from __future__ import annotations

from eoracc.passes.graph.record import LinearRecord


def test_copy_is_changed_on_its_own() -> None:
    record = LinearRecord({"quantize_rtn": 0.5}, ["a note"], 2.0)
    copy = record.copy()
    assert (copy.errors, copy.notes, copy.output_norm) == ({"quantize_rtn": 0.5}, ["a note"], 2.0)
    copy.errors["eora"] = 0.1
    copy.notes.append("another note")
    copy.output_norm = None
    assert record.errors == {"quantize_rtn": 0.5}
    assert record.notes == ["a note"]
    assert record.output_norm == 2.0
