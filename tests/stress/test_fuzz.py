"""A short run of tests/stress/fuzz with fixed cases for every surface, and inputs for which it has found faults."""

import pytest

from bingo.images.decode import BadImage, check_pixels
from bingo.params import load_params
from bingo.runtime.errors import UserError, out_of_memory, short
from tests.stress.fuzz import images
from tests.stress.fuzz.harness import LAST, Surface, fuzz
from tests.stress.fuzz.surfaces import SURFACES

CASES = {"params.yaml, taken on": 4, "images, bombs": 0, "checkpoints, published": 20}  # expensive ones


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_no_case_ends_in_a_traceback_a_hang_or_too_much_memory(surface, tmp_path):
    if cases := CASES.get(surface.name, 30):
        tally = fuzz(surface, cases, 7, tmp_path)
        assert not tally.failures, next(iter(tally.failures.values()))[0]
        assert tally.refused > cases / 8
        assert tally.cases >= cases


def test_counts_of_the_fuzzer(tmp_path):
    def run(case: int, _) -> None:
        if case % 4 == 1:
            raise UserError("a line")
        if case % 4 == 2:
            raise UserError("two\nlines")
        if case % 4 == 3:
            raise KeyError(case)

    from hypothesis import strategies as st

    tally = fuzz(Surface("test", 1, st.integers(0, 1000), run), 100, 0, tmp_path)
    assert (tally.cases, tally.failed) == (100, sum(len(texts) for texts in tally.failures.values()))
    assert min(tally.accepted, tally.refused) > 0
    assert len(tally.failures) == 2
    assert (tmp_path / LAST).exists()


CHEAP = ("eps", "png header 60000", "gif 65535", "webp 16383", "jpeg 65535", "jpeg of scans", "tiff 2^32", "tiff directories", "ppm 60000")


@pytest.mark.parametrize("name", [*CHEAP, "pgm text"])
def test_a_bomb_is_a_bad_image(name):
    with pytest.raises(BadImage) as caught:
        check_pixels(images.bomb(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2001-99-99", "!!float abc", "!!int ''", "!!binary '?'", "0x" + "f" * 5000, "[" * 500])
def test_yaml_that_crashes_the_parser_is_one_line(tmp_path, value):
    (tmp_path / "params.yaml").write_text(f"seed: {value}\n")
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "params.yaml")
    assert all("\n" not in line and len(line) <= 1010 for line in caught.value.lines)
    assert len(caught.value.lines) <= 41


def test_values_in_messages_are_shortened():
    laughs: list = ["x"] * 8
    for _ in range(30):
        laughs = [laughs] * 8
    for value in (laughs, "a" * 10**6, 1 << 10**6, {str(i): i for i in range(10**5)}):
        assert len(short(value)) <= 83
    assert short([1, 2.5, "a"]) == "[1, 2.5, 'a']"
    (line,) = UserError("name: " + "a" * 10**6 + "; the way out").lines
    assert len(line) < 1010
    assert line.endswith("; the way out")


def test_lack_of_memory_is_one_line():
    messages = [
        "CUDA out of memory. Tried to allocate 2 GiB\nGPU 0",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
    ]
    for error in [MemoryError(), *map(RuntimeError, messages)]:
        assert "lower the batch" in str(out_of_memory(error))
        assert "\n" not in str(out_of_memory(error))
    assert out_of_memory(RuntimeError("shapes differ")) is None
