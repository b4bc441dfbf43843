"""What a run that goes on, and the processes of a job, must agree on."""

from __future__ import annotations

import json

import pytest

from svg_jax import assemble, distributed

OURS, OTHERS = ["9 records", "record 0 ab"], ["9 records", "record 0 cd"]


def test_processes_that_read_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def others_say(name: str, says: str, timeout: float) -> list[str]:
        assert timeout == 5.0
        return [says, says, json.dumps(found)]

    monkeypatch.setattr(distributed, "everyone", others_say)
    found = OURS
    assemble.check_data(OURS, None, 5.0)
    found = ["9 records", ""]  # a record that it could not read just now
    assemble.check_data(OURS, None, 5.0)
    found = OTHERS
    with pytest.raises(
        ValueError, match=r"process 2 reads other data than process 0 \(record 0 cd instead of record 0 ab\): give all"
    ):
        assemble.check_data(OURS, None, 5.0)


def test_a_run_goes_on_with_the_data_that_it_began_with() -> None:
    assemble.check_data(OURS, {"step": 3, "fingerprint": OURS}, 5.0)
    assemble.check_data(OURS, {"step": 3}, 5.0)  # a checkpoint of an earlier version does not say
    with pytest.raises(
        ValueError,
        match=r"not those that this run began with \(record 0 cd then, record 0 ab now\): .*--config\.init_from",
    ):
        assemble.check_data(OURS, {"step": 3, "fingerprint": OTHERS}, 5.0)
