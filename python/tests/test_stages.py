import pytest

from aprt import AprtError
from aprt.stages import Dims, Rows, all_sites, select_sites

DIMS = Dims(
    layers=3,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ffn=6,
    vocab=10,
    qkv_bias=True,
    qk_norm=False,
)


def names(**selection):
    return [site.name for site in select_sites(DIMS, **selection)]


def test_sites_come_in_the_order_of_computation():
    sites = [site.name for site in all_sites(DIMS)]
    assert sites[:3] == ["embedding", "layers.0.attn_norm", "layers.0.qkv_matmul"]
    assert sites[-3:] == ["layers.2.post_ffn_residual", "final_norm", "lm_head"]
    assert sites.index("layers.0.post_ffn_residual") + 1 == sites.index("layers.1.attn_norm")


def test_stages_that_the_model_lacks_are_not_sites():
    assert not any("q_norm" in site.name for site in all_sites(DIMS))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0", [0]), ("0..2", [0, 1]), ("0..=2", [0, 1, 2]), ("last", [2]), ("0,last", [0, 2])],
)
def test_layers_are_selected_by_number_range_and_last(layers, expected):
    assert names(stages="attn_out", layers=layers) == [f"layers.{i}.attn_out" for i in expected]


def test_aliases_name_the_same_stage():
    assert names(stages="logits, ffn_swiglu", layers="0") == ["layers.0.ffn_swigl", "lm_head"]


def test_layers_do_not_restrict_whole_model_stages():
    assert names(stages="embedding,attn_out", layers="1") == ["embedding", "layers.1.attn_out"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"stages": "q_norm"}, "it has embedding, attn_norm"),
        ({"stages": ""}, "this model has none"),
        ({"layers": "3"}, "layers 0..3"),
        ({"layers": "2..9"}, "layers 0..3"),
        ({"layers": "1..1"}, "empty"),
        ({"layers": "x"}, "expected a number"),
        ({"layers": "-1"}, "layers 0..3"),
    ],
)
def test_a_selection_of_nothing_is_refused_and_says_what_there_is(selection, message):
    with pytest.raises(AprtError, match=message):
        select_sites(DIMS, **selection)


def test_rows_are_picked_by_position():
    assert Rows("all").pick([4, 5, 6]) == [0, 1, 2]
    assert Rows("last").pick([4, 5, 6]) == [2]
    assert Rows("5..9").pick([4, 5, 6]) == [1, 2]
    assert Rows("0..2").pick([4, 5, 6]) == []
    with pytest.raises(AprtError, match="rows 'first'"):
        Rows("first")
