"""Property and contract: encodings of architectures, sizes of spaces, and what is said of a broken space."""

import json
import random
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.errors import HwnasError
from hwnas.network import macs
from hwnas.space import CHOICES, SearchSpace, lower
from hwnas.space_toml import load_space, parse_space, shipped_spaces

SPACES = {name: load_space(name) for name in shipped_spaces()}

TOML = """\
name = "made-up"
input_size = 32
classes = 10

[stem]
channels = 24
stride = 1
max_pool = false

[unit]
split_ratio = ["1/4", "1/2", "3/4"]
kernel = [3, 5]
squeeze_excite = [false, true]
residual = [false, true]
groups = [1, 2, 4]
extra_depthwise = [false, true]

[[stage]]
depth = [1, 2]
width = [32, 64]

[[stage]]
depth = [2]
width = [64, 128]

[head]
channels = 64
"""

FEW = """\
name = "few"
input_size = 16
classes = 2
stem = { channels = 8, stride = 2, max_pool = false }
head = { channels = 16 }
unit.split_ratio = ["1/2"]
unit.kernel = [3, 5]
unit.squeeze_excite = [false]
unit.residual = [true, false]
unit.groups = [1]
unit.extra_depthwise = [false]
stage = [{ depth = [1, 3], width = [16, 8] }, { depth = [2], width = [16] }]
"""


def codes(space: SearchSpace) -> st.SearchStrategy[tuple[int, ...]]:
    """Every vector of indices, canonical or not."""
    return st.tuples(*(st.integers(0, radix - 1) for radix in space.radices))


# ---- round trips -------------------------------------------------------------------------------------------------


def test_four_spaces_are_shipped():
    assert shipped_spaces() == (
        "shufflenet-224",
        "shufflenet-32",
        "shufflenet-cifar",
        "shufflenet-cifar-small",
        "shufflenet-tiny",
    )
    assert all(space.name == name for name, space in SPACES.items())


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_architecture_comes_back_from_json_and_from_its_encoding(name: str, data: st.DataObject):
    space = SPACES[name]
    architecture = space.decode(data.draw(codes(space)))
    assert space.from_json(architecture.to_json()) == architecture
    code = space.encode(architecture)
    assert space.decode(code) == architecture
    assert len(code) == len(space.places) == len(space.radices)
    assert all(0 <= index < radix for index, radix in zip(code, space.radices, strict=True))


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_canonical_encoding_is_one_for_all_encodings_of_an_architecture(name: str, data: st.DataObject):
    space = SPACES[name]
    code = data.draw(codes(space))
    canonical = space.canonical(code)
    assert space.canonical(canonical) == canonical
    assert space.decode(canonical) == space.decode(code)
    # changing what stands at the places of absent units changes nothing
    depths = [stage.depth for stage in space.decode(code).stages]
    absent = [
        place
        for place, text in enumerate(space.places)
        for number, depth in enumerate(depths, 2)
        if text.startswith(f"stage{number}.unit") and int(text.split(".")[1].removeprefix("unit")) > depth
    ]
    other = list(code)
    for place in absent:
        assert canonical[place] == 0
        other[place] = data.draw(st.integers(0, space.radices[place] - 1))
    assert space.canonical(other) == canonical


def test_the_places_of_an_encoding_are_named_in_its_order():
    space = SPACES["shufflenet-tiny"]
    code = [0] * len(space.places)
    for place, index in (
        ("stage3.depth", 1),
        ("stage3.width", 2),
        ("stage3.unit2.kernel", 2),
        ("stage4.unit1.groups", 1),
    ):
        code[space.places.index(place)] = index
    _, stage3, stage4 = space.decode(code).stages
    assert (stage3.depth, stage3.width, stage3.units[1].kernel, stage4.units[0].groups) == (3, 224, 7, 2)


def test_samples_depend_on_the_seed_alone_and_are_of_the_space():
    space = SPACES["shufflenet-32"]
    first, again = ([space.sample(rng) for _ in range(20)] for rng in (random.Random(5), random.Random(5)))
    assert first == again
    assert len(set(first)) == 20
    for architecture in first:
        space.check(architecture)


# ---- what is in a space ------------------------------------------------------------------------------------------


def test_the_size_of_a_space_is_the_number_of_its_architectures():
    space = parse_space(FEW)
    everything = {space.decode(code) for code in product(*map(range, space.radices))}
    assert len({space.encode(architecture) for architecture in everything}) == len(everything)
    assert space.size == len(everything) == 2 * (2 + 2 * 4 * 4) * 2 * 4


def test_the_sizes_of_the_shipped_spaces_are_exact():
    # a first unit of a stage has 3 x 3 x 2 x 3 x 2 = 108 choices, a later one 216
    def stage(widths: int, *depths: int) -> int:
        return widths * sum(108 * 216 ** (depth - 1) for depth in depths)

    assert SPACES["shufflenet-tiny"].size == stage(3, 1, 2, 3) * stage(3, 2, 3, 4) * stage(3, 1, 2, 3)
    large = stage(4, 2, 4, 6) * stage(4, 4, 8, 10) * stage(4, 2, 4, 6)
    assert SPACES["shufflenet-32"].size == SPACES["shufflenet-224"].size == large


