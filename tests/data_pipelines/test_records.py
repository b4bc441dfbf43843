"""What the rest of the pipeline relies on in a record and in its one error."""

from __future__ import annotations

import pickle

from data_pipelines.records import BadRecord, Cause, Record


def test_a_bad_record_says_its_sentence_and_keeps_its_cause_between_processes() -> None:
    sent = pickle.loads(pickle.dumps(BadRecord(Cause.MODE, "a.png has floats; expected 8 bits")))
    assert isinstance(sent, ValueError)
    assert (str(sent), sent.cause) == ("a.png has floats; expected 8 bits", Cause.MODE)


def test_the_order_of_the_causes_is_that_of_checkpoints() -> None:
    """Counts by cause are saved by position: a line of this list never moves."""
    assert [str(cause) for cause in Cause] == [
        "missing", "permission", "not_a_file", "empty", "not_an_image", "truncated", "damaged", "too_large", "mode",
        "too_small", "not_json", "keys", "value", "encoding", "caption", "remote", "timeout", "store",
    ]  # fmt: skip


def test_messages_do_not_carry_the_image() -> None:
    assert len(repr(Record(0, "a.jpg", "shard:0", image=bytes(10_000)))) < 200
