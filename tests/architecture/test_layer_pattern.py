"""Reading a layer pattern: layers, stages, blocks, and what is refused."""

import itertools

import pytest

from megatron_txssm.architecture.layer_pattern import (
    LAYERS,
    MODULE,
    UNSUPPORTED,
    blocks,
    check_pattern,
    from_letters,
    in_stages,
    layers,
    prediction_depths,
    repeated_part,
    stages,
    without_depths,
)
from megatron_txssm.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("M", ["M"]),
        ("M-*-", ["M-*-"]),
        ("M-|*-", ["M-", "*-"]),
        ("M|-*|-|*", ["M", "-*", "-", "*"]),
        (" M - * - ", ["M-*-"]),
        ("M-M-\n*-\tM-\r\n", ["M-M-*-M-"]),
        ("M- |\n *- | \n M", ["M-", "*-", "M"]),
    ],
)
def test_stages_and_layers(pattern: str, wanted: list[str]) -> None:
    assert stages(pattern) == wanted
    assert layers(pattern) == "".join(wanted)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("", "layer_pattern='' has no layers; write one symbol per layer, such as M-M-M-M-M-M-M-*-"),
        (" \n", "has no layers"),
        ("|", "layer_pattern='|' has a stage without layers at '|'; write one symbol per layer"),
        ("|M-", "has a stage without layers at '|'"),
        ("M-|", "has a stage without layers at '|'"),
        ("M-| |*-", "has a stage without layers at '|'"),
        ("M-X", "layer_pattern='M-X': 'X' is no layer; use M (state-space), * (attention), - (FFN)"),
        ("m-", "'m' is no layer"),
        ("M,-;", "',', ';' is no layer"),
        ("M–", "'–' is no layer"),
        # Unknown symbols do not hide one that Megatron has.
        ("M-GX", "G (gated delta net) of Megatron's layers is not supported yet; use M (state-space)"),
        ("S", "S and A are now M and *, each with its FFN as a layer of its own (-): write M- once for each"),
        ("SS\nA", "write M-M-*- once for each repetition"),
        ("SA-", "'A', 'S' is no layer"),
        ("S|A", "'A', 'S' is no layer"),
    ],
)
def test_a_wrong_pattern_is_answered(pattern: str, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        stages(pattern)
    assert wanted in str(error.value)


@pytest.mark.parametrize(("symbol", "name"), UNSUPPORTED.items())
def test_megatrons_other_layers_are_refused_by_name(symbol: str, name: str) -> None:
    with pytest.raises(UserError, match="of Megatron's layers is not supported yet") as error:
        layers(f"M-{symbol}-")
    assert f"{symbol} ({name})" in str(error.value)


def test_every_symbol_of_megatrons_has_a_name() -> None:
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    theirs = {value for name, value in vars(Symbols).items() if name.isupper() and isinstance(value, str)}
    assert theirs == {*LAYERS, *UNSUPPORTED, "|", "/"}


@pytest.mark.parametrize(
    ("all_layers", "wanted"),
    [
        ("M-", "M"),
        (MODULE, "MMMMMMM*"),
        ("*-M-", "*M"),
        ("M", None),
        ("-", None),
        ("-M", None),
        ("M*", None),
        ("M--", None),
        ("M-M", None),
        ("MM--", None),
        ("", None),
    ],
)
def test_blocks_of_a_mixer_and_an_ffn(all_layers: str, wanted: str | None) -> None:
    assert blocks(all_layers) == wanted


@pytest.mark.parametrize(
    ("all_layers", "wanted"),
    [("M", "M"), ("MMM", "M"), ("M-M-", "M-"), ("M-*-" * 5, "M-*-"), ("M-*", "M-*"), ("M-*M-", "M-*M-")],
)
def test_the_repeated_part(all_layers: str, wanted: str) -> None:
    assert repeated_part(all_layers) == wanted


def test_the_repeated_part_is_the_shortest() -> None:
    for length in range(1, 9):
        for all_layers in map("".join, itertools.product("M-*", repeat=length)):
            part = repeated_part(all_layers)
            assert part * (length // len(part)) == all_layers
            assert repeated_part(part) == part


@pytest.mark.parametrize(
    ("pattern", "count", "wanted"),
    [
        ("M-*-", 1, "M-*-"),
        ("M-*-", 2, "M-|*-"),
        ("M-*-", 4, "M|-|*|-"),
        ("M-*-", 3, None),
        ("M-*-", 8, None),
        # As written, however long.
        ("M-*|-", 2, "M-*|-"),
        ("M |\n-*-", 2, "M|-*-"),
        # One stage needs no borders.
        ("M-*|-", 1, "M-*-"),
        # They are not moved.
        ("M-|*-", 4, None),
        ("M|-|*|-", 2, None),
    ],
)
def test_in_stages(pattern: str, count: int, wanted: str | None) -> None:
    assert in_stages(pattern, count) == wanted


def test_letters_of_earlier_recipes() -> None:
    assert from_letters("SSA") == "M-M-*-"


@pytest.mark.parametrize(
    ("pattern", "own", "depths"),
    [
        ("M-*-/*-", "M-*-", ["*-"]),
        ("M-|*- / *M /\n*M", "M-*-", ["*M", "*M"]),
        ("ME/E/E/E", "ME", ["E", "E", "E"]),
        ("M-*-", "M-*-", []),
    ],
)
def test_prediction_depths(pattern: str, own: str, depths: list[str]) -> None:
    check_pattern(pattern)
    assert layers(pattern) == own
    assert prediction_depths(pattern) == depths
    assert layers(without_depths(pattern)) == own and prediction_depths(without_depths(pattern)) == []
    # Megatron's form, with which a pipeline is divided; depths have no stages of their own.
    assert in_stages(pattern, 1) == "/".join([own, *depths])
    assert in_stages(pattern, 2) == "/".join([f"{own[: len(own) // 2]}|{own[len(own) // 2 :]}", *depths])


@pytest.mark.parametrize(
    ("pattern", "mistake"),
    [
        ("M-/", "no layers behind /; write those of a prediction depth, such as /*-"),
        ("M-//*-", "no layers behind /; write those of a prediction depth, such as /*-"),
        ("M-/*-/", "no layers behind /; write those of a prediction depth, such as /*-"),
        ("M-/*-|M-", "| behind /; prediction depths are all in the last pipeline stage: leave | out there"),
        ("M-/*|-/*|-", "| behind /; prediction depths are all in the last pipeline stage: leave | out there"),
        (
            "M-/*-/* / *-",
            "prediction depths with different layers (*-, *); all have the same: write /*- 3 times",
        ),
    ],
)
def test_wrong_prediction_depths_are_answered(pattern: str, mistake: str) -> None:
    with pytest.raises(UserError) as error:
        check_pattern(pattern)
    assert str(error.value) == f"layer_pattern={pattern!r} has {mistake}"


@pytest.mark.parametrize("pattern", ["-", "--", "E-/*-"])
def test_a_model_needs_a_mixer(pattern: str) -> None:
    with pytest.raises(UserError, match=r"has no mixer; add M or \*"):
        check_pattern(pattern)
