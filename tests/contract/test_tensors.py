"""Tensors as data: shapes from words, keys, shapes on disk, joins, and tables made of other tables."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft.contract.geometry import Geometry
from peft.contract.tensors import Shown, Sizes, Stored, TensorTable, fit_to_file, head_of

MATRIX = Geometry(out=6, fan_in=8, inputs=8)
CONV = Geometry(out=6, fan_in=24, inputs=4, kernel=6, shape=(2, 3))  # 4 channels · 2 · 3 taps


def a_method(geometry: Geometry = MATRIX, **more: object) -> SimpleNamespace:
    return SimpleNamespace(geometry=geometry, r=3, config=SimpleNamespace(banks=5, use_bias=True), **more)


# -- shapes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "matrix", "conv"),
    [
        ("r fan_in", (3, 8), (3, 24)),
        ("out r", (6, 3), (6, 3)),
        ("r", (3,), (3,)),
        ("r r", (3, 3), (3, 3)),
        ("config.banks inputs", (5, 8), (5, 4)),
        ("kernel groups", (1, 1), (6, 1)),
        ("width", (8,), (24,)),  # what `before` acts on: a kernel's columns
        ("2 out 7", (2, 6, 7), (2, 6, 7)),
        ("4", (4,), (4,)),
    ],
)
def test_words_give_a_shape(words, matrix, conv):
    """Sizes of the geometry by their names, numbers as they are, and everything else is the method's attribute."""
    assert Sizes(words)(a_method()) == matrix
    assert Sizes(words)(a_method(CONV)) == conv


def test_what_is_made_are_the_tensors_that_have_words_and_are_asked_for():
    table = TensorTable.of(
        {
            "A": Stored(shape="r fan_in"),
            "b": Stored(shape="out", when="config.use_bias"),
            "by_itself": Stored(key="other"),
        }
    )
    (a, shape, always), (b, _, when) = table.made
    assert (a, b, always) == ("A", "b", None) and shape(a_method()) == (3, 8)
    method = a_method()
    assert when(method)
    method.config.use_bias = False
    assert not when(method)


# -- keys -----------------------------------------------------------------------------------------------------------------
PAIR = {
    "A": Stored("lora_A.weight", indexed="lora_embedding_A", join="rows"),
    "B": Stored("lora_B.weight", indexed="lora_embedding_B", frozen=True, turned="A"),
    "own": Stored(stack=(1, 0)),
    "bank": Stored("bank.weight", shared=True),
}


def test_a_key_is_the_attributes_name_unless_it_says_another():
    table = TensorTable.of(PAIR)
    assert table.keys == {"A": "lora_A.weight", "B": "lora_B.weight", "own": "own"}
    assert table.shared_keys == {"bank": "bank.weight"}  # below the model, so not among a site's
    assert table.frozen == ("B",)
    assert table.joins == {"lora_A.weight": "rows"}
    assert table.turned == {"lora_B.weight": "lora_A.weight"}
    assert table.stacks == {"own": (1, 0)}


def test_layers_that_look_rows_up_have_keys_of_their_own():
    table = TensorTable.of(PAIR)
    rows = table.for_rows
    assert rows.keys == {"A": "lora_embedding_A", "B": "lora_embedding_B", "own": "own"}
    assert rows.joins == {"lora_embedding_A": "rows"} and rows.turned == {"lora_embedding_B": "lora_embedding_A"}
    assert table.for_rows is rows and rows.for_rows is rows  # made once, and final


def test_layers_show_the_names_of_both_sorts_of_keys_once_each():
    table = TensorTable.of(PAIR, also_shown=("empty", "lora_A"))
    assert table.layer_names() == (
        *("lora_A", "lora_B", "own"),
        *("lora_embedding_A", "lora_embedding_B"),
        "empty",
    )
    assert head_of("lora_A.weight") == "lora_A" and head_of("plain") == "plain"


def test_what_is_shown_besides_tensors_counts_the_dropout_where_there_is_one():
    assert Shown(("r", "scaling")).names == ("r", "scaling")
    assert Shown(("r",), dropout="lora_dropout").names == ("r", "lora_dropout")


# -- shapes on disk ---------------------------------------------------------------------------------------------------------
def test_disk_shapes_follow_the_layer():
    """`taps` are the kernel's native sizes, `ones` as many ones: none of either where the layer has no kernel."""
    table = TensorTable.of(
        {
            "both": Stored(disk="1 -1", kernel="r -1 taps"),
            "kernels": Stored(kernel="1 -1 ones"),
            "always": Stored(disk="-1 r ones"),
            "same": Stored(shape="r"),
        }
    )
    shapes = {a: (table.disk_shape(a_method(), a), table.disk_shape(a_method(CONV), a)) for a in table.keys}
    assert shapes == {
        "both": ((1, -1), (3, -1, 2, 3)),
        "kernels": (None, (1, -1, 1, 1)),
        "always": ((-1, 3), (-1, 3, 1, 1)),
        "same": (None, None),
    }


