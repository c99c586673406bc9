"""The table of public models: its shares by hand, its rows, and what a model that fails does to it."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import rebasin
from benchmarks.public_models import (
    BEGIN,
    END,
    Row,
    measure,
    measure_all,
    select,
    unit_share,
    write_between_markers,
    write_table,
)
from benchmarks.public_zoo import PACKAGES, Specimen
from benchmarks.shares import parameter_share, short_reason
from rebasin.errors import ConfigError


class Network(nn.Module):
    """An embedding of 5 words in 4 dimensions; 6 units whose cumulative sum pins them, and 8 that move."""

    @nn.compact
    def __call__(self, words):
        x = nn.Embed(5, 4, name="embed")(words)
        x = jnp.cumsum(nn.Dense(6, name="pinned")(x), axis=-1)
        return nn.Dense(2, name="out")(nn.relu(nn.Dense(8, name="free")(x)))


def build():
    words = jnp.array([0, 3, 1])
    params = Network().init(jax.random.key(0), words)["params"]

    def function(params, words):
        return Network().apply({"params": params}, words)

    return Specimen(function, params, (words,), (jnp.arange(5),))


def test_shares_by_hand():
    specimen = build()
    spec = rebasin.infer_spec(specimen.function, specimen.params, *specimen.inputs)
    # Moving: 2 × 4 positions of the embedding's dimensions, 3 × 8 of the free units. Pinned: 3 × 6.
    # The 5 words and 2 × 2 outputs do not count.
    assert unit_share(spec, specimen.params) == pytest.approx((8 + 24) / (8 + 24 + 18))
    # All numbers but the bias of the pinned units and that of the outputs.
    numbers = 5 * 4 + (4 * 6 + 6) + (6 * 8 + 8) + (8 * 2 + 2)
    assert parameter_share(spec, specimen.params) == pytest.approx((numbers - 6 - 2) / numbers)


def test_a_product_counts_by_its_factors():
    """Three heads that constants keep apart, with four dimensions each that move."""
    params = {"w": jnp.ones((5, 12)), "v": jnp.ones((12, 2))}

    def function(params, x):
        heads = jnp.tanh(x @ params["w"]).reshape(-1, 3, 4) * jnp.arange(1.0, 4.0)[None, :, None]
        return heads.reshape(-1, 12) @ params["v"]

    spec = rebasin.infer_spec(function, params, jnp.ones((2, 5)))
    assert set(map(str, spec.table["w"])) == {"-", "index_0:3*w:4"}
    assert unit_share(spec, params) == pytest.approx(1 / 2)  # 6 of 12 positions on both axes


def test_a_tree_without_numbers_has_shares():
    spec = rebasin.infer_spec(lambda tree, x: x, {}, jnp.ones(2))
    assert (unit_share(spec, {}), parameter_share(spec, {})) == (0.0, 0.0)


def test_row_of_a_model():
    row = measure(build())
    assert (row.groups, row.inner, row.problem, row.is_any_length) == (2, 0, "", True)
    assert row.reasons == {"cumsum: positions depend on those before them": 3}
    assert row.seconds > 0


def test_a_spec_that_is_wrong_at_another_length_is_told():
    """With fewer rows than the table has, inference cannot know that a later row has a role of its own."""
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}

    def function(params, x):
        hidden = x @ params["w"]
        scale = jnp.arange(1.0, 5.0) if len(x) > 2 else jnp.ones(4)
        return jnp.tanh(hidden * scale[None]) @ params["v"]

    row = measure(Specimen(function, params, (jnp.eye(2, 3),), (jnp.eye(3),)))
    assert row.problem.startswith("at another length, the spec changes the function:")


@pytest.mark.slow
def test_models_that_fail_or_take_too_long_do_not_stop_the_others():
    rows = measure_all([("a", "b")], 60.0, "operator:concat")
    assert rows == {("a", "b"): "ab"}
    failed = measure_all([("a", "b"), ("c", "d")], 60.0, "operator:mul")
    assert [text.splitlines()[-1] for text in failed.values()] == [
        "TypeError: can't multiply sequence by non-int of type 'str'"
    ] * 2
    began = time.perf_counter()
    late = measure_all([("import time", "time.sleep(60)")], 1.0, "timeit:timeit")
    assert list(late.values()) == ["timeit:timeit took longer than 1 s"]
    assert time.perf_counter() - began < 30


def test_cells():
    row = Row(3, 1, 1.0, 0.9996, {"slice: one position in 2": 2}, 0.256, "", True)
    table = write_table(
        {
            ("jraph", "GAT"): row,
            ("flax", "MLP"): row._replace(inner=0, problem="the spec changes\n  the function", reasons={}),
            ("flax", "CNN"): row._replace(units=0.5, is_any_length=False, reasons={}),
            ("flax", "RNN"): row._replace(groups=0, inner=0, units=0.0, parameters=0.0, reasons={}),
            ("equimo", "ViT"): "function failed:\nTraceback\nTypeError: a | b",
        }
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert table.splitlines()[1] == "| --- | --- | --- | --- | --- | --- | --- | --- |"
    assert cells == [
        ["GAT", "jraph", "3, 1 inner", "100 %", "99.9 %", "slice: one position in 2 × 2", "0.26", "yes"],
        ["MLP", "flax", "3", "100 %", "99.9 %", "", "0.26", "no: the spec changes the function"],
        ["CNN", "flax", "3, 1 inner", "50.0 %", "99.9 %", "", "0.26", "yes, one length"],
        ["RNN", "flax", "0", "0.0 %", "0.0 %", "", "0.26", "nothing to verify"],
        ["ViT", "equimo", "", "", "", "", "", "failed: TypeError: a / b"],
    ]


def test_reasons_are_written_without_lines_of_code():
    assert short_reason("slice (model.py:12): one position in 2") == "slice: one position in 2"
    assert short_reason("reaches an axis of output 3") == "output"


def test_the_table_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    for _ in range(2):  # writing again changes nothing
        write_between_markers(page, "new")
        assert page.read_text() == f"before\n{BEGIN}new\n{END}after\n"


def test_models_are_selected_by_name_and_by_package():
    every = select([])
    assert len(every) == sum(map(len, PACKAGES.values())) >= 25
    assert select(["jraph"]) == [("jraph", name) for name in PACKAGES["jraph"]]
    assert select(["BERT", "DeepSets"]) == [("transformers", "BERT"), ("jraph", "DeepSets")]
    with pytest.raises(ConfigError, match=r"no models or packages \['BARD'\]; --list prints all"):
        select(["BARD"])