@pytest.mark.parametrize("name", SPACES)
def test_the_smallest_architecture_has_the_fewest_macs_and_the_largest_the_most(name: str):
    space, rng = SPACES[name], random.Random(1)
    least, most = (macs(lower(space, architecture)) for architecture in (space.smallest, space.largest))
    space.check(space.smallest)
    space.check(space.largest)
    for _ in range(200):
        assert least < macs(lower(space, space.sample(rng))) < most


EVERY_CHOICE_OF_ONE_UNIT = TOML.replace("[[stage]]\ndepth = [2]\nwidth = [64, 128]\n", "").replace("[1, 2]\n", "[1]\n")


@pytest.mark.parametrize("text", [FEW, EVERY_CHOICE_OF_ONE_UNIT])
def test_the_extremes_of_a_small_space_are_those_of_all_its_architectures(text: str):
    space = parse_space(text)
    costs = [macs(lower(space, space.decode(code))) for code in product(*map(range, space.radices))]
    assert macs(lower(space, space.smallest)) == min(costs)
    assert macs(lower(space, space.largest)) == max(costs)


def test_a_unit_of_stride_2_has_no_residual_wherever_it_comes_from():
    space = parse_space(FEW)
    found = [space.smallest, space.largest, *map(space.decode, product(*map(range, space.radices)))]
    for architecture in found:
        space.check(architecture)
        assert not any(stage.units[0].residual for stage in architecture.stages)
    assert any(unit.residual for architecture in found for stage in architecture.stages for unit in stage.units)


@pytest.mark.parametrize("name", SPACES)
def test_a_lowered_architecture_has_its_widths_and_its_units(name: str):
    space = SPACES[name]
    architecture = space.sample(random.Random(3))
    network = lower(space, architecture)
    expected = [f"stage{n}.{i}" for n, s in enumerate(architecture.stages, 2) for i in range(1, s.depth + 1)]
    assert [unit.name for unit in network.units] == ["stem", *expected, "head"]
    ends = {unit.name: unit.nodes[-1].outputs[0].shape for unit in network.units}
    side = space.input_size // space.stem_stride // (2 if space.max_pool else 1)
    for number, stage in enumerate(architecture.stages, 2):
        side //= 2
        assert ends[f"stage{number}.{stage.depth}"] == (stage.width, side, side)
    assert network.outputs[0].shape == (space.classes,)


# ---- architectures that are refused ------------------------------------------------------------------------------


def smallest_json() -> dict:
    return json.loads(SPACES["shufflenet-tiny"].smallest.to_json())


def first_unit(name: str, value: object) -> str:
    data = smallest_json()
    data["stages"][1]["units"][0][name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an architecture"),
        ("[]", "not an architecture"),
        ('{"space": "shufflenet-tiny"}', "not an architecture.*stages"),
        (first_unit("split_ratio", "1/0"), "not an architecture"),
        (first_unit("split_ratio", None), "not an architecture"),
        (first_unit("colour", 3), "not an architecture.*colour"),
        (first_unit("kernel", 9), r"stage3\.unit1\.kernel is 9; shufflenet-tiny allows 3, 5, 7\."),
        (first_unit("kernel", "3"), r"stage3\.unit1\.kernel is 3;"),
        (first_unit("split_ratio", "1/3"), r"stage3\.unit1\.split_ratio is 1/3; .* 1/4, 1/2, 3/4\."),
        (first_unit("residual", True), r"stage3\.unit1\.residual is True; shufflenet-tiny allows False\."),
        (json.dumps(smallest_json() | {"space": "shufflenet-32"}), "belongs to the space 'shufflenet-32'"),
        (json.dumps(smallest_json() | {"stages": []}), "shufflenet-tiny has 3 stages; the architecture 0"),
    ],
)
def test_what_is_no_architecture_of_the_space_is_refused_with_the_reason(text: str, message: str):
    with pytest.raises(HwnasError, match=message):
        SPACES["shufflenet-tiny"].from_json(text)


def test_equal_numbers_of_another_type_are_read_as_the_space_s_own_values():
    unit = SPACES["shufflenet-tiny"].from_json(first_unit("kernel", 3.0)).stages[1].units[0]
    assert [type(getattr(unit, name)) for name in CHOICES] == [Fraction, int, bool, bool, int, bool]


# ---- spaces that are refused -------------------------------------------------------------------------------------


