from __future__ import annotations

from lvdm.config.reference import reference


def test_mappings_are_told_in_words_with_their_default() -> None:
    text = reference()
    assert "| `data.video.captions` | mapping of text to number >= 0 | empty |" in text
    assert "typing." not in text
