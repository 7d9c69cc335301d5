"""The instruction counter of benchmarks/instructions.py on machine code whose ways are known."""

from __future__ import annotations

import pytest

from benchmarks import instructions

# A loop of two ways: a vector load (then a store), or four scalar loads. Its only entry is above.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   BSSY B0, 0x0090 ;
        /*0020*/              @!P0 BRA 0x0050 ;
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/                   BRA 0x0080 ;
        /*0050*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0070*/               @P2 FADD R5, R5, R4 ;
        /*0080*/                   BSYNC B0 ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/              @!P1 BRA 0x0010 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   NOP ;
"""


def names(path):
    return [x.name.split(".")[0] for x in path]


def test_the_way_around_a_loop_takes_the_vector_load():
    path, looped = instructions.main_loop(instructions.parse(SASS), 128, 1, backward=True)
    assert looped
    assert names(path) == ["BSSY", "BRA", "LDG", "BRA", "BSYNC", "STG", "BRA"]
    assert [x.load_bits for x in path if x.load_bits] == [128]


def test_other_widths_take_the_other_way():
    path, _ = instructions.main_loop(instructions.parse(SASS), 32, None, backward=False)
    assert names(path) == ["BSSY", "BRA", "LDG", "LDG", "FADD", "BSYNC", "STG", "BRA"]


def test_without_a_loop_the_whole_kernel_counts():
    code = instructions.parse(SASS.replace("@!P1 BRA 0x0010", "@!P1 BRA 0x00b0"))
    path, looped = instructions.main_loop(code, 128, 1, backward=False)
    assert not looped
    assert names(path)[0] == "MOV"
    assert names(path)[-1] == "EXIT"


def test_code_without_such_loads_is_an_error():
    with pytest.raises(ValueError, match="vectors of 64 bits"):
        instructions.main_loop(instructions.parse(SASS), 64, 1, backward=False)