NOT_TOML = "not valid TOML: Invalid value (at line 1, column 8)."


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, 'name = ""', "name is a text. It is ''."),
        (1, "name = ", NOT_TOML),
        (2, 'input_size = "32"', "input_size is a whole number of at least 1. It is '32'."),
        (2, "input_size = 30", "shrink the input 4 times ... the nearest that works is 32. It is 30."),
        (2, "input_size = 2", "the nearest that works is 4. It is 2."),
        (3, "classes = 1", "classes is a whole number of at least 2. It is 1."),
        (4, "colours = 3", "the fields here are name, ... , stage. It is 'colours'."),
        (6, "channels = 30", "the stem's channels ... nearest width that works is 32. It is 30."),
        (6, "channels = true", "channels is a whole number of at least 1. It is True."),
        (5, "[stem_]", "the fields here are ... It is 'stem_'."),
        (7, "stride = 3", "stride is 1 or 2. It is 3."),
        (8, "max_pool = 1", "max_pool is true or false. It is 1."),
        (11, "split_ratio = [0.5]", 'fractions between 0 and 1 in quotes, such as "1/2". It is 0.5.'),
        (11, 'split_ratio = ["1/2", "4/4"]', "fractions between 0 and 1 ... It is '4/4'."),
        (11, 'split_ratio = ["1/2", "1/0"]', "It is '1/0'."),
        (11, 'split_ratio = ["1/2", "2/4"]', "each choice of split_ratio stands once. It is ['1/2', '1/2']."),
        (12, "kernel = 3", "kernel is a list of choices in brackets with at least one value. It is 3."),
        (12, "kernel = []", "kernel is a list of choices in brackets with at least one value. It is []."),
        (12, "kernel = [3, 4]", "the choices of kernel are odd whole numbers from 3 to 7. It is 4."),
        (12, "kernel = [3, 3]", "each choice of kernel stands once. It is ['3', '3']."),
        (12, "kernels = [3, 5]", "the fields here are split_ratio, kernel, ... It is 'kernels'."),
        (13, "squeeze_excite = [0, 1]", "the choices of squeeze_excite are true and false. It is 0."),
        (15, "groups = [0]", "the choices of groups are whole numbers of at least 1. It is 0."),
        (20, "width = [32, 36]", "it is a multiple of 16; the nearest that works is 32. It is 36."),
        (24, "width = [72]", "it is a multiple of 16; the nearest that works is 64. It is 72."),
        (23, "depth = [0, 1]", "the choices of depth are whole numbers of at least 1. It is 0."),
        (23, "depth = 2", "depth is a list of choices in brackets"),
        (27, "channels = 0", "channels is a whole number of at least 1. It is 0."),
    ],
)
def test_a_broken_line_of_a_space_is_named_with_the_rule_and_the_value(line: int, text: str, message: str):
    lines = TOML.splitlines()
    lines[line - 1] = text
    error = refusal("\n".join(lines))
    assert error.startswith(f"mine.toml, line {line}: " if message != NOT_TOML else "mine.toml: ")
    assert all(part in error for part in message.split(" ... "))


def refusal(text: str) -> str:
    with pytest.raises(HwnasError) as caught:
        parse_space(text, "mine.toml")
    assert str(caught.value).startswith("mine.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "made-up"\n', "", "mine.toml: 'name' is missing; the fields here are name, input_size,"),
        ("stride = 1\n", "", "mine.toml, line 5: 'stride' is missing; the fields here are channels, stride, max_pool."),
        ("groups = [1, 2, 4]\n", "", "mine.toml, line 10: 'groups' is missing"),
        ("depth = [2]\n", "", "mine.toml, line 22: 'depth' is missing; the fields here are depth, width."),
        ("[head]\nchannels = 64\n", "", "mine.toml: 'head' is missing; the fields here are name,"),
        (
            "[[stage]]\ndepth = [1, 2]\nwidth = [32, 64]\n\n[[stage]]",
            "[stage]",
            "line 18: a space has at least one [[stage]].",
        ),
        ("[head]\nchannels = 64\n", "[[head]]\nchannels = 64\n", "line 26: 'head' is a table, written under [head]."),
        ("groups = [1, 2, 4]", "groups = [2, 3]", "line 20: a width must give whole branches"),
    ],
)
def test_a_missing_or_misshapen_part_of_a_space_is_named(old: str, new: str, message: str):
    assert old in TOML
    assert message in refusal(TOML.replace(old, new, 1))


def test_the_stem_must_divide_by_every_choice_of_groups_not_only_by_the_largest():
    text = TOML.replace("groups = [1, 2, 4]", "groups = [2, 3]").replace("channels = 24", "channels = 21")
    assert "line 6: the stem's channels" in refusal(text)
    assert "of groups (2, 3); the nearest width that works is 24. It is 21." in refusal(text)


def test_the_same_space_may_be_written_inline():
    space = parse_space(FEW)
    assert [stage.depth for stage in space.stages] == [(1, 3), (2,)]
    assert "line 10: the choices of groups" in refusal(FEW.replace("groups = [1]", "groups = [0]"))
    assert "mine.toml: a width must give" in refusal(FEW.replace("width = [16]", "width = [17]"))


def test_a_space_is_found_by_name_or_by_file_and_else_the_names_are_listed(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML, encoding="utf-8")
    assert load_space(path) == load_space(str(path)) == parse_space(TOML)
    with pytest.raises(
        HwnasError, match=r"'nowhere'.*shufflenet-224, .*-32, .*-cifar, .*-cifar-small, shufflenet-tiny"
    ):
        load_space("nowhere")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = \xff\xfe")
    with pytest.raises(HwnasError, match=r"mine\.toml: a search space is UTF-8 text"):
        load_space(path)
