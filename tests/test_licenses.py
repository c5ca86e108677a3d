"""Which licence a result may state by those of its seeds."""

from typing import Any

import pytest

from upcycle.errors import OutputError
from upcycle.licenses import check_licenses, licensing


def record(*licenses: Any) -> dict[str, Any]:
    """What an upcycle.json says of seeds `a`, `b`, `c` of these licences."""
    return {"seeds": [{"name": name, "license": one} for name, one in zip("abc", licenses, strict=False)]}


@pytest.mark.parametrize("licenses", [["mit", "MIT", "mit"], ["apache-2.0"], ["cc-by-4.0", "cc-by-4.0"]])
def test_one_permissive_licence_goes_over(licenses):
    found = licensing(record(*licenses))
    assert (found.license, found.problems) == (licenses[0], [])
    assert check_licenses(record(*licenses), None) == licenses[0]
    assert check_licenses(record(*licenses), "mine") == "mine"


@pytest.mark.parametrize(
    ("licenses", "problems"),
    [
        (["mit", "apache-2.0", "mit"], ["licences differ: mit (a, c); apache-2.0 (b)"]),
        (["mit", None, "mit"], ["differ: mit (a, c); none stated (b)", "b: no licence is stated"]),
        (["cc-by-nc-4.0"] * 3, ["a, b, c: cc-by-nc-4.0 does not allow commercial use"]),
        (["fair-noncommercial-research-license"], ["commercial use"]),
        (["cc-by-nc-nd-4.0"] * 3, ["commercial use", "changed works"]),
        (["cc-by-sa-4.0"] * 3, ["shared alike"]),
        (["cc-by-sa-9.0"] * 3, ["shared alike"]),
        (["gpl-3.0"] * 3, ["shared alike"]),
        (["llama3.1"] * 3, ["llama3.1 has terms of its own"]),
        (["our-own-2"] * 3, ["our-own-2 has terms of its own"]),
        (["unknown"] * 3, ["a, b, c: no licence is stated"]),
        ([None] * 3, ["a, b, c: no licence is stated"]),
        ([7, [], ""], ["a, b, c: no licence is stated"]),
    ],
)
def test_others_have_to_be_given(licenses, problems):
    found = licensing(record(*licenses))
    assert found.license is None
    assert len(found.problems) == len(problems)
    with pytest.raises(OutputError, match="--license") as raised:
        check_licenses(record(*licenses), None)
    for part, problem in zip(problems, found.problems, strict=True):
        assert part in problem
        assert problem in str(raised.value)
    assert check_licenses(record(*licenses), "mine") == "mine"


def test_seeds_that_are_not_known():
    assert check_licenses({}, None) is None
    assert check_licenses({"seeds": "x"}, None) is None
    with pytest.raises(OutputError, match="an expert of a mixture"):
        check_licenses({"extracted": {"name": "b"}}, None)
