from __future__ import annotations

import json

from eoracc.compiler.report.content import (
    Report,
)


def test_json_and_back(report: Report) -> None:
    content = json.loads(json.dumps(report.as_dict()))
    assert content["fidelity"]["rows"][1]["name"] == "eora"
    assert set(content["fidelity"]["rows"][0]) == {
        "name",
        "perplexity",
        "kl",
        "top1_agreement",
        "last_layer_error",
        "bytes",
        "bits_per_weight",
        "folder_bytes",
    }
    assert json.loads(json.dumps(Report.from_dict(content).as_dict())) == content
