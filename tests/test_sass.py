"""Counts read from machine code: loops, the path of a tile through a loop, and shared-memory traffic."""

import itertools

import pytest

from benchmarks import sass


def code(*lines: str, hexadecimal: bool = False) -> sass.Region:
    """Parse instructions and labels ("name:") in the format of nvdisasm, or of cuobjdump if `hexadecimal`."""
    address = itertools.count(0, 16)
    places = [(line, None if line.endswith(":") else next(address)) for line in lines]
    targets = {
        line[:-1]: next(at for _, at in places[i:] if at is not None)
        for i, (line, at) in enumerate(places)
        if at is None
    }
    text = []
    for line, at in places:
        for label, target in targets.items():
            if at is not None:
                line = line.replace(f"->{label}", f"{target:#x}" if hexadecimal else f"`(.L_{label})")
        text.append(f"        /*{at:04x}*/  {line} ;" if at is not None else "" if hexadecimal else f".L_{line}")
    return sass.parse("\n".join(text))


TILE = (
    "LDC R1, c[0x0][0x28]",
    "tile:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT",
    "@!P0 BRA ->whole",
    "ISETP.NE.AND P1, PT, R2, R3, PT",
    "FSEL R4, R4, RZ, P1",
    "whole:",
    "MUFU.EX2 R4, R4",
    "wait:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR7], R4",
    "@!P2 BRA ->wait",
    "BRA.DIV UR12, ->diverged",
    "SHFL.BFLY PT, R5, R4, 0x1, 0x1f",
    "joined:",
    "@P3 BRA ->tile",
    "EXIT",
    "diverged:",
    "WARPSYNC.COLLECTIVE R15, ->one",
    "one:",
    "BRA ->joined",
)


@pytest.mark.parametrize("hexadecimal", [False, True])
def test_tile_counts_exclude_the_mask_and_code_for_diverged_warps(hexadecimal):
    kernel = code(*TILE, hexadecimal=hexadecimal)
    tile = kernel.main
    assert dict(kernel.counts) == {"global": 1, "branch": 1}
    assert dict(tile.counts) == {"tensor": 1, "branch": 3, "exp": 1, "shuffle": 1}
    assert tile.most == 10  # with the mask and one iteration of the wait
    assert tile.slots(num_warps=8) == 2 * 6
    assert [dict(loop.counts) for loop in tile.inner] == [{"wait": 1, "branch": 1}]


def test_the_tile_is_the_loop_with_products_and_the_fewest_mask_instructions():
    product, mask = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "FSEL R4, R4, RZ, P1"
    kernel = code(
        "first:", "FADD R1, R1, R2", "@P0 BRA ->first",
        "@P1 BRA ->second",
        "masked:", product, mask, mask, "@P0 BRA ->masked", "BRA ->end",
        "second:", product, mask, "@P0 BRA ->second",
        "end:", "EXIT",
    )  # fmt: skip
    assert dict(kernel.main.counts) == {"tensor": 1, "alu": 1, "branch": 1}
    assert kernel.tensor == 1


def test_the_tile_is_the_larger_of_two_loops_with_equally_many_products():
    def loops(small, large):
        return code(
            "@P1 BRA ->second",
            "masked:", small, "MUFU.EX2 R4, R4", "@P0 BRA ->masked", "BRA ->end",
            "second:", large, *["MUFU.EX2 R4, R4"] * 2, "@P0 BRA ->second",
            "end:", "EXIT",
        )  # fmt: skip

    by_warpgroups = [f"HGMMA.64x{columns}x16.F32.BF16 R24, gdesc[UR4], R24, gsb0" for columns in (32, 64)]
    by_one_thread = "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR24], tmem[UR32], idesc[UR33], UPT"
    for kernel in (loops(*by_warpgroups), loops(by_one_thread, by_one_thread)):
        assert dict(kernel.main.counts) == {"tensor": 1, "exp": 2, "branch": 1}


def test_total_counts_the_given_trips_of_nested_loops_and_one_trip_of_others():
    kernel = code(
        "FADD R1, R1, R2", "tile:", "FMUL R1, R1, R2",
        "chunk:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA ->chunk",
        "sum:", "FADD R1, R1, R2", "@P1 BRA ->sum",
        "@P2 BRA ->tile", "EXIT",
    )  # fmt: skip
    assert kernel.total([10, 3], lambda region: region.instructions) == 2 + 10 * (2 + 3 * 2 + 2)
    assert kernel.total([10, 3], lambda region: region.counts["tensor"]) == 30
    assert kernel.total([], lambda region: region.instructions) == 2 + 2 + 2 + 2


def test_total_counts_only_the_busier_of_two_successive_product_loops():
    product, mask = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "FSEL R4, R4, RZ, P1"
    kernel = code("tile:", product, "@P0 BRA ->tile", "masked:", product, mask, "@P1 BRA ->masked", "EXIT")
    assert kernel.total([5], lambda region: region.instructions) == 5 * 2 + 1


def test_ways_lists_paths_with_fewer_products():
    product = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    kernel = code(
        "tile:", product, "@P1 BRA ->end", product, "FADD R1, R1, R2", "@P2 BRA ->end", product, "FADD R1, R1, R2",
        "end:", "@P0 BRA ->tile", "EXIT",
    )  # fmt: skip
    assert kernel.main.ways == {1: 3, 2: 6, 3: 8}
    assert kernel.main.instructions == 8


def test_a_conditional_call_is_a_branch_and_any_other_call_returns():
    kernel = code(
        "tile:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "CALL.REL.NOINC ->division", "@!P0 CALL.REL.NOINC ->end",
        "BRA ->tile", "end:", "EXIT", "division:", "FADD R1, R1, R2", "RET.REL.NODEC R2 0x0",
    )  # fmt: skip
    assert dict(kernel.main.counts) == {"tensor": 1, "branch": 3}
    assert dict(kernel.counts) == {"branch": 1}


@pytest.mark.parametrize(
    ("instruction", "cycles"),
    [
        ("LDS R4, [R2]", 1),
        ("LDS.U.128 R4, [R2+0x40]", 4),
        ("@!P0 STS.64 [R2], R4", 2),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R147+0x9000], [R36.64], !P0", 4),
        ("LDSM.16.MT88.4 R104, [R144+0x8000]", 4),
        ("LDSM.16.M88 R104, [R144+0x8000]", 1),
        ("STSM.16.M88.2 [R144], R104", 2),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", 1),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", 12),  # 64 rows and 128 columns of 32 bytes, 4 warps
        ("HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR4], R24", 8),  # rows are in registers
        ("FADD R1, R1, R2", 0),
    ],
)
def test_cycles_of_shared_memory_are_read_from_the_width_of_an_instruction(instruction, cycles):
    assert code(instruction, "EXIT").shared == cycles


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", 64 * 128 * 16 * 2 / 4),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 16 * 8 * 16 * 2),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 16 * 8 * 8 * 2),
        ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR24], tmem[UR32], idesc[UR33], UPT", 0),  # the shape is in a register
    ],
)
def test_flops_are_read_from_the_shape_of_a_product(instruction, flops):
    assert code(instruction, "EXIT").flops == flops


def test_only_a_wait_for_warpgroup_products_counts_as_a_drain():
    kernel = code("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "DEPBAR.LE SB0, 0x0", "EXIT")
    assert dict(kernel.counts) == {"wait": 2, "drain": 1, "branch": 1}
