"""Two spellings of one language code in the input of a conversion."""

import pytest

from pipeline.common.errors import UserError
from tests.data_prep.convert.helpers import run, write_jsonl


@pytest.mark.parametrize(
    ("codes", "named"),
    [(("zh-CN", "zh_CN"), "zh-CN and zh_CN"), (("en", "EN"), "EN and en")],
    ids=["translation", "pivot"],
)
def test_convert_refuses_two_spellings_of_a_language(codes, named, tmp_path, out):
    """The rows of a pivot that is written otherwise would only be counted as dropped."""
    rows = [
        {"pair_id": pair_id, "lang": lang, "question": "q", "answer": "a"}
        for pair_id, code in enumerate(codes)
        for lang in {code, "en" if code.lower() != "en" else "de"}
    ]
    source = write_jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=rf"a\.jsonl: the languages {named} are two spellings of one code; use"):
        run("canonical", source, output=out)
    assert not out.exists()


def test_convert_keeps_a_language_with_and_without_region(tmp_path, out):
    rows = [{"pair_id": 1, "lang": lang, "question": "q", "answer": "a"} for lang in ("en", "en-US", "zh", "zh-CN")]
    assert len(run("canonical", write_jsonl(tmp_path / "a.jsonl", *rows), output=out)[1]) == 4