def test_the_disk_shape_of_an_inner_tensor_is_asked_of_the_inner_method():
    table = TensorTable.of({"A": Stored(disk="-1 r taps")}).around({"m": Stored(disk="size -1")})
    inner = a_method(CONV)
    inner.r = 5
    method = a_method(CONV, size=7, inner=inner)
    assert table.disk_shape(method, "inner.A") == (-1, 5, 2, 3)
    assert table.disk_shape(method, "m") == (7, -1)


# -- tables of tables -------------------------------------------------------------------------------------------------------
def test_without_takes_tensors_out_of_the_file_but_not_out_of_the_method():
    whole = TensorTable.of({"A": Stored(shape="r"), "B": Stored(shape="r"), "bank": Stored(shape="r", shared=True)})
    table = whole.without("B", "bank")
    assert table.keys == table.own == {"A": "A"} and table.shared_keys == {}
    assert [a for a, *_ in table.made] == ["A", "B", "bank"]
    assert whole.without("B", "bank") is table and whole.keys == {"A": "A", "B": "B"}


def test_what_belongs_to_another_site_is_read_or_passed_over_but_never_written():
    whole = TensorTable.of({"A": Stored("a.weight"), "B": Stored("b.weight")})
    read = whole.of_another("B")
    assert read.keys == whole.keys and read.unwritten == ("B",) and read.repeats == ()
    passed = whole.of_another("B", repeated=True)
    assert passed.keys == {"A": "a.weight"} and passed.repeats == ("b.weight",) and passed.unwritten == ()


def test_a_table_around_another_keeps_its_keys_on_disk_under_longer_attributes():
    inner = TensorTable.of(
        {
            "A": Stored("lora_A.weight", shape="r fan_in", shrinks=0, join="rows"),
            "B": Stored("lora_B.weight", shape="out r", grows=1, frozen=True, disk="-1 r"),
            "bank": Stored("bank", shared=True),
        }
    )
    table = inner.around({"m": Stored("lora_m", shape="out", join="rows", module=True, frozen=True)})
    assert table.keys == {"inner.A": "lora_A.weight", "inner.B": "lora_B.weight", "m": "lora_m"}
    assert table.own == {"m": "lora_m"} and table.modules == ("m",)
    assert table.shared_keys == {"inner.bank": "bank"}
    assert table.frozen == ("inner.B", "m")
    assert table.flexible == (("inner.A", 0, False), ("inner.B", 1, True))
    assert [a for a, *_ in table.made] == ["m"]  # the wrapped method makes its own
    assert table.joins == {"lora_A.weight": "rows", "lora_m": "rows"}
    assert table.disk.keys() == {"inner.B"}
    assert inner.of_another("B").around({}).unwritten == ("inner.B",)


def test_what_cannot_be_joined_is_not_made_joinable_by_what_is_put_around_it():
    inner = TensorTable.of({"A": Stored(shape="r fan_in")})
    assert inner.around({"m": Stored(shape="out", join="rows")}).joins == {}


def test_a_copied_method_shares_its_table():
    table = TensorTable.of(PAIR)
    assert copy.deepcopy({"table": table})["table"] is table


# -- sizes that a file may change ---------------------------------------------------------------------------------------------
def test_a_tensor_states_which_axis_of_it_a_file_may_shrink_or_grow():
    table = TensorTable.of(
        {"A": Stored(shrinks=0), "B": Stored(grows=1), "C": Stored(shrinks=1, grows=0), "D": Stored()}
    )
    assert table.flexible == (("A", 0, False), ("B", 1, True), ("C", 1, False), ("C", 0, True))


@pytest.mark.parametrize(
    ("there", "axis", "more", "becomes"),
    [
        ((2, 4), 0, False, (2, 4)),  # fewer rows
        ((3, 1), 1, False, (3, 1)),
        ((5, 4), 0, True, (5, 4)),  # more rows
        ((5, 4), 0, False, (3, 4)),  # more where only less is taken
        ((2, 4), 0, True, (3, 4)),
        ((2, 5), 0, False, (3, 4)),  # another axis differs, too: a mistake to report elsewhere
        ((2,), 0, False, (3, 4)),
        ((3, 4), 0, False, (3, 4)),
        (None, 0, False, (3, 4)),  # the file does not hold it
    ],
)
def test_a_parameter_takes_over_a_files_size_along_that_axis_only(there, axis, more, becomes):
    parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    fit_to_file(parameter, None if there is None else torch.zeros(there), axis, more)
    assert tuple(parameter.shape) == becomes


def test_a_shrunken_parameter_keeps_its_first_entries_in_memory_of_their_size():
    parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    fit_to_file(parameter, torch.zeros(3, 2), 1, False)
    assert parameter.tolist() == [[0, 1], [4, 5], [8, 9]]
    assert parameter.untyped_storage().nbytes() == 6 * 4
