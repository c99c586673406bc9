"""Which causes are named, from numbers alone."""

import math

import pytest

from rebasin.diagnosis.findings import find_causes
from rebasin.diagnosis.record import GroupNumbers, LayerNumbers, MidpointNumbers, Performance, StreamNumbers
from rebasin.diagnosis.streams import BlockMatch

BAD = Performance(2.0, 0.42)
GOOD = Performance(0.2, 0.04)
LAYERS = (LayerNumbers("w", 0.0, 0.2, 0.3, 1.1), LayerNumbers("v", 0.0, 0.2, None, 1.0))
GROUPS = (GroupNumbers(("g",), 8, 0.3, 0.6, 0.9, BAD, BAD), GroupNumbers(("h",), 8, 0.3, 0.6, 0.9, BAD, None))
BLOCK = BlockMatch(("w",), 0.1, 0.5, 0.2, 0.0)
MIDPOINT = MidpointNumbers(
    a=Performance(0.1, 0.02),
    b=Performance(0.1, 0.02),
    before=BAD,
    permuted=BAD,
    temperature=0.5,
    tempered_loss=1.9,
    repaired=BAD,
    by_activations=BAD,
    rescaled=None,
    loss_error=0.1,
    error_error=0.02,
)


def causes(layers=LAYERS, groups=GROUPS, streams=(), **changes):
    findings = find_causes(layers, groups, streams, MIDPOINT._replace(**changes), 10)
    return [finding.cause for finding in findings]


def with_scale(ratio):
    return (LAYERS[0]._replace(norm_ratio=ratio), LAYERS[1])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, ["unlike"]),
        ({"permuted": Performance(0.2, 0.06)}, []),  # neither 5 points nor 0.25 nats too much
        ({"error_error": 0.2, "loss_error": 1.0}, []),  # within three standard errors
        ({"error_error": math.nan}, ["unlike"]),  # a single example has no standard error
        ({"groups": (GROUPS[0], GROUPS[1]._replace(replaced=GOOD))}, ["group"]),
        ({"groups": (GROUPS[0]._replace(rematched=GOOD), GROUPS[1])}, ["group"]),
        ({"by_activations": GOOD}, ["method"]),
        ({"groups": (GROUPS[0], GROUPS[1]._replace(replaced=GOOD)), "by_activations": GOOD}, ["group"]),
        ({"repaired": GOOD}, ["variance"]),
        ({"repaired": Performance(0.3, 0.12)}, ["variance", "unlike"]),  # 10 points are left
        ({"streams": (StreamNumbers("g", (BLOCK,)),)}, ["stream"]),
        ({"streams": (StreamNumbers("g", (BLOCK,)),), "repaired": GOOD}, ["stream", "variance"]),
        ({"streams": (StreamNumbers("g", (BLOCK._replace(chance=0.45),)),)}, ["unlike"]),
        ({"streams": (StreamNumbers("g", (BLOCK._replace(shared=0.45),)),)}, ["unlike"]),
        ({"layers": with_scale(4.0), "rescaled": GOOD}, ["scale"]),
        ({"layers": with_scale(1 / 4), "rescaled": BAD}, ["unlike"]),
        ({"layers": with_scale(4.0)}, ["scale", "unlike"]),  # no symmetry could bring it back
        ({"layers": with_scale(math.inf)}, ["scale", "unlike"]),
        (
            {"layers": with_scale(4.0), "repaired": Performance(0.3, 0.2), "rescaled": GOOD},
            ["scale", "variance"],
        ),
        (
            {"layers": with_scale(4.0), "repaired": GOOD, "rescaled": Performance(0.3, 0.2)},
            ["scale", "variance"],
        ),
        ({"tempered_loss": 0.2}, ["unlike"]),  # a temperature does not change the error
        (
            {"permuted": Performance(2.0, 0.03), "tempered_loss": 0.2, "repaired": GOOD},
            ["variance", "temperature"],
        ),
        (
            {"a": Performance(2.0, 0.6), "b": Performance(2.0, 0.6), "permuted": Performance(2.3, 0.9)},
            ["group", "variance", "undertrained"],
        ),
    ],
)
def test_a_cause_is_named_where_its_removal_helps(numbers, expected):
    assert causes(**numbers) == expected


def test_a_finding_says_how_much_is_gone_and_what_to_try():
    (finding,) = find_causes(LAYERS, GROUPS, (), MIDPOINT._replace(repaired=Performance(0.3, 0.06)), 10)
    assert finding.removes == pytest.approx(0.9)
    assert finding.where == ("w",)
    assert finding.text.endswith(
        "30 % of their variance at the midpoint; with REPAIR it has an error of 6.0 %"
    )
    assert "build_repair" in finding.advice


def test_scales_stand_out_without_a_midpoint():
    assert find_causes(LAYERS, GROUPS, (), None, None) == ()
    (finding,) = find_causes(with_scale(0.2), GROUPS, (), None, None)
    assert finding.cause == "scale"
    assert finding.text == "1 layer differs in scale: the norm of w is 5 times as large in B"
