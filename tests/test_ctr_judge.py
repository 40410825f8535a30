"""What a table takes from `compare`: under which name, against which base."""

from __future__ import annotations

import json

import numpy as np

from courier_fast.ctr.judge import judge
from courier_fast.metrics.intervals import compare


def test_a_table_has_the_numbers_of_compare() -> None:
    rng = np.random.default_rng(0)
    page = np.repeat(np.arange(80), 5)
    user, clicked = page // 4, rng.random(400) < 0.3
    p = {name: rng.random(400) for name in ("none", "x", "y")}
    for base in ("none", "y"):
        expected = compare(clicked, p, user=user, base=base, page=page)
        found = judge(clicked, p, user, base, page)
        assert json.loads(json.dumps(found)) == found
        assert "difference" not in found[base]
        for name, row in found.items():
            whole = expected[name]
            assert row["calibration"]["pcoc"] == whole.calibration.pcoc
            for short, long in (("auc", "auc"), ("gauc", "gauc[impressions]"), ("mrr", "mrr")):
                e = whole.metrics[long]
                assert (row[short]["value"], row[short]["low"]) == (e.value, e.low)
                if name != base:
                    d = e.minus_base
                    assert d is not None
                    one = row["difference"][short]
                    assert (one["value"], one["high"], one["p"]) == (d.value, d.high, d.holm)
            if name != base:
                assert whole.auc.minus_base is not None
                assert row["mde"] == 2.8 * whole.auc.minus_base.se
                assert row["relaimpr"] == whole.rela_impr
    assert "mrr" not in judge(clicked, p, user)["x"]
